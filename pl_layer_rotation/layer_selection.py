"""Which tensors of a module are layers: the one rule that the monitor, the metric and the optimizer share."""

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pl_layer_rotation._sharding import flattened_parameters, is_unknown_piece, original_shape

_NORM_TYPES: tuple[type[nn.Module], ...] = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EMBEDDING_TYPES: tuple[type[nn.Module], ...] = (nn.Embedding, nn.EmbeddingBag)
# What torch.compile, FSDP, activation checkpointing and Fabric put between a module and its own name.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_NO_NAME = _WRAPPERS | {"parametrizations"}


class UnreadableLayersError(MisconfigurationException):
    """Weights are there, but this process cannot tell whose they are or what part of them it holds."""


class _Candidate(NamedTuple):
    name: str
    tensor: Tensor
    types: frozenset[str]  # names of the owners' classes and their bases
    by_default: bool


def select_layers(
    module: nn.Module,
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
) -> dict[str, Tensor]:
    """The weight tensors of a module that count as layers, in depth order.

    By default these are the parameters with two or more dimensions whose owner is neither a normalization nor an
    embedding. A tensor that several modules share counts once, under its first name, and not at all where one of them
    is an embedding or a normalization (a tied output head belongs to the embedding). The gain of ``weight_norm`` is
    not a layer, its direction is. Bare parameters with two or more dimensions (a class token of shape ``(1, 1, d)``,
    a position table) are layers by this rule: leave them out with ``exclude``. Frozen parameters are layers too;
    parameters of lazy modules appear once they are initialized.

    Names are the same before and after wrapping (``torch.compile``, DDP, FSDP, Fabric) and under parametrizations,
    and leave out a trailing ``.weight``. Depth order is the order of registration. Of a sharded layer the tensor is
    what the optimizer of this process gets: a ``DTensor``, or the one-dimensional, maybe empty piece that FSDP1 cuts.

    Args:
        module: where to look.
        include: shell-style patterns (``fnmatch``, case-sensitive) on names and on class names of the owner, such as
            ``"encoder.*"`` or ``"Conv2d"``. A pattern selects the default layers that it matches; one that matches
            none of these selects other tensors with two or more dimensions (``include=["*", "Embedding"]`` adds the
            embeddings). A literal ``[`` is written ``[[]``.
        exclude: patterns of the same form; what they match is left out.

    Returns:
        Name to parameter, in depth order; empty for a module without layers.

    Raises:
        TypeError: If ``module`` is no module.
        MisconfigurationException: If a pattern matches nothing; the message names similar names. If FSDP1 put all
            parameters into one (``use_orig_params=False``), or cut them by a wrapper that ``module`` does not hold.

    Example::

        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))
        >>> {name: tuple(weight.shape) for name, weight in select_layers(net).items()}
        {'0': (8, 1, 3, 3), '3': (10, 8)}
        >>> list(select_layers(net, exclude="Linear"))
        ['0']

    """
    check_module(module)
    candidates = _candidates(module)
    included = as_patterns("include", include)
    excluded = as_patterns("exclude", exclude)
    defaults = [candidate for candidate in candidates if candidate.by_default]
    if included is None:
        chosen = {candidate.name for candidate in defaults}
    else:
        chosen = set()
        for pattern in included:
            chosen |= _matching(pattern, defaults) or _matching_or_raise("include", pattern, candidates)
    for pattern in excluded or ():
        chosen -= _matching_or_raise("exclude", pattern, candidates)
    return {candidate.name: candidate.tensor for candidate in candidates if candidate.name in chosen}


def quantized_layers(module: nn.Module) -> list[str]:
    """Names of parameters with two or more dimensions that hold codes instead of weights."""
    return [
        ".".join([*path, name])
        for path, _, name, parameter in _parameters(module)
        if not is_lazy(parameter) and parameter.dim() >= 2 and _is_quantized(parameter)
    ]


def _candidates(module: nn.Module) -> list[_Candidate]:
    """Every floating tensor with two or more dimensions, tied ones once."""
    names: dict[int, str] = {}
    tensors: dict[int, Tensor] = {}
    owners: dict[int, list[nn.Module]] = {}
    taken: set[str] = set()
    for path, owner, parameter_name, parameter in _parameters(module):
        if is_lazy(parameter) or parameter.layout != torch.strided:
            continue
        _check_readable(module, parameter, ".".join([*path, parameter_name]))
        if len(original_shape(parameter)) < 2:
            continue
        if _is_quantized(parameter):
            continue
        key = id(parameter)
        if key not in names:
            names[key] = next(name for name in _possible_names(path, parameter_name) if name not in taken)
            taken.add(names[key])
            tensors[key] = parameter
        owners.setdefault(key, []).append(owner)
    return [
        _Candidate(
            name,
            tensors[key],
            frozenset(kind.__name__ for owner in owners[key] for kind in type(owner).__mro__ if kind is not object),
            not any(_is_norm(owner) or _is_embedding(owner) for owner in owners[key]),
        )
        for key, name in names.items()
    ]


def _parameters(module: nn.Module) -> Iterator[tuple[list[str], nn.Module, str, Tensor]]:
    """(path without wrappers, owner, name in the owner, parameter) in registration order, tied ones each time."""
    modules = dict(module.named_modules(remove_duplicate=False))
    flattened = flattened_parameters(module)
    for full_path, owner in modules.items():
        parts = full_path.split(".") if full_path else []
        parents = [modules[".".join(parts[:depth])] for depth in range(len(parts))]
        path = [
            part
            for part, parent in zip(parts, parents, strict=True)
            if part not in _NO_NAME and not (part == "module" and isinstance(parent, DistributedDataParallel))
        ]
        if isinstance(owner, ParametrizationList):
            # `fc.parametrizations.weight` holds the originals of `fc.weight`: the owner is `fc`.
            gain = "original0" if any(type(p).__name__ == "_WeightNorm" for p in owner) else None
            for name, parameter in {**dict(owner.named_parameters(recurse=False)), **flattened.get(owner, {})}.items():
                if name != gain:
                    original = path[-1] if name in ("original", "original1") else f"{path[-1]}.{name}"
                    yield path[:-1], parents[-2], original, parameter
            continue
        renamed, gains = _originals(owner)
        own: dict[str, nn.Parameter] = dict(owner.named_parameters(recurse=False, remove_duplicate=False))
        own.update(flattened.get(owner, {}))
        for own_name, own_parameter in own.items():
            if own_name not in gains:
                yield path, owner, renamed.get(own_name, own_name), own_parameter


def _check_readable(module: nn.Module, parameter: Tensor, name: str) -> None:
    if hasattr(parameter, "ds_tensor"):
        raise UnreadableLayersError(
            f"`module` must hold its weights, got {type(module).__name__} with {name!r}, of which DeepSpeed's stage 3 "
            "leaves nothing between steps. Use stage 1 or 2, FSDPStrategy, or ModelParallelStrategy with "
            "`fully_shard` (FSDP2)."
        )
    if getattr(parameter, "_is_flat_param", False):
        raise UnreadableLayersError(
            f"`module` must keep its parameters apart, got {type(module).__name__} with {name!r}, all of them in one "
            "tensor. Use FSDPStrategy with `use_orig_params=True`, Lightning's default, or ModelParallelStrategy with "
            "`fully_shard` (FSDP2)."
        )
    if is_unknown_piece(parameter):
        raise UnreadableLayersError(
            f"`module` must hold the FSDP wrapper that knows the shapes of its weights, got {type(module).__name__} "
            f"with {name!r}, a piece of a parameter. Pass the whole LightningModule (`select_layers(self)`); its parts "
            "are known from then on."
        )


def _is_quantized(parameter: Tensor) -> bool:
    """Whether it holds integers, or is of a class that says how to get floats out of what it holds."""
    own = any("dequantize" in vars(kind) for kind in type(parameter.data).__mro__ if kind not in Tensor.__mro__)
    return own or not (parameter.is_floating_point() or parameter.is_complex())


def _originals(owner: nn.Module) -> tuple[dict[str, str], set[str]]:
    """What hooks of torch renamed: the new names with the old ones, and the gains of the older weight_norm."""
    renamed: dict[str, str] = {}
    gains: set[str] = set()
    for hook in owner._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            renamed[f"{hook.name}_v"] = hook.name
            gains.add(f"{hook.name}_g")
        elif isinstance(hook, SpectralNorm):
            renamed[f"{hook.name}_orig"] = hook.name
        elif isinstance(hook, BasePruningMethod):
            renamed[f"{hook._tensor_name}_orig"] = str(hook._tensor_name)
    return renamed, gains


def _possible_names(path: list[str], parameter_name: str) -> Iterator[str]:
    """The clean name, and others where two tensors would share it: wrappers beside each other leave equal paths."""
    full = ".".join([*path, parameter_name])
    yield ".".join(path) if parameter_name == "weight" and path else full
    yield full
    yield from (f"{full}.{number}" for number in itertools.count(2))


def _is_norm(module: nn.Module) -> bool:
    # By class name too: most model libraries bring a normalization of their own (RMSNorm of many makes).
    name = type(module).__name__.rstrip("123d")
    return isinstance(module, _NORM_TYPES) or name.endswith("Norm")


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, _EMBEDDING_TYPES) or type(module).__name__.endswith("Embedding")


def check_module(module: Any) -> None:
    """Raise for what is often passed instead of a module: its parameters, or its state dict.

    Raises:
        TypeError: If it is no module.

    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be an nn.Module, got {type(module).__name__}. Pass the module itself.")


def as_patterns(argument: str, patterns: Iterable[str] | str | None) -> list[str] | None:
    """The patterns as a list, so that an iterator can be read more than once.

    Raises:
        MisconfigurationException: If one is no text.

    """
    if patterns is None:
        return None
    listed: list[Any] = [patterns]
    if isinstance(patterns, Iterable) and not isinstance(patterns, (str, Mapping)):
        listed = list(patterns)
    for pattern in listed:
        if not isinstance(pattern, str):
            raise MisconfigurationException(
                f"`{argument}` must hold patterns as strings, got {pattern!r}. Pass names such as 'encoder.*'."
            )
    return listed


def _matching(pattern: str, candidates: list[_Candidate]) -> set[str]:
    return {c.name for c in candidates if any(fnmatchcase(name, pattern) for name in (c.name, *c.types))}


def _matching_or_raise(argument: str, pattern: str, candidates: list[_Candidate]) -> set[str]:
    found = _matching(pattern, candidates)
    if found:
        return found
    names = [c.name for c in sorted(candidates, key=lambda c: not c.by_default)]
    known = [*names, *sorted({kind for c in candidates for kind in c.types} - {"Module"})]
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5) or names[:3]
    hint = f"Similar names: {', '.join(map(repr, near))}." if near else "The module has no layers."
    raise MisconfigurationException(
        f"`{argument}` patterns must match a layer's name or module type, got {pattern!r}, which matches none. {hint}"
    )
