"""What the benchmarks compare: shapes of networks, optimizers of one kind, and what is known about the machine."""

import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from pytorch_optimizer import LARS, SGDP, AdamP, Lamb
from torch import Tensor, nn

from pl_layer_rotation import Layca

RATE = 3**-5


class Steps(Protocol):
    """What the benchmarks ask of an optimizer."""

    state: Any

    def step(self) -> Any: ...  # noqa: D102


Make = Callable[[list[nn.Parameter]], Steps]


def resnet50() -> list[tuple[int, ...]]:
    """All 161 tensors of ResNet-50 (25.6 M): kernels with the gain and bias of their normalization, classifier."""
    kernels: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            kernels += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                kernels.append((4 * width, inputs, 1, 1))
            inputs = 4 * width
    return [shape for kernel in kernels for shape in (kernel, kernel[:1], kernel[:1])] + [(1000, 2048), (1000,)]


def gpt2_blocks() -> list[tuple[int, ...]]:
    """The 144 tensors of GPT-2's twelve blocks (85.1 M), without embeddings: these take plain steps under Layca."""
    matrices = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    normalizations = [(768,)] * 4
    return [*normalizations, *(shape for matrix in matrices for shape in (matrix, matrix[:1]))] * 12


SHAPES: dict[str, list[tuple[int, ...]]] = {
    "ResNet-50": resnet50(),
    "GPT-2 blocks": gpt2_blocks(),
    "300 x 64x64": [(64, 64)] * 300,
}


def weights(shapes: list[tuple[int, ...]], device: str) -> list[nn.Parameter]:
    """Weights of an ordinary size, with memory for their gradients."""
    made = [nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.zeros_like(parameter)
    return made


class NaiveLayca:
    """The paper's four steps, one tensor at a time, on the difference that the base made."""

    def __init__(self, parameters: list[nn.Parameter], base: type[torch.optim.Optimizer], **options: Any) -> None:
        self.rotating = [parameter for parameter in parameters if parameter.dim() > 1]
        self.norms = [parameter.detach().norm() for parameter in self.rotating]
        self.base = base(parameters, lr=1e-3, weight_decay=0.0, **options)
        self.state = self.base.state

    @torch.no_grad()
    def step(self) -> None:
        """Step the base and turn each tensor."""
        before = [parameter.clone() for parameter in self.rotating]
        self.base.step()
        for parameter, old, norm in zip(self.rotating, before, self.norms, strict=True):
            s = old - parameter
            s = s - (s * old).sum() / (old * old).sum() * old
            s = s * (old.norm() / s.norm())
            new = old - RATE * s
            parameter.copy_(new * (norm / new.norm()))


def contenders(device: str) -> dict[str, dict[str, Make]]:
    """By base: torch's own two forms, Layca over it, and relatives of it that also look at whole layers.

    The relatives (of pytorch-optimizer) run in the form that was faster: tensor by tensor on the CPU, where AdamP took
    12.5 and 23.5 times torch's fused AdamW, LAMB 3.2 and 7.1 times (ResNet-50), as foreach elsewhere.
    """
    foreach = device != "cpu"
    momentum = {"momentum": 0.9}
    adamw, sgd = torch.optim.AdamW, partial(torch.optim.SGD, **momentum)
    return {
        "AdamW": {
            "torch fused": partial(adamw, lr=1e-3, fused=True),
            "torch foreach": partial(adamw, lr=1e-3, foreach=True),
            "Layca": partial(Layca, lr=RATE, base=adamw),
            "naive Layca": partial(NaiveLayca, base=adamw),
            "AdamP": partial(AdamP, lr=1e-3, foreach=foreach),
            "LAMB": partial(Lamb, lr=1e-3, foreach=foreach),
        },
        "SGD momentum": {
            "torch fused": partial(sgd, lr=1e-3, fused=True),
            "torch foreach": partial(sgd, lr=1e-3, foreach=True),
            "Layca": partial(Layca, lr=RATE, base=torch.optim.SGD, **momentum),
            "naive Layca": partial(NaiveLayca, base=torch.optim.SGD, **momentum),
            "SGDP": partial(SGDP, lr=1e-3, foreach=foreach, **momentum),
            "LARS": partial(LARS, lr=1e-3, foreach=foreach, **momentum),
        },
    }


class Evictor:
    """Writes over more memory than the caches hold, so that every contender starts with its own data in none.

    That is also what an optimizer finds after a real backward pass. Without it a contender's time depends on how much
    memory its neighbour before it touched.
    """

    def __init__(self, device: str, megabytes: int = 128) -> None:
        self.memory: Tensor = torch.zeros(megabytes * 2**18, device=device)

    def __call__(self) -> None:
        """Write over the memory."""
        self.memory.add_(1)


def synchronize(device: str) -> None:
    """Wait for what was sent to an accelerator."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def _cpu() -> str:
    try:
        rows = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(row.split(":", 1)[1].strip() for row in rows if row.startswith("model name"))
    except (OSError, StopIteration):  # macOS and Windows have no such file, some ARM kernels no such line
        return platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    """Device, threads and versions, as the result files keep them."""
    return {
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(device),
        "cpu": f"{_cpu()} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "pytorch-optimizer", "pl-layer-rotation")},
        },
    }
