"""Layca: any torch optimizer gives the direction, each layer turns towards it by a set angle."""

import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from pl_layer_rotation._base_optimizer import BaseOptimizer, BorrowedOptimizer, Loan, resolve_base
from pl_layer_rotation._direction_check import check_direction
from pl_layer_rotation._initial_norms import drop_placeholders, new_norms, remember_sharded, zero_norm
from pl_layer_rotation._options import (
    NORM,
    OWN_OPTIONS,
    ParamGroup,
    as_groups,
    check_leading_dims,
    check_lr,
    check_pieces,
    check_switches,
    check_weight_decay,
    drop_weight_decay,
    make_one,
    make_two,
    options_of_base,
    warn_of_rounding,
)
from pl_layer_rotation._saved_state import check_saved, restore_norms
from pl_layer_rotation._scratch import Buffers, Chunk, Plan, plan_key, rotates
from pl_layer_rotation._turning import (
    Turned,
    angles,
    sums_of_sharded_layers,
    turn_sharded_layers,
    turn_whole_layers,
)

_NOT_TAKEN_BACK = frozenset({"params", "lr", "fused"})
_NOT_LENT = frozenset({"params", "name", "param_names", *OWN_OPTIONS})


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
    step with its group's lr: groups with ``rotate=False``, one-dimensional tensors (biases, gains) and tensors of one
    element anywhere. Use :func:`~pl_layer_rotation.layca_optimizers` to get such groups from a module, with embeddings,
    normalizations and layers of zeros on the plain side: here only the number of dimensions tells a layer from other
    tensors.

    - A zero or radial step leaves a layer bitwise as it is; after momentum has built up, a zero gradient still turns
      it. A NaN in the gradient reaches the weights, as with torch's optimizers.
    - A complex layer turns as the real vector of its parts.
    - The norm is that at the layer's first step and is kept in the state. Weights that you change by hand later return
      to that norm at the next step (a change through ``.data`` of few elements of a large layer: within some dozens).
    - The scale of the loss has no effect over bases that follow it (SGD), and gradient clipping only changes how much
      each step weighs in their momentum.
    - Weight decay has no place in a rotating group: the norm is fixed. An explicit value there is an error; a base's
      default (AdamW's 0.01, or what a function sets) is 0 there. Plain groups keep it.
    - A base steps zeros in the place of the weights. One that scales its step by the norm of the weights (LAMB, torch's
      Adafactor) loses that scale, which the angle replaces; one whose direction depends on them (LARS, Nero,
      schedule-free methods, Prodigy, D-Adaptation) is refused. ASGD's average ``ax`` says nothing about the weights.
    - A base that takes no sparse gradients raises before anything moves. No random numbers are drawn; equal runs are
      bitwise equal.
    - Weights in bfloat16 cannot follow small angles: at lr 1e-3 rounding leaves half of the motion. The first step
      below 3e-3 warns.
    - Shapes are looked at in :meth:`step` only: modules may be lazy or on the meta device before.
    - Sharded tensors (FSDP2, tensor parallelism, both, and FSDP1 with ``use_orig_params=True``) turn as one: a step
      takes one collective for all of them, none where each process holds whole tensors.
    - On an accelerator no step after the first waits for the device. Products are taken in fp32 there, so that a step
      of which less than a thousandth is tangential counts as radial; on the CPU and for shards it is a millionth.
    - lr and all options live in ``param_groups``, the base's state and ``initial_norm`` in ``state``, keyed by the real
      parameters: schedulers, ``state_dict`` and gradient scalers see an ordinary optimizer. As with torch's SGD, a full
      distributed state cannot carry SGD without momentum.

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
            ``lr``, ``rotate``, ``tangential`` and ``leading_dims``.
        lr: tangent of the angle by which a rotating layer turns in one step; the base's own lr in plain groups that
            bring none. The default, 3⁻³ = 0.037 or 2.12°, was better over SGD than 3⁻⁴ and 3⁻⁵ in all five tasks of
            arXiv 1806.01603, which took 3⁻⁵ over Adam.
        base: class, name in ``torch.optim``, or function from parameter groups to an optimizer. The default is plain
            SGD, the base of the paper's main study.
        plain_base: what steps everything that does not rotate, with its own defaults (pass a function for other
            options); None: the base. For bases that take matrices only: ``base="Muon", plain_base="AdamW"``.
        rotate: default of the group option: False gives the base's plain step.
        tangential: default of the group option: False leaves out the projection (the Hyperball update, arXiv
            2606.16899; over Muon it is MuonH), so that the angle is only about ``lr``.
        leading_dims: default of the group option: so many leading dimensions count separate layers, each of which turns
            by the angle and keeps its own norm: 1 for stacked experts ``(E, out, in)`` or a fused projection
            ``(3, out, in)``, and for a turn of each neuron of a matrix. The base sees the whole tensor.
        **base_options: options of the base, such as ``momentum=0.9``.

    Raises:
        ValueError: If lr is negative, NaN or infinite, a rotating group asks for weight decay, or the base is unknown
            or does not take its direction from gradients alone (schedule-free methods, Prodigy, LBFGS, …), or
            ``leading_dims`` leaves a tensor no dimension.
        TypeError: If the base does not know an option, or is none.
        RuntimeError: At a step, if a rotating tensor is all zeros (it has no direction), or was flattened by FSDP1
            and no selection of layers has seen its wrapper.

    Example::

        >>> import math
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
        plain_base: BaseOptimizer | None = None,
        rotate: bool = True,
        tangential: bool = True,
        leading_dims: int = 0,
        **base_options: Any,
    ) -> None:
        check_lr(lr)
        make_base = resolve_base(base, base_options)
        make_plain = make_base if plain_base is None else resolve_base(plain_base, {}, "plain_base")
        if isinstance(params, (Tensor, set)):
            make_base(params)  # raises or warns as torch does
        own = {"rotate": rotate, "tangential": tangential, "leading_dims": leading_dims}
        groups = as_groups(params, own, base_options)
        rotating = next((group for group in groups if group["rotate"]), None)
        if rotating is not None:
            check_direction(make_base, options_of_base(rotating))
        # The bases check their own options and supply their defaults; then they are emptied.
        if plain_base is None:
            made, options = make_one(make_base, groups)
            self._base = self._plain_base = BorrowedOptimizer(made, NORM)
        else:
            made, made_plain, options = make_two(make_base, make_plain, groups)
            self._base, self._plain_base = BorrowedOptimizer(made, NORM), BorrowedOptimizer(made_plain, NORM)
        defaults = {**self._base.optimizer.defaults, "lr": lr, **own}
        filled = [
            {**filled_in, "lr": lr, **{key: value for key, value in group.items() if key != "params"}}
            for filled_in, group in zip(options, groups, strict=True)
        ]
        for group in filled:
            drop_weight_decay(group)
        self._scratch: Buffers = {}
        self._plan: Plan | None = None
        self._turned: list[Turned] = []
        self._unread: list[Turned] = []  # the same for the monitor: what another reader took, it must not miss
        self._told_resolution = False
        super().__init__(filled, defaults)

    @property
    def base_class(self) -> type[Optimizer]:
        """Class of the base optimizer."""
        return type(self._base.optimizer)

    @property
    def plain_base_class(self) -> type[Optimizer]:
        """Class of the optimizer that steps what does not rotate; the base's own without ``plain_base``."""
        return type(self._plain_base.optimizer)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group; options that it lacks take the defaults given at construction.

        Shapes alone decide what rotates in it: a two-dimensional embedding does.

        Raises:
            ValueError: As torch's optimizers, and for a bad lr, leading_dims or weight decay in a rotating group.

        """
        if isinstance(param_group, dict):
            check_lr(param_group.get("lr", 0.0))
            check_switches(param_group)
            check_leading_dims({**self.defaults, **param_group})
            if param_group.get("rotate", self.defaults["rotate"]):
                check_weight_decay(param_group)
            else:
                for key, value in options_of_base(self._plain_base.optimizer.defaults).items():
                    param_group.setdefault(key, value)
        super().add_param_group(param_group)
        drop_weight_decay(self.param_groups[-1])
        if any("name" in group for group in self.param_groups[:-1]):
            # Callbacks that unfreeze layers add groups without a name; loggers tell named ones apart.
            taken = {group.get("name") for group in self.param_groups}
            free = (f"group{number}" for number in itertools.count(len(self.param_groups) - 1))
            self.param_groups[-1].setdefault("name", next(name for name in free if name not in taken))

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
        # Tensors keep their memory from step to step; what follows from that alone is worked out once.
        if self._plan is None or self._plan.key != plan_key(self.param_groups):
            plan = Plan(self.param_groups, self._scratch)
            check_pieces(plan.plain, plan.rotating, self.param_groups, self._describe)
            drop_placeholders(plan, self.state)
            self._plan = plan
        plan = self._plan
        self._turned = self._unread = []
        if plan.bfloat16 and not self._told_resolution:
            self._told_resolution = warn_of_rounding([self.param_groups[index] for index in plan.bfloat16])
        norms = new_norms(plan, self.state, self._describe) if len(self.state) != plan.known else {}
        plain_options = [_lent_options(group) for group in self.param_groups]
        options = [{**group, "lr": 1.0} for group in plain_options]
        changed: dict[int, ParamGroup] = {}
        if plan.sharded is not None:
            changed.update(self._step_sharded(plan.sharded, options))
        if self._plain_base is not self._base:
            plain_options = [self._plain_options(group) for group in self.param_groups]
        for loan, chunk in plan.calls:
            if chunk is None:
                edited, _ = self._plain_base.step(loan, plain_options, self.state, norms)
            else:
                groups = self._groups_of(chunk)
                momentum = self._base.step_momentum(loan, groups, self.state)
                if momentum is not None:
                    edited, kept = {}, [self.state[parameter][NORM] for parameter in loan.parameters]
                    chunk.follow(momentum, -1)
                else:
                    clear = self._base.clears and chunk.is_finite()
                    chunk.lend(clear=not clear)
                    edited, kept = self._base.step(loan, options, self.state, norms, clear=clear)
                    chunk.follow(chunk.lent, 1)
                self._turned.append(turn_whole_layers(chunk, kept, groups))
            changed.update(edited)
        plan.known = len(self.state)
        for index, group in changed.items():
            self.param_groups[index].update({key: value for key, value in group.items() if key not in _NOT_TAKEN_BACK})
        return loss

    def take_angles(self) -> tuple[list[Tensor], Tensor]:
        """The rotating tensors of the last step and the angles that it turned them by; a second call finds none.

        On an accelerator this does not wait for the step. Tensors whose angle is not exactly that of their rate are
        left out: half-precision weights (rounding), ``leading_dims``, ``tangential=False``.

        Returns:
            Tensors, and a vector with the angle of each in radians: ``atan(lr)``, or 0 where the step was zero or
            radial. None at all after a step that did not happen.

        Example::

            >>> weight = torch.nn.Parameter(torch.eye(2))
            >>> optimizer = Layca([weight], lr=0.1)
            >>> weight.grad = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
            >>> optimizer.step()
            >>> optimizer.take_angles()[1]
            tensor([0.0997], dtype=torch.float64)

        """
        turned, self._turned = self._turned, []
        return angles(turned)

    def _angles_for_the_monitor(self) -> tuple[list[Tensor], Tensor]:
        turned, self._unread = self._unread, []
        return angles(turned)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the initial norms keep their precision, which torch casts to that of the weights.

        The state of a plain optimizer of the base's class is taken for the base: our options and rates stay as they
        are, norms are those of the present weights, and a warning says so.

        Raises:
            ValueError: As torch's optimizers, and if the state comes from another base or other tensors.

        """
        check_saved(state_dict, self.param_groups, self._base_of, self._describe)
        ours = [{key: g[key] for key in ("name", "lr", *OWN_OPTIONS) if key in g} for g in self.param_groups]
        plain = ["rotate" not in saved for saved in state_dict["param_groups"]]
        super().load_state_dict(state_dict)
        self._plan = None
        for group, own, is_plain in zip(self.param_groups, ours, plain, strict=True):
            if is_plain:
                group.update(own)
                drop_weight_decay(group)
        if any(plain):
            warnings.warn(
                "Layca loaded the state of a plain optimizer: it keeps its own rates and options, and today's norms.",
                stacklevel=2,
            )
        restore_norms(state_dict, self.param_groups, self.state)

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps three fields only; a copy without its base could not step.
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in ("_base", "_plain_base", "_told_resolution")},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch calls this with groups and state alone when it loads a checkpoint.
        self._scratch, self._plan, self._turned, self._unread = {}, None, [], []
        for group in self.param_groups:
            for option in OWN_OPTIONS:
                group.setdefault(option, self.defaults[option])
        # The bases know what older checkpoints lack, and that a count of steps was a number once.
        turning = {p for group in self.param_groups for p in group["params"] if p in self.state and rotates(p, group)}
        for base, turns in ((self._base, True), (self._plain_base, False)):
            groups = [group for group in self.param_groups if bool(group["rotate"]) is turns]
            base.fill_in(groups, {p: entry for p, entry in self.state.items() if (p in turning) is turns})

    def _base_of(self, turns: bool) -> BorrowedOptimizer:
        return self._base if turns else self._plain_base

    def _describe(self, parameter: Tensor) -> str:
        for index, group in enumerate(self.param_groups):
            for position, member in enumerate(group["params"]):
                if member is parameter:
                    if "param_names" in group:
                        return repr(group["param_names"][position])
                    return f"parameter {position} of group {group.get('name', index)!r} {tuple(parameter.shape)}"
        raise AssertionError("a stepped parameter stands in a group")

    def _plain_options(self, group: ParamGroup) -> ParamGroup:
        """Options of a plain step; one-dimensional tensors in a rotating group take ``plain_base``'s defaults."""
        own = self._plain_base.optimizer.defaults if group["rotate"] else group
        return _lent_options({**own, "lr": group["lr"]})

    def _step_sharded(self, chunk: Chunk, options: list[ParamGroup]) -> dict[int, ParamGroup]:
        """Step the tensors of which this process holds pieces: one collective for all of them.

        Every process takes part, also one without a gradient: its pieces keep their share of the layer's norm.
        """
        chunk.lend(clear=True)
        stepped = [position for position, (_, parameter) in enumerate(chunk.items) if parameter.grad is not None]
        loan = Loan([chunk.items[position] for position in stepped], [chunk.lent[position] for position in stepped])
        new = [parameter for parameter in loan.parameters if NORM not in self.state.get(parameter, ())]
        changed = self._base.step(loan, options, self.state, {p: zero_norm(p) for p in new})[0] if stepped else {}
        sums = sums_of_sharded_layers(chunk)
        remember_sharded(chunk, new, sums[:, 2].sqrt(), self.state, self._describe)
        # Without a gradient here, and one elsewhere, a layer may have no state here: its norm is today's.
        norms = [self.state[p][NORM] if p in self.state else None for _, p in chunk.items]
        self._turned.append(turn_sharded_layers(chunk, sums, norms, self._groups_of(chunk)))
        return changed

    def _groups_of(self, chunk: Chunk) -> list[ParamGroup]:
        return [self.param_groups[index] for index, _ in chunk.items]


def _lent_options(group: ParamGroup) -> ParamGroup:
    """What a base sees of a group; without the name, so that groups of one setting are stepped as one."""
    return {key: value for key, value in group.items() if key not in _NOT_LENT}
