"""Lightning's FSDPStrategy (FSDP1), which it offers for GPUs only, on the CPU."""

from typing import Any
from unittest import mock

import torch
from pytorch_lightning.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, _optim_utils
from torch.distributed.tensor import init_device_mesh
from torch.optim import Optimizer

# FSDP1 is deprecated, and so is what torch itself and Lightning do for its checkpoints.
DEPRECATIONS = (
    "ignore::FutureWarning:torch.distributed",
    "ignore:The `NO_SHARD` sharding strategy is deprecated:FutureWarning",
    "ignore:When using ``NO_SHARD``:UserWarning",
    "ignore:`_get_pg_default_device` will be deprecated:UserWarning",
    "ignore:Multiple backends are registered with this ProcessGroup:UserWarning",
)


class CPUFSDPStrategy(FSDPStrategy):
    """The same with the CPU for its device, and with what a CPU needs."""

    def setup_environment(self) -> None:
        # Lightning makes a mesh of GPUs out of sizes.
        sizes = self.kwargs.pop("device_mesh", None)
        super().setup_environment()
        if sizes is not None:
            self.kwargs["device_mesh"] = init_device_mesh("cpu", sizes)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        device = torch.device("cpu")
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=device, **self.kwargs
        )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """All states, each in memory of its own.

        torch gathers the states of a parameter in one buffer, one after the other, and relies on the copy that
        ``.cpu()`` makes of a tensor on a GPU: on the CPU ``exp_avg`` would come out as ``exp_avg_sq``.
        """
        unflatten = _optim_utils._unflatten_orig_param_states

        def with_copies(*arguments: Any) -> None:
            unflatten(*arguments[:-1], False)

        with mock.patch.object(_optim_utils, "_unflatten_orig_param_states", with_copies):
            return super().optimizer_state(optimizer)
