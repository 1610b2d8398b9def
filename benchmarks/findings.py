"""Do the findings fire where they should, and only there?

    uv run --no-dev --group benchmarks benchmarks/findings.py --output benchmarks/results/findings.json

Three small networks on scikit-learn's digits (an MLP with tanh, one with BatchNorm, a conv net; four layers each), each
with SGD (momentum 0.9), AdamW and Layca (over SGD with momentum 0.9): 300 steps of batch 64, read by the monitor at
every step. Healthy runs take the best rate of a ladder (``--ladder``, factor 3, one seed, cosine) with three schedules,
AdamW with a warm-up over 5 %; each of the others has one fault. Most of these networks took no part when the thresholds
were chosen, but an MLP with tanh on the digits did; all are tiny. So this checks the implementation and the transfer to
other small networks, not to large ones.
"""

import argparse
import json
import logging
import math
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from contenders import machine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from pl_layer_rotation import LayerRotationMonitor, layca_optimizers, select_layers
from pl_layer_rotation.report.findings import findings

STEPS, BATCH, VALIDATION = 300, 64, 360
WARM_UP, EARLY, FREEZE = 0.05, 0.25, 0.3  # shares of the run

# What `findings.md` counted in other runs: hits of the faults that are seeded here too, and false alarms of 80.
COUNTED = {
    "A": ("frozen 23/23, dead ReLU or BatchNorm 16/16, zero-initialized 8/8", "0/80"),
    "B": ("lr/100 on one layer 14/14", "0/80"),
    "C": ("lr×100 on one layer 11/11", "0/80"),
    "D": ("lr ≤ best/30 16/17 and 4/4, best/10 4/15 and 2/2", "0/80"),
    "E": ("schedule decayed too early 10/10", "0/80"),
    "F": ("frozen at 30 % 6/6", "0/80"),
    "G": ("AdamW without warm-up 4/6", "1/80"),
    "H": ("non-finite runs 6/6", "0/80"),
    "I": ("Layca alpha = +0.6 5/6, -0.6 6/6", "0/80"),
    "J": ("init ×0.1 4/10", "0/80"),
    "K": ("layers followed by BatchNorm 17/17", "-"),
    "non-finite": ("-", "-"),
}


class Case(NamedTuple):
    """One run: what is trained, how, and what is wrong with it."""

    task: str
    optimizer: str
    rate: float
    seed: int = 0
    schedule: str = "cosine"
    warm_up: bool = True
    fault: str = ""
    expected: str = ""
    layer_rates: tuple[tuple[str, float], ...] = ()
    alpha: float = 0.0
    weight_decay: float = 0.0
    break_model: Callable[["Net"], None] = lambda net: None
    freeze_at: int = STEPS


def tanh_mlp() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()),
        nn.Linear(64, 10),
    )


def norm_mlp() -> nn.Sequential:
    def block() -> tuple[nn.Module, ...]:
        return nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()

    return nn.Sequential(nn.Flatten(), *block(), *block(), *block(), nn.Linear(64, 10))


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


TASKS = {"tanh MLP": tanh_mlp, "BatchNorm MLP": norm_mlp, "conv net": conv_net}
OPTIMIZERS = ("SGD", "AdamW", "Layca")
LADDERS = {
    "SGD": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "AdamW": (3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1),
    "Layca": (3**-6, 3**-5, 3**-4, 3**-3, 3**-2, 3**-1),
}
# The best of the ladders above by validation loss at the end.
BEST = {
    ("tanh MLP", "SGD"): 0.1,
    ("tanh MLP", "AdamW"): 0.01,
    ("tanh MLP", "Layca"): 3**-2,
    ("BatchNorm MLP", "SGD"): 0.3,
    ("BatchNorm MLP", "AdamW"): 0.01,
    ("BatchNorm MLP", "Layca"): 3**-4,
    ("conv net", "SGD"): 0.1,
    ("conv net", "AdamW"): 0.03,
    ("conv net", "Layca"): 3**-3,
}


def factor(case: Case, step: int) -> float:
    if case.optimizer == "AdamW" and case.warm_up and step < WARM_UP * STEPS:
        return (step + 1) / (WARM_UP * STEPS + 1)
    schedule, share = case.schedule, step / STEPS
    if schedule == "steps":
        return 0.1 ** ((share >= 0.5) + (share >= 0.8))
    if schedule == "early":
        share = min(1.0, share / EARLY)
    return 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * share))


class Net(pl.LightningModule):
    """A network with the recipe of its case."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.net = case, TASKS[case.task]()
        self.layers = list(select_layers(self))
        case.break_model(self)

    def layer(self, depth: int) -> Any:  # noqa: D102
        return self.get_submodule(self.layers[depth])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:  # noqa: D102
        if self.global_step == self.case.freeze_at:
            self.layer(1).weight.requires_grad_(False)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:  # noqa: D102
        case = self.case

        def schedule(optimizer: torch.optim.Optimizer) -> LambdaLR:
            return LambdaLR(optimizer, partial(factor, case))

        rates = dict(case.layer_rates)
        if case.optimizer == "Layca":
            multipliers = case.alpha or rates or None
            return layca_optimizers(self, lr=case.rate, momentum=0.9, schedule=schedule, layer_multipliers=multipliers)
        groups: list[dict[str, Any]] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                rate = case.rate * rates.get(name.removesuffix(".weight"), 1.0)
                groups.append({"params": [parameter], "lr": rate})
        if case.optimizer == "SGD":
            optimizer: Any = torch.optim.SGD(groups, lr=case.rate, momentum=0.9, weight_decay=case.weight_decay or 5e-4)
        else:
            optimizer = torch.optim.AdamW(groups, lr=case.rate, weight_decay=case.weight_decay or 0.01)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}


class Batches(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
    """Batches drawn anew in every step."""

    def __init__(self, inputs: Tensor, targets: Tensor, seed: int) -> None:
        self.inputs, self.targets, self.seed = inputs, targets, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(STEPS):
            chosen = torch.randint(len(self.inputs), (BATCH,), generator=generator)
            yield self.inputs[chosen], self.targets[chosen]


def digits() -> tuple[Tensor, Tensor]:
    inputs, targets = load_digits(return_X_y=True)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    scaled = torch.tensor(inputs / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
    return scaled[order], torch.tensor(targets)[order]


def run(case: Case, data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    torch.manual_seed(case.seed)
    net, monitor = Net(case), LayerRotationMonitor(every_n_steps=1, report=False)
    inputs, targets = data
    loader = torch.utils.data.DataLoader(
        Batches(inputs[:-VALIDATION], targets[:-VALIDATION], case.seed), batch_size=None
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, loader)
    net.eval()
    with torch.no_grad():
        outputs = net.net(inputs[-VALIDATION:])
    history = monitor.history
    # Rates that differ between layers are the fault that is looked for here.
    history.facts["layer_multipliers"] = False
    if case.task == "BatchNorm MLP":
        history.facts["followed_by_norm"] = net.layers[:-1]
    found = findings(history)
    return {
        "task": case.task,
        "optimizer": case.optimizer,
        "rate": case.rate,
        "schedule": case.schedule,
        "seed": case.seed,
        "fault": case.fault,
        "expected": case.expected,
        "found": [finding.code for finding in found],
        "sentences": [finding.sentence for finding in found],
        "validation_loss": float(nn.functional.cross_entropy(outputs, targets[-VALIDATION:])),
        "accuracy": float((outputs.argmax(1) == targets[-VALIDATION:]).float().mean()),
    }


def freeze(net: Net) -> None:
    net.layer(1).weight.requires_grad_(False)


def kill(net: Net) -> None:
    """No ReLU after the second layer ever opens: neither it nor what stands before it gets a gradient."""
    after = net.net[5] if isinstance(net.net[5], nn.BatchNorm1d) else net.layer(1)
    nn.init.constant_(after.bias, -100.0)
    after.bias.requires_grad_(False)


def zero(net: Net, depth: int) -> None:
    nn.init.zeros_(net.layer(depth).weight)
    if depth == 1:
        nn.init.zeros_(net.layer(depth).bias)


def shrink(net: Net) -> None:
    for depth in range(len(net.layers)):
        with torch.no_grad():
            net.layer(depth).weight.mul_(0.1)


def healthy() -> list[Case]:
    cases = []
    for (task, optimizer), rate in BEST.items():
        cases += [Case(task, optimizer, rate, seed) for seed in range(3)]
        cases += [Case(task, optimizer, rate, 3, "constant"), Case(task, optimizer, rate, 4, "steps")]
    return cases


def faulty() -> list[Case]:
    cases = []
    for (task, optimizer), rate in BEST.items():
        case = Case(task, optimizer, rate)
        second = list(select_layers(Net(case)))[1]
        cases += [
            case._replace(fault="frozen layer", expected="A", break_model=freeze),
            case._replace(fault="lr/100 on one layer", expected="B", layer_rates=((second, 0.01),)),
            case._replace(fault="lr×100 on one layer", expected="C", layer_rates=((second, 100.0),)),
            case._replace(fault="lr/100", expected="D", rate=rate / 100),
            case._replace(fault="lr/30", expected="D", rate=rate / 30),
            case._replace(fault="lr/10", expected="D", rate=rate / 10),
            case._replace(fault="schedule decays too early", expected="E", schedule="early"),
            case._replace(fault="frozen at 30 %", expected="F", freeze_at=int(FREEZE * STEPS)),
        ]
        if task != "tanh MLP":
            cases.append(case._replace(fault="dead ReLU", expected="A", break_model=kill))
        if optimizer == "Layca":
            cases += [case._replace(fault=f"Layca alpha = {a:+}", expected="I", alpha=a) for a in (0.6, -0.6)]
            continue
        cases += [
            case._replace(fault="output starts at zero", expected="A", break_model=partial(zero, depth=-1)),
            case._replace(fault="init ×0.1", expected="J", break_model=shrink),
            case._replace(fault="lr×30", expected="H", rate=30 * rate),
        ]
        if optimizer == "AdamW":
            cases += [case._replace(fault="no warm-up", expected="G", warm_up=False, seed=seed) for seed in range(2)]
        if task == "conv net":
            cases.append(
                case._replace(fault="hidden layer starts at zero", expected="A", break_model=partial(zero, depth=1))
            )
        if task == "BatchNorm MLP":
            rate, decay = (0.1, 0.01) if optimizer == "SGD" else (0.01, 1.0)
            cases += [
                Case(task, optimizer, rate, seed, "constant", False, "equilibrium", "K", weight_decay=decay)
                for seed in range(2)
            ]
    return cases


def ladder(data: tuple[Tensor, Tensor]) -> None:
    for task in TASKS:
        for optimizer in OPTIMIZERS:
            results = {rate: run(Case(task, optimizer, rate), data) for rate in LADDERS[optimizer]}
            losses = {rate: result["validation_loss"] for rate, result in results.items()}
            shown = "  ".join(f"{rate:.3g}: {loss:.3f} {results[rate]['found']}" for rate, loss in losses.items())
            print(f'("{task}", "{optimizer}"): {min(losses, key=losses.__getitem__):.4g},  # {shown}', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Hits and false alarms of the findings on small runs.")
    parser.add_argument("--ladder", action="store_true", help="only find the best rates and print them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    data = digits()
    if arguments.ladder:
        ladder(data)
        return
    start = time.perf_counter()
    results = [run(case, data) for case in [*healthy(), *faulty()]]
    sound = [result for result in results if not result["fault"]]
    for result in results:
        if not result["fault"] or result["expected"] not in result["found"]:
            what = result["fault"] or "healthy"
            if what != "healthy" or result["found"]:
                print(f"{result['task']}, {result['optimizer']}, {what}: found {result['found'] or 'nothing'}")
    summary = {}
    for code, (hits, alarms) in COUNTED.items():
        faults = dict.fromkeys(result["fault"] for result in results if result["expected"] == code)
        here = {}
        for fault in faults:
            fired = [code in result["found"] for result in results if result["fault"] == fault]
            here[fault] = f"{sum(fired)}/{len(fired)}"
        false = f"{sum(code in result['found'] for result in sound)}/{len(sound)}"
        summary[code] = {"hits": here, "false_alarms": false, "counted_hits": hits, "counted_false_alarms": alarms}
        print(f"{code}: hits {here}; false alarms {false}   (findings.md: {hits}; {alarms})")
    print(f"{len(sound)} healthy and {len(results) - len(sound)} faulty runs in {time.perf_counter() - start:.0f} s")
    if arguments.output:
        report = {
            "command": f"benchmarks/findings.py {shlex.join(sys.argv[1:])}",
            "steps": STEPS,
            "batch": BATCH,
            **machine("cpu"),
            "summary": summary,
            "runs": results,
        }
        arguments.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
