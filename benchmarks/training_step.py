"""What the optimizer adds to a whole training step: forward, backward, step.

    uv run --no-dev --group benchmarks benchmarks/training_step.py

Workloads: torchvision's ResNet-18 (11.2 M parameters) on 128 images of 32×32, as it is and with the stem that is usual
for such small images (3×3 kernel, stride 1, no max pooling: fifteen times the arithmetic); and a GPT of 10.8 M
parameters (six blocks of width 384 with six heads, 65 characters, context 256, tied head), batch 8.

A step of the optimizer is about a hundredth of a training step, far below what two whole steps differ by anyway on a
shared machine. So the parts are timed apart, in one process on one thread: in each round every contender in turn, on a
model of its own, goes forward and backward (the same new data for all in that round) and then, with these gradients and
with the caches as backward left them, steps. With F the median time of forward and backward in a round (the same work
for all contenders) and T that of a step, the overhead in that round is (T - T of fused AdamW) / (F + T of fused AdamW);
the figure is its median over the rounds, after two rounds of warm-up. Ten rounds take about five minutes.
"""

import argparse
import copy
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import RATE, contenders, machine, synchronize
from torch import Tensor, nn
from torchvision.models import resnet18

from pl_layer_rotation import layca_optimizers

FUSED, LAYCA = "AdamW fused", "Layca over AdamW"
CONTENDERS = {FUSED: "torch fused", "AdamW foreach": "torch foreach", LAYCA: "Layca", "AdamP": "AdamP", "LAMB": "LAMB"}
WARM_UP = 2


class Block(nn.Module):
    """Attention and MLP with normalization before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A character model as small as a laptop trains."""

    def __init__(
        self, vocabulary: int = 65, context: int = 256, width: int = 384, depth: int = 6, heads: int = 6
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:  # noqa: D102
        x = self.tokens(tokens) + self.positions.weight
        return nn.functional.linear(self.norm(self.blocks(x)), self.tokens.weight).flatten(0, 1)


def small_resnet18() -> nn.Module:
    model = resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(128, 3, 32, 32), torch.randint(10, (128,))


def text() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(65, (8, 257))
    return tokens[:, :-1], tokens[:, 1:].flatten()


WORKLOADS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "ResNet-18": (lambda: resnet18(num_classes=10), images),
    "ResNet-18, 3x3 stem": (small_resnet18, images),
    "GPT 10.8 M": (GPT, text),
}


def measure(workload: str, rounds: int, device: str) -> dict[str, Any]:
    make_model, make_data = WORKLOADS[workload]
    torch.manual_seed(0)
    model = make_model().to(device)
    makes = contenders(device)["AdamW"]
    models = {name: copy.deepcopy(model) for name in CONTENDERS}
    optimizers = {name: makes[kind](list(models[name].parameters())) for name, kind in CONTENDERS.items()}
    # As users have it: embeddings take plain steps too.
    optimizers[LAYCA] = layca_optimizers(models[LAYCA], lr=RATE, base=torch.optim.AdamW)["optimizer"]
    passes: list[float] = []
    steps: dict[str, list[float]] = {name: [] for name in models}
    gc.collect()
    gc.disable()
    for round_ in range(-WARM_UP, rounds):
        inputs, targets = (tensor.to(device) for tensor in make_data())
        in_round = []
        for name, net in models.items():
            net.zero_grad()
            synchronize(device)
            start = time.perf_counter()
            nn.functional.cross_entropy(net(inputs), targets).backward()
            synchronize(device)
            middle = time.perf_counter()
            optimizers[name].step()
            synchronize(device)
            end = time.perf_counter()
            in_round.append(middle - start)
            if round_ >= 0:
                steps[name].append(end - middle)
        if round_ >= 0:
            passes.append(statistics.median(in_round))
    gc.enable()
    result: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward_backward_milliseconds": round(1000 * statistics.median(passes), 2),
        "step": {},
    }
    for name, measured in steps.items():
        overheads = sorted(
            100 * (own - fused) / (both + fused)
            for own, fused, both in zip(measured, steps[FUSED], passes, strict=True)
        )
        result["step"][name] = {
            "overhead_percent": round(statistics.median(overheads), 3),
            "quartiles": [round(overheads[rounds // 4], 3), round(overheads[-1 - rounds // 4], 3)],
            "milliseconds": round(1000 * statistics.median(measured), 3),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Overhead of optimizers over fused AdamW in a whole training step.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    workloads: dict[str, Any] = {}
    for name in arguments.workloads:
        row = workloads[name] = measure(name, arguments.rounds, arguments.device)
        cells = (f"{k} {v['milliseconds']:.1f} ms ({v['overhead_percent']:+.2f} %)" for k, v in row["step"].items())
        print(
            f"{name}: forward and backward {row['forward_backward_milliseconds']:.0f} ms  ",
            "  ".join(cells),
            flush=True,
        )
    if arguments.output:
        result = {
            "command": f"benchmarks/training_step.py {shlex.join(sys.argv[1:])}",
            "overhead": "percent of forward + backward + fused AdamW step that the optimizer's step takes more",
            **machine(arguments.device),
            "workloads": workloads,
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
