"""The optimizer that gives Layca its direction: found by name, its options checked, stepped on what is lent to it."""

import difflib
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pl_layer_rotation import _geometry as geometry

# What fused kernels take. On the CPU not half precision: torch 2.6's fused SGD leaves most of such weights alone.
_WIDE = (torch.float32, torch.float64)
_FUSED_KINDS = frozenset(
    [*(("cpu", dtype) for dtype in _WIDE), *(("cuda", dtype) for dtype in (*_WIDE, torch.float16, torch.bfloat16))]
)
# Elements of a tensor from which on a call for it alone costs less than what it saves.
_LARGE = 1 << 14
# Whether an accelerator captures a graph: the name until torch 2.9, and since.
_CAPTURE_CHECKS = ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check")


def _nothing() -> None:
    """Take the place of a check that has nothing to check on the CPU."""


_NO_CAPTURE_CHECKS = dict.fromkeys(_CAPTURE_CHECKS, _nothing)


class UnknownOptionError(TypeError):
    """An option that the base does not have.

    Attributes:
        option: its name.

    """

    def __init__(self, message: str, option: str = "") -> None:
        super().__init__(message)
        self.option = option


BaseOptimizer = type[Optimizer] | str | Callable[[Iterable[Any]], Optimizer]


def resolve_base(base: BaseOptimizer, options: Mapping[str, Any], argument: str = "base") -> Callable[[Any], Optimizer]:
    """A function from groups to the base optimizer, its options checked by name."""
    if isinstance(base, str):
        names = [name for name, kind in vars(torch.optim).items() if inspect.isclass(kind) and kind is not Optimizer]
        if base not in names:
            same = [name for name in names if name.lower() == base.lower()]
            near = same or difflib.get_close_matches(base, names, n=3, cutoff=0.4) or ["SGD", "AdamW"]
            raise ValueError(
                f"`{argument}` must name an optimizer of torch.optim, got {base!r}. Similar names: "
                f"{', '.join(map(repr, near))}."
            )
        base = getattr(torch.optim, base)
    if not callable(base):
        raise TypeError(
            f"`{argument}` must be an optimizer class, its name or a function from parameters to an optimizer, "
            f"got {base!r}. Pass for instance `torch.optim.AdamW`."
        )
    name = getattr(base, "__name__", repr(base))
    accepted = inspect.signature(base).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values()):
        for option, value in options.items():
            if option not in accepted:
                own = [known for known in accepted if known not in ("params", "lr")]
                raise UnknownOptionError(
                    f"`{option}` must be an option of the base optimizer {name}, got {option}={value!r}. "
                    f"Its options are {', '.join(own)}.",
                    option,
                )
    for option, value in options.items():
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"`{option}` must be a number, got {value!r}. Leave it out for the default of {name}.")
    if options.get("differentiable"):
        raise ValueError("`differentiable` must be False, got True. Layca changes the weights in place.")
    required: dict[str, Any] = (
        {"lr": 1.0} if "lr" in accepted and accepted["lr"].default is inspect.Parameter.empty else {}
    )

    def make(params: Any) -> Optimizer:
        made = base(params, **required, **options)
        if not isinstance(made, Optimizer):
            raise TypeError(
                f"`{argument}` must make a torch optimizer, got {made!r} from {name}. Return the optimizer."
            )
        return made

    return make


class Loan:
    """What is stepped in the place of which parameters, and all that follows from it and the kind of the gradients.

    Args:
        items: param group's index and parameter.
        lent: what is stepped in the place of each parameter; may be the parameter itself.

    Attributes:
        has_sparse: whether a gradient is sparse.
        can_fuse: whether fused kernels take these tensors, which have no gaps in memory, and the gradients lie there as
            the lent tensors do: such kernels pair elements by their place.
        is_large: whether a call for each tensor is worth its while.

    """

    def __init__(self, items: Sequence[tuple[int, Tensor]], lent: Sequence[Tensor]) -> None:
        self.parameters = [parameter for _, parameter in items]
        self.lent = list(lent)
        self.members: dict[int, list[Tensor]] = {}
        for (index, _), stand_in in zip(items, lent, strict=True):
            self.members.setdefault(index, []).append(stand_in)
        self.on_host = all(tensor.device.type == "cpu" for tensor in lent)
        self.is_large = sum(tensor.numel() for tensor in lent) >= _LARGE * len(lent)
        gradients = [parameter.grad for parameter in self.parameters]
        self.has_sparse = any(grad is not None and grad.layout is not torch.strided for grad in gradients)
        self.can_fuse = not self.has_sparse and all(
            # Fused SGD knows no sharding strategy.
            not isinstance(tensor, DTensor)
            and (tensor.device.type, tensor.dtype) in _FUSED_KINDS
            and geometry.flat_view(tensor) is not None
            and (grad is None or grad.stride() == tensor.stride())
            for tensor, grad in zip(lent, gradients, strict=True)
        )
        self._state_fits: bool | None = None

    def can_fuse_with(self, state: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Whether also the state of the lent tensors lies in memory as they do.

        It does not where weights changed their memory format since the state was made. Looked at once: what a step
        makes has the layout of the lent tensors, or of gradients that lie as they do.
        """
        if not self.can_fuse:
            return False
        if self._state_fits is None:
            self._state_fits = all(
                _lie_alike(value, tensor)
                for tensor, entry in state.items()
                for value in entry.values()
                if isinstance(value, Tensor) and value.dim() > 0
            )
        return self._state_fits


class BorrowedOptimizer:
    """An optimizer that owns nothing: groups and state are lent to it for the length of a step.

    Args:
        optimizer: made on the real groups, so that it has checked its options; it is emptied.
        hidden: key of the state that it must not see. An entry tells an optimizer that its own are there too.

    Attributes:
        clears: whether it can step from zero what is not zero.

    """

    def __init__(self, optimizer: Optimizer, hidden: str) -> None:
        self.optimizer = optimizer
        self.hidden = hidden
        # With a rate and a decay of 1 AdamW takes its step from zero wherever it stands: p - 1·1·p. Its subclasses may
        # use the decay otherwise.
        self.clears = type(optimizer) is torch.optim.AdamW
        # Some make their state at construction (Adagrad). A tensor gets it at its first step: earlier, its entry would
        # tell torch's distributed checkpoints that ours is there too.
        self.early_state: dict[Tensor, dict[str, Any]] = dict(optimizer.state)
        self._empty()

    def step(
        self,
        loan: Loan,
        options: Sequence[Mapping[str, Any]],
        state: MutableMapping[Tensor, dict[str, Any]],
        values: Mapping[Tensor, Tensor],
        *,
        clear: bool = False,
    ) -> tuple[dict[int, dict[str, Any]], list[Tensor]]:
        """Step the lent tensors with the gradients and the state of the real parameters.

        Args:
            loan: who stands in for whom.
            options: options of the param groups.
            state: the real state.
            values: hidden values for parameters whose state starts with this step.
            clear: step from zero whatever finite numbers the lent tensors hold. Only where :attr:`clears` says that
                the optimizer can, at a rate of 1.

        Returns:
            The groups as the optimizer left them (some count steps there), by index, and the hidden values.

        """
        known: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        entries: list[dict[str, Any]] = []
        hidden: list[Tensor | None] = []
        for parameter, stand_in in zip(loan.parameters, loan.lent, strict=True):
            if stand_in is not parameter:
                stand_in.grad = parameter.grad
            entry = state.get(parameter)
            if entry is None:
                entry = self.early_state.pop(parameter, {})
            entries.append(entry)
            hidden.append(entry.pop(self.hidden, None))
            if entry:
                known[stand_in] = entry
        # Fused kernels cannot start the state of some tensors while they go on with that of others.
        fuse = len(known) in (0, len(entries)) and loan.can_fuse_with(known)
        groups = self._groups(loan, options, fuse)
        if clear:
            for group in groups.values():
                group["weight_decay"] = 1.0
        self.optimizer.param_groups = list({id(group): group for group in groups.values()}.values())
        self.optimizer.state = known
        if loan.on_host:
            # torch looks for an accelerator before each step of some optimizers: once a chunk, that adds up.
            vars(self.optimizer).update(_NO_CAPTURE_CHECKS)
        stepped = False
        try:
            run_step(self.optimizer)
            stepped = True
        finally:
            self._empty()
            for place, (parameter, stand_in) in enumerate(zip(loan.parameters, loan.lent, strict=True)):
                if stand_in is not parameter:
                    stand_in.grad = None
                value = hidden[place]
                made = known.get(stand_in, entries[place])
                if stepped and (value is None or made is not entries[place]):
                    # Some remember nothing at first: SGD before its momentum is switched on.
                    entries[place] = state[parameter] = made
                    value = hidden[place] = values[parameter] if value is None else value
                if value is not None:
                    entries[place][self.hidden] = value
                elif entries[place]:
                    self.early_state[parameter] = entries[place]
        if clear:
            for index, group in groups.items():
                group["weight_decay"] = options[index]["weight_decay"]
        return groups, [value for value in hidden if value is not None]

    def step_momentum(
        self, loan: Loan, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]
    ) -> list[Tensor] | None:
        """Step SGD's momentum, which is all of its step, in one pass on the CPU and without stand-ins.

        Args:
            loan: whose momentum.
            groups: the param group of each tensor.
            state: the real state.

        Returns:
            What SGD subtracts at a rate of 1, or None where :meth:`step` must serve: other optimizers and devices,
            Nesterov's step, the first step here; and small tensors, of which it takes many in one call.

        """
        if type(self.optimizer) is not torch.optim.SGD or not (loan.on_host and loan.can_fuse and loan.is_large):
            return None
        passes: list[tuple[Tensor, Tensor]] = []
        buffers: list[Tensor] = []
        for parameter, group in zip(loan.parameters, groups, strict=True):
            entry = state.get(parameter, {})
            buffer = entry.get("momentum_buffer")
            if buffer is None or self.hidden not in entry or not group["momentum"] or group["nesterov"]:
                return None
            assert parameter.grad is not None
            pair = [geometry.flat_view(tensor) for tensor in (buffer, parameter.grad)]
            if pair[0] is None or pair[1] is None or buffer.stride() != parameter.grad.stride():
                return None
            passes.append((pair[0], pair[1]))
            buffers.append(buffer)
        one = torch.ones(1, dtype=passes[0][0].dtype)
        for (buffer, gradient), group in zip(passes, groups, strict=True):
            weight = 1 - group["dampening"]
            geometry.scale_and_add(buffer, group["momentum"], gradient, -weight if group["maximize"] else weight, one)
        return buffers

    def fill_in(self, groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> None:
        """What older checkpoints lack or write otherwise, in place, as the optimizer's class reads it."""
        entries = {
            parameter: {k: v for k, v in entry.items() if k != self.hidden} for parameter, entry in state.items()
        }
        entries = {parameter: entry for parameter, entry in entries.items() if entry}
        try:
            self.optimizer.__setstate__({"param_groups": groups, "state": entries})
        finally:
            self._empty()
        for parameter, entry in entries.items():
            state[parameter].update(entry)

    def state_keys(self, options: Mapping[str, Any]) -> set[str]:
        """What the optimizer remembers of a tensor after a step with these options; nothing where it cannot step."""
        trial = object.__new__(type(self.optimizer))
        vars(trial).update(vars(self.optimizer))
        tensor = nn.Parameter(torch.ones(2, 2))
        tensor.grad = torch.ones(2, 2)
        trial.param_groups, trial.state = [{**options, "params": [tensor]}], defaultdict(dict)
        try:
            with torch.no_grad():
                run_step(trial)
        except Exception:
            return set()
        return set(trial.state[tensor])

    def _groups(self, loan: Loan, options: Sequence[Mapping[str, Any]], fuse: bool) -> dict[int, dict[str, Any]]:
        groups: dict[int, dict[str, Any]] = {}
        latest: Mapping[str, Any] | None = None
        shared: dict[str, Any] = {}
        for index, members in loan.members.items():
            # Layers with rates of their own are alike to the base: one call of its kernel serves them all.
            if latest is None or not _alike(latest, options[index]):
                latest, shared = options[index], {**options[index], "params": []}
                if fuse and shared.get("fused", 0) is None and shared.get("foreach") is None:
                    shared["fused"] = not shared.get("capturable", False) or None
            shared["params"] += members
            groups[index] = shared
        return groups

    def _empty(self) -> None:
        self.optimizer.param_groups, self.optimizer.state = [], defaultdict(dict)
        for name in _CAPTURE_CHECKS:
            vars(self.optimizer).pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        # torch's optimizers give up all but three fields when they are copied.
        return {**vars(self), "optimizer": (type(self.optimizer), dict(vars(self.optimizer)))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kind, attributes = state["optimizer"]
        optimizer = object.__new__(kind)
        vars(optimizer).update(attributes)
        vars(self).update({**state, "optimizer": optimizer})


def _lie_alike(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike; the stride of a dimension of one element says nothing."""
    return first.layout is torch.strided and all(
        size < 2 or one == other
        for size, one, other in zip(second.shape, first.stride(), second.stride(), strict=False)
    )


def _alike(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two groups can be stepped as one: tensors must be the same objects."""
    return first.keys() == second.keys() and all(
        value is second[key]
        or not (isinstance(value, Tensor) or isinstance(second[key], Tensor) or value != second[key])
        for key, value in first.items()
    )


def run_step(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> None:
    """The optimizer's step as its class wrote it, without hooks: global step hooks must see Layca's step only.

    Gradients must be off, unless there is a closure.
    """
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    if closure:
        step(optimizer, closure)
        return
    if type(optimizer).__module__.startswith("torch.optim."):
        # torch's own wrapper, which turns gradients off, too: once a chunk, it adds up.
        step = getattr(step, "__wrapped__", step)
    step(optimizer)
