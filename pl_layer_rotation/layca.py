"""Layca: any torch optimizer gives the direction, each layer turns towards it by a set angle."""

import math
import numbers
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation._base_optimizer import BaseOptimizer, check_direction, resolve_base, run_step
from pl_layer_rotation._scratch import Buffers, Item, chunks, combine, stand_ins
from pl_layer_rotation._sharding import local_tensor, shard_count, sum_over_processes

_ParamGroup = dict[str, Any]

_OWN_OPTIONS = ("rotate", "tangential")
_NORM = "initial_norm"
# Bases whose fused kernel takes CPU and CUDA tensors.
_FUSED_DEVICES = frozenset({"cpu", "cuda"})


class Layca(Optimizer):
    r"""Layer-wise control of the amount of weight rotation (Layca, arXiv 1806.01603) on top of any torch optimizer.

    In every step the base optimizer says where to go; each rotating tensor then turns towards it by exactly
    :math:`\arctan(\mathrm{lr})` radians and keeps its initial norm. With :math:`s` the base's step for one layer:

    .. math::
        s \leftarrow s - \frac{s \cdot w}{w \cdot w} w, \quad
        s \leftarrow s \frac{|w|}{|s|}, \quad
        w \leftarrow w - \mathrm{lr}\, s, \quad
        w \leftarrow w \frac{|w_0|}{|w|}

    Tensors with two or more dimensions in groups with ``rotate=True`` rotate. Everything else takes the base's plain
    step with its group's lr: groups with ``rotate=False``, and one-dimensional tensors (biases, gains) anywhere. Use
    :func:`~pl_layer_rotation.layca_optimizers` to get such groups from a module, with embeddings, normalizations and
    layers of zeros on the plain side.

    - A zero or radial step leaves a layer bitwise as it is. A NaN in the gradient reaches the weights, as with torch's
      optimizers.
    - The norm is that at the layer's first step and is kept in the state. Weights that you change by hand later return
      to that norm at the next step.
    - Weight decay has no place in a rotating group: the norm is fixed. An explicit value there is an error; a base's
      default (AdamW's 0.01, or what a function sets) is 0 there.
    - lr and all options live in ``param_groups``, the base's state and ``initial_norm`` in ``state``, keyed by the real
      parameters: schedulers, ``state_dict`` and gradient scalers see an ordinary optimizer.

    In LightningCLI the class is an optimizer like torch's. Options of the base go to the base, as ``init_args`` of its
    class path (Lightning drops ``dict_kwargs`` of an optimizer without a word)::

        optimizer:
          class_path: pl_layer_rotation.Layca
          init_args:
            lr: 0.037
            base:
              class_path: torch.optim.SGD
              init_args: {momentum: 0.9}

    The CLI passes all parameters of the module, two-dimensional embeddings among them, which then rotate. To keep them
    plain, return :func:`~pl_layer_rotation.layca_optimizers` from the module and make its rate a hyperparameter.

    Args:
        params: parameters, named parameters or groups, as for every torch optimizer. Group options: those of the base,
            ``lr``, ``rotate`` and ``tangential``.
        lr: tangent of the angle by which a rotating layer turns in one step; the base's own lr in plain groups that
            bring none. 3⁻³ = 0.037 is 2.12°.
        base: class, name in ``torch.optim``, or function from parameter groups to an optimizer.
        rotate: default of the group option: False gives the base's plain step.
        tangential: default of the group option: False leaves out the projection (the Hyperball update, arXiv
            2606.16899), so that the angle is only about ``lr``.
        **base_options: options of the base, such as ``momentum=0.9``.

    Raises:
        ValueError: If lr is negative, NaN or infinite, a rotating group asks for weight decay, or the base is unknown
            or does not take its direction from gradients alone (schedule-free methods, Prodigy, LBFGS, …).
        TypeError: If the base does not know an option, or is none.
        RuntimeError: At a step, if a rotating tensor is all zeros (it has no direction), or was flattened by FSDP1.

    Example::

        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> optimizer = Layca(layer.parameters(), lr=0.1, base=torch.optim.SGD, momentum=0.9)
        >>> before = layer.weight.detach().clone()
        >>> layer(torch.ones(1, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> cosine = torch.nn.functional.cosine_similarity(before.flatten(), layer.weight.flatten(), dim=0)
        >>> round(math.tan(math.acos(cosine.item())), 4)
        0.1

    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 3**-3,
        base: BaseOptimizer = torch.optim.SGD,
        *,
        rotate: bool = True,
        tangential: bool = True,
        **base_options: Any,
    ) -> None:
        _check_lr(lr)
        make_base = resolve_base(base, base_options)
        if isinstance(params, (Tensor, set)):
            make_base(params)  # raises or warns as torch does
        groups = [dict(entry) if isinstance(entry, dict) else entry for entry in params]
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group in groups:
            members = group["params"]
            group["params"] = members if isinstance(members, (Tensor, set)) else list(members)
            if group.get("rotate", rotate):
                _check_weight_decay({**base_options, **group})
        rotating = next((group for group in groups if group.get("rotate", rotate)), None)
        if rotating is not None:
            check_direction(make_base, _options_of_base(rotating))
        # The base checks its own options and supplies their defaults; then it is emptied and borrows groups and state
        # for the length of each step.
        self._base = make_base([{**_options_of_base(group), "params": group["params"]} for group in groups])
        defaults = {**self._base.defaults, "lr": lr, "rotate": rotate, "tangential": tangential}
        filled = [
            {
                **own,
                "rotate": rotate,
                "tangential": tangential,
                "lr": lr,
                **{k: v for k, v in g.items() if k != "params"},
            }
            for own, g in zip(self._base.param_groups, groups, strict=True)
        ]
        for group in filled:
            if group["rotate"] and "weight_decay" in group:
                group["weight_decay"] = 0.0
        self._scratch: Buffers = {}
        super().__init__(filled, defaults)
        # Some bases make their state at construction (Adagrad). A tensor gets it at its first step: earlier, its entry
        # would tell torch's distributed checkpoints that ours is there too.
        self._early_state: dict[Tensor, dict[str, Any]] = dict(self._base.state)
        self._base.param_groups, self._base.state = [], defaultdict(dict)

    @property
    def base_class(self) -> type[Optimizer]:
        """Class of the base optimizer."""
        return type(self._base)

    def add_param_group(self, param_group: _ParamGroup) -> None:
        """Add a group; options that it lacks take the defaults given at construction.

        Raises:
            ValueError: As torch's optimizers, and for a bad lr or weight decay in a rotating group.

        """
        if isinstance(param_group, dict):
            _check_lr(param_group.get("lr", 0.0))
            if param_group.get("rotate", self.defaults["rotate"]):
                _check_weight_decay(param_group)
                if "weight_decay" in self.defaults:
                    param_group["weight_decay"] = 0.0
        super().add_param_group(param_group)
        if any("name" in group for group in self.param_groups[:-1]):
            # Callbacks that unfreeze layers add groups without a name; loggers tell named ones apart.
            self.param_groups[-1].setdefault("name", f"group{len(self.param_groups) - 1}")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # Tracing loses the gradients that are lent to the stand-ins.
    @torch._disable_dynamo  # type: ignore[attr-defined]  # public `torch.compiler.disable` imports dynamo here and now
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Turn the rotating layers by atan(lr) and step all other tensors as the base does.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            RuntimeError: If a rotating tensor is all zeros, or was flattened by FSDP1.

        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rotating: list[Item] = []
        plain: list[Item] = []
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (rotating if _rotates(parameter, group) else plain).append((index, parameter))
        new_norms = self._new_norms(rotating, plain)
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        changed: dict[int, _ParamGroup] = {}
        if plain:
            changed.update(self._step_base(plain, [parameter for _, parameter in plain], options, new_norms))
        options = [{**group, "lr": 1.0} for group in options]
        for chunk in chunks(rotating):
            views = stand_ins([parameter for _, parameter in chunk], self._scratch)
            changed.update(self._step_base(chunk, views, options, new_norms))
            self._turn(chunk, views)
        for index, group in changed.items():
            self.param_groups[index].update(group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the initial norms keep their precision, which torch casts to that of the weights.

        The state of a plain optimizer of the base's class is taken for the base: our options and rates stay as they
        are, norms are those of the present weights, and a warning says so.

        Raises:
            ValueError: As torch's optimizers, and if the state comes from another base.

        """
        wanted = [k for k, v in self._base.defaults.items() if v is not None and not isinstance(v, bool)]
        for saved in state_dict["param_groups"]:
            missing = [key for key in wanted if key not in saved]
            if missing:
                raise ValueError(
                    f"`state_dict` must come from Layca over {self.base_class.__name__}, got groups without "
                    f"{', '.join(missing)}. Make the optimizer with the base that was saved."
                )
        ours = [{key: g[key] for key in ("name", "lr", *_OWN_OPTIONS) if key in g} for g in self.param_groups]
        plain = ["rotate" not in saved for saved in state_dict["param_groups"]]
        super().load_state_dict(state_dict)
        for group, own, is_plain in zip(self.param_groups, ours, plain, strict=True):
            if is_plain:
                group.update(own)
                if group["rotate"] and "weight_decay" in group:
                    group["weight_decay"] = 0.0
        if any(plain):
            warnings.warn(
                "Layca loaded the state of a plain optimizer: it keeps its own rates and options, and today's norms.",
                stacklevel=2,
            )
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for i, parameter in zip(ids, parameters, strict=True):
            norm = state_dict["state"].get(i, {}).get(_NORM)
            if norm is not None:
                self.state[parameter][_NORM] = norm.detach().to(parameter.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps three fields only; a copy without its base could not step.
        return {
            **super().__getstate__(),
            "_base": (type(self._base), vars(self._base)),
            "_early_state": self._early_state,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_base" in state:
            kind, attributes = state["_base"]
            base = object.__new__(kind)
            vars(base).update(attributes)
            state = {**state, "_base": base, "_scratch": {}}
        super().__setstate__(state)
        for group in self.param_groups:
            for option in _OWN_OPTIONS:
                group.setdefault(option, self.defaults[option])

    def _new_norms(self, rotating: list[Item], plain: list[Item]) -> dict[Tensor, Tensor]:
        """Norms of the tensors that step for the first time.

        Plain tensors get one too: checkpoints of sharded models need an entry for every stepped parameter.
        """
        new = [parameter for _, parameter in [*rotating, *plain] if _NORM not in self.state.get(parameter, ())]
        if not new:
            return {}
        flattened = [parameter for parameter in new if getattr(parameter, "_fsdp_flattened", False)]
        if flattened:
            raise RuntimeError(
                f"`params` must keep their shape, got {', '.join(map(self._describe, flattened[:3]))}, flattened by "
                "FSDP1: a layer cannot be told from a bias. Use ModelParallelStrategy with `fully_shard` (FSDP2)."
            )
        pieces = [local_tensor(parameter) for parameter in new]
        squares = torch.stack([geometry.step_sums(piece, piece, exact=True)[2].cpu().double() for piece in pieces])
        norms = sum_over_processes(squares[:, None], list(map(shard_count, new)), pieces[0].device)[:, 0].sqrt()
        turning = {parameter for _, parameter in rotating}
        zeros = [p for p, norm in zip(new, norms.tolist(), strict=True) if norm == 0 and p in turning]
        if zeros:
            raise RuntimeError(
                f"`params` with `rotate=True` must not be all zeros, got {', '.join(map(self._describe, zeros))}: "
                "a layer of zeros has no direction to turn. Put it into a group with `rotate=False`, as "
                "`layca_optimizers` does, or initialize it."
            )
        return {
            parameter: norm.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32).to_real())
            for parameter, norm in zip(new, norms, strict=True)
        }

    def _describe(self, parameter: Tensor) -> str:
        for index, group in enumerate(self.param_groups):
            for position, member in enumerate(group["params"]):
                if member is parameter:
                    if "param_names" in group:
                        return repr(group["param_names"][position])
                    return f"parameter {position} of group {group.get('name', index)!r} {tuple(parameter.shape)}"
        raise AssertionError("a stepped parameter stands in a group")

    def _step_base(
        self,
        items: list[Item],
        lent: list[Tensor],
        options: list[_ParamGroup],
        new_norms: Mapping[Tensor, Tensor],
    ) -> dict[int, _ParamGroup]:
        """Let the base step the lent tensors with the gradients and the state of the real parameters.

        The base never sees ``initial_norm``: an entry in a tensor's state tells a base that its own are there.

        Returns:
            The group options, by index, that the base changed (some count steps there).

        """
        base = self._base
        groups: dict[int, _ParamGroup] = {}
        state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        for (index, parameter), stand_in in zip(items, lent, strict=True):
            if index not in groups:
                groups[index] = {**options[index], "params": []}
            groups[index]["params"].append(stand_in)
            stand_in.grad = parameter.grad
            entry = self.state[parameter] if parameter in self.state else self._early_state.pop(parameter, {})
            known = {key: value for key, value in entry.items() if key != _NORM}
            if known:
                state[stand_in] = known
        for group in groups.values():
            if self._can_fuse(group, state):
                group["fused"] = True
        base.param_groups, base.state = list(groups.values()), state
        try:
            run_step(base)
        finally:
            base.param_groups, base.state = [], defaultdict(dict)
            for (_, parameter), stand_in in zip(items, lent, strict=True):
                if stand_in is not parameter:
                    stand_in.grad = None
        for (_, parameter), stand_in in zip(items, lent, strict=True):
            norm = new_norms[parameter] if parameter in new_norms else self.state[parameter][_NORM]
            self.state[parameter] = {**state.get(stand_in, {}), _NORM: norm}
        kept = {"params", "lr", "fused"}
        return {index: {k: v for k, v in group.items() if k not in kept} for index, group in groups.items()}

    def _can_fuse(self, group: _ParamGroup, state: Mapping[Tensor, Any]) -> bool:
        """Whether the base's fused kernel, the fastest, can do this step and the user left the choice open."""
        members = group["params"]
        return (
            group.get("fused", True) is None
            and group.get("foreach") is None
            and not group.get("capturable", False)
            and all(
                # Fused SGD knows no sharding strategy.
                not isinstance(p, DTensor)
                and p.is_floating_point()
                and p.device.type in _FUSED_DEVICES
                and p.grad.layout == torch.strided
                # Fused kernels on the CPU pair elements by their place in memory.
                and p.grad.stride() == p.stride()
                for p in members
            )
            # Fused kernels cannot start the state of some tensors while they go on with that of others.
            and len({p in state for p in members}) == 1
        )

    def _turn(self, chunk: list[Item], lent: list[Tensor]) -> None:
        """``w ← a·w - b·s`` for each layer; the lent tensors hold ``-s``."""
        weights = [local_tensor(parameter) for _, parameter in chunk]
        ascents = [local_tensor(stand_in) for stand_in in lent]
        counts = [shard_count(parameter) for _, parameter in chunk]
        whole = torch.tensor([count == 1 for count in counts])
        device = weights[0].device
        rows = [geometry.step_sums(u, w, exact=count > 1) for u, w, count in zip(ascents, weights, counts, strict=True)]
        sums = sum_over_processes(torch.stack(rows).cpu().double(), counts, device)
        tangent = torch.full((len(chunk),), math.nan, dtype=torch.float64)
        for i in (geometry.needs_exact_sums(sums) & whole).nonzero().flatten().tolist():
            sums[i] = geometry.step_sums(ascents[i], weights[i], exact=True).cpu()
            along, _, square = sums[i].tolist()
            if square > 0:
                tangent[i] = geometry.tangential_square(ascents[i], weights[i], along, square)
        sums[:, 0].neg_()
        groups = [self.param_groups[index] for index, _ in chunk]
        a, b = geometry.layca_coefficients(
            sums,
            torch.tensor([float(group["lr"]) for group in groups], dtype=torch.float64),
            torch.stack([self.state[parameter][_NORM] for _, parameter in chunk]).cpu().double(),
            torch.tensor([bool(group["tangential"]) for group in groups]),
            tangent,
        )
        for w, u, scale, factor in zip(weights, ascents, a.tolist(), b.tolist(), strict=True):
            if (scale, factor) != (1.0, 0.0):
                combine(w, u, scale, factor)


def _options_of_base(group: _ParamGroup) -> _ParamGroup:
    return {key: value for key, value in group.items() if key not in ("params", "lr", *_OWN_OPTIONS)}


def _rotates(parameter: Tensor, group: _ParamGroup) -> bool:
    # A single number has no direction: it takes the plain step.
    return bool(group["rotate"]) and parameter.dim() >= 2 and parameter.numel() > 1


def _check_lr(lr: float | Tensor) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not isinstance(lr, (numbers.Real, Tensor)) or not 0 <= float(lr) < math.inf:
        raise ValueError(f"`lr` must be a finite number of at least 0, got {lr!r}. Try 3**-3, an angle of 2.1 degrees.")


def _check_weight_decay(group: Mapping[str, Any]) -> None:
    decay = group.get("weight_decay", 0)
    if decay:
        raise ValueError(
            f"`weight_decay` must be 0 in a rotating group, got {decay!r}: the norm of a rotating layer is fixed. "
            "Set it in a group with `rotate=False` only."
        )
