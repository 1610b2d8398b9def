"""One optimizer step of Layca in units of torch's fused step: `uv run benchmarks/optimizer.py`.

All contenders step the same shapes in one process, in turns, on one thread; figures are medians of the rounds. Only the
ratios mean anything on a shared machine.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pl_layer_rotation import Layca

Step = Callable[[], Any]


def resnet50() -> list[tuple[int, ...]]:
    """Kernels of ResNet-50: stem, bottleneck blocks with their shortcuts, classifier."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, inputs, 1, 1))
            inputs = 4 * width
    return [*shapes, (1000, 2048)]


SHAPES: dict[str, list[tuple[int, ...]]] = {
    "ResNet-50": resnet50(),
    "GPT-2 blocks": [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12,
    "300 x 64x64": [(64, 64)] * 300,
}
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {}),
    "SGD momentum": (torch.optim.SGD, {"momentum": 0.9}),
}


def tensors(shapes: list[tuple[int, ...]], device: str) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
    for tensor in made:
        tensor.grad = torch.randn_like(tensor)
    return made


def naive_layca(parameters: list[nn.Parameter], base: type[torch.optim.Optimizer], options: dict[str, Any]) -> Step:
    """The paper's four steps, one tensor at a time, on the difference that the base made."""
    norms = [parameter.detach().norm() for parameter in parameters]
    optimizer = base(parameters, lr=1e-3, weight_decay=0.0, **options)

    @torch.no_grad()
    def step() -> None:
        before = [parameter.clone() for parameter in parameters]
        optimizer.step()
        for parameter, old, norm in zip(parameters, before, norms, strict=True):
            s = old - parameter
            s = s - (s * old).sum() / (old * old).sum() * old
            s = s * (old.norm() / s.norm())
            new = old - 3**-5 * s
            parameter.copy_(new * (norm / new.norm()))

    return step


def contenders(shapes: list[tuple[int, ...]], base: str, device: str) -> dict[str, Step]:
    kind, options = BASES[base]
    return {
        "torch fused": kind(tensors(shapes, device), lr=1e-3, fused=True, **options).step,
        "torch foreach": kind(tensors(shapes, device), lr=1e-3, foreach=True, **options).step,
        "Layca": Layca(tensors(shapes, device), lr=3**-5, base=kind, **options).step,
        "naive Layca": naive_layca(tensors(shapes, device), kind, options),
    }


def measure(steps: dict[str, Step], rounds: int, device: str) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {name: round(value / medians["torch fused"], 2) for name, value in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time of Layca in units of torch's fused step.")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    for base in BASES:
        for shapes in SHAPES:
            row = measure(contenders(SHAPES[shapes], base, arguments.device), arguments.rounds, arguments.device)
            ratios.setdefault(base, {})[shapes] = row
            print(f"{base:13} {shapes:13}", "  ".join(f"{name} {ratio:.2f}" for name, ratio in row.items()), flush=True)
    if arguments.output:
        machine = platform.machine() if arguments.device == "cpu" else torch.cuda.get_device_name()
        result = {
            "command": f"benchmarks/optimizer.py --rounds {arguments.rounds} --device {arguments.device}",
            "unit": "torch's fused step of the same base",
            "device": f"{machine}, 1 thread",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "ratios": ratios,
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
