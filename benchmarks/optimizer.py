"""One optimizer step of Layca and its relatives in units of torch's fused step, and the memory that each needs.

    uv run --no-dev --group benchmarks benchmarks/optimizer.py
    uv run --no-dev --group benchmarks benchmarks/optimizer.py --bases AdamW --shapes ResNet-50 --rounds 5

**Time.** All contenders of a base step the same shapes in one process, on one thread, each on weights, gradients and
state of its own. A round measures them one after the other, always in the order of the table. Before each timed step,
untimed: the contender gets new gradients, the same as all others in that round (a gradient that stays the same for many
steps makes them nearly radial, where Layca reads them a second time), and 128 MB are written over, so that nobody finds
its data in a cache that its neighbour left alone. Two rounds warm up. A figure is the median over the rounds of (its
time / the fused step's time in the same round), so that a slower minute of a shared machine hits both; only these
ratios mean anything. Where a step takes a few milliseconds (the small layers) there are four times as many rounds.

**Memory.** Beyond weights and gradients, in units of the weights: what the optimizer's state holds, what else stays
between steps (Layca's scratch), and what a step takes for a moment. Taken from the allocator's own record of the
construction and two steps, one contender at a time.

On CUDA times are those of a step between two synchronizations. GPT-2's blocks need about 9 GB of memory.
"""

import argparse
import gc
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from contenders import SHAPES, Evictor, Make, Steps, contenders, machine, synchronize, weights
from torch import nn
from torch.profiler import ProfilerActivity, profile

FUSED = "torch fused"
WARM_UP = 2
# Below this many weights there are more rounds.
SMALL = 5_000_000


class Gradients:
    """New gradients for any list of weights, at the cost of a copy: windows of one long row of random numbers."""

    windows = 1 << 20

    def __init__(self, shapes: list[tuple[int, ...]], device: str) -> None:
        largest = max(torch.Size(shape).numel() for shape in shapes)
        self.noise = torch.randn(largest + self.windows, device=device) * 0.01
        self.start = 0

    def draw(self) -> None:
        """Choose the window of the coming round."""
        self.start = int(torch.randint(self.windows, ()))

    def write(self, parameters: list[nn.Parameter]) -> None:
        """Copy the window into the gradients."""
        for parameter in parameters:
            parameter.grad.view(-1).copy_(self.noise[self.start : self.start + parameter.numel()])


def measure_time(made: dict[str, Make], shapes: list[tuple[int, ...]], rounds: int, device: str) -> dict[str, Any]:
    """Ratio to the fused step with its quartiles, and median milliseconds, by contender."""
    if sum(torch.Size(shape).numel() for shape in shapes) < SMALL:
        rounds *= 4
    owned = {name: weights(shapes, device) for name in made}
    steps: dict[str, Steps] = {name: make(owned[name]) for name, make in made.items()}
    gradients, evict = Gradients(shapes, device), Evictor(device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    for round_ in range(-WARM_UP, rounds):
        gradients.draw()
        for name, optimizer in steps.items():
            gradients.write(owned[name])
            evict()
            synchronize(device)
            start = time.perf_counter()
            optimizer.step()
            synchronize(device)
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    gc.enable()
    result: dict[str, Any] = {}
    for name, measured in seconds.items():
        ratios = sorted(own / fused for own, fused in zip(measured, seconds[FUSED], strict=True))
        result[name] = {
            "ratio": round(statistics.median(ratios), 3),
            "quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[-1 - len(ratios) // 4], 3)],
            # Layca reads some norms in every ninth step only, which a median does not see.
            "ratio_of_sums": round(sum(measured) / sum(seconds[FUSED]), 3),
            "milliseconds": round(1000 * statistics.median(measured), 3),
        }
    return result


def measure_memory(make: Make, shapes: list[tuple[int, ...]], device: str) -> dict[str, float]:
    """State, other lasting memory and the most that a step takes on top, in units of the weights."""
    owned, gradients = weights(shapes, device), Gradients(shapes, device)
    gc.collect()
    with _AllocationRecord(device) as record:
        optimizer = make(owned)
        for _ in range(2):
            gradients.draw()
            gradients.write(owned)
            optimizer.step()
    lasting, peak = record.lasting, record.peak
    tensors = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    state, unit = sum(storages.values()), sum(parameter.nbytes for parameter in owned)
    return {
        "state": round(state / unit, 4),
        "scratch": round((lasting - state) / unit, 4),
        "momentary": round((peak - lasting) / unit, 4),
        "peak_megabytes": round(peak / 2**20, 1),
    }


class _AllocationRecord:
    """Bytes that the allocator of a device gave in a block of code: what is left at its end, and the most at once."""

    lasting: int
    peak: int

    def __init__(self, device: str) -> None:
        self.device = device
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)

    def __enter__(self) -> "_AllocationRecord":
        if self.device == "cpu":
            self.profile.__enter__()
        else:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *error: Any) -> None:
        gc.collect()
        if self.device != "cpu":
            self.lasting = torch.cuda.memory_allocated(self.device) - self.before
            self.peak = torch.cuda.max_memory_allocated(self.device) - self.before
            return
        self.profile.__exit__(*error)
        # The CPU's allocator counts nothing itself; the profiler writes down each of its calls.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self.profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        self.lasting = self.peak = 0
        for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
            self.lasting += event["args"]["Bytes"]
            self.peak = max(self.peak, self.lasting)


def print_row(base: str, shapes: str, quantity: str, row: dict[str, str]) -> None:
    print(f"{base:13} {shapes:13} {quantity:8}", "   ".join(f"{name} {cell}" for name, cell in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time of Layca in units of torch's fused step, and its memory.")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--bases", nargs="+", choices=contenders("cpu"), default=list(contenders("cpu")))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--contenders", nargs="+", help="only these, beside the fused step")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # Read when the profiler first runs: otherwise three lines for every contender.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    times: dict[str, dict[str, Any]] = {}
    memory: dict[str, dict[str, Any]] = {}
    for base in arguments.bases:
        wanted = {
            name: make
            for name, make in contenders(arguments.device)[base].items()
            if name == FUSED or arguments.contenders is None or name in arguments.contenders
        }
        for name in arguments.shapes:
            shapes = SHAPES[name]
            row = measure_time(wanted, shapes, arguments.rounds, arguments.device)
            times.setdefault(base, {})[name] = row
            print_row(base, name, "time", {k: f"{v['ratio']:.2f}" for k, v in row.items()})
            needs = {contender: measure_memory(make, shapes, arguments.device) for contender, make in wanted.items()}
            memory.setdefault(base, {})[name] = needs
            cells = {k: f"{v['state']:.2f}+{v['scratch']:.2f}+{v['momentary']:.2f}" for k, v in needs.items()}
            print_row(base, name, "memory", cells)
    if arguments.output:
        result = {
            "command": f"benchmarks/optimizer.py {shlex.join(sys.argv[1:])}",
            "time": "median over rounds of the step's time / that of torch's fused step of the base in the same round",
            "memory": "beyond weights and gradients, in units of the weights: state, other lasting, most for a moment",
            **machine(arguments.device),
            "times": times,
            "memories": memory,
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
