"""Write the tables of the docs from the committed results, so that no number is copied by hand.

    uv run docs/tables.py

Each table stands between `<!-- table: name -->` and `<!-- end -->` in a page; `tests/test_docs.py` checks that it is
what this file writes.
"""

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from pl_layer_rotation import RotationHistory
from pl_layer_rotation.report.findings import finding_lines

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

DOCS = Path(__file__).parent
ROOT = DOCS.parent

_BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
PAGES = ("cost.md", "curves.md", "paper.md", "versions.md", "../README.md")
_BASES = {"AdamW": "AdamW", "SGD momentum": "SGD with momentum"}
_WORKLOADS = {
    "GPT 10.8 M": "GPT, 10.8 M parameters",
    "ResNet-18, 3x3 stem": "ResNet-18, 3×3 stem",
    "ResNet-18": "ResNet-18 of torchvision",
    "300 x 64x64": "300 layers of 64×64",
    "3000 x 64x64": "3000 layers of 64×64",
}
_RUNS = {
    "healthy": "AdamW, rate 3e-3",
    "slow": "AdamW, rate 3e-5",
    "forgotten": "AdamW without `conv2`",
    "layca": "Layca over AdamW, rate 3<sup>-3</sup>",
}
_READINGS = {
    "rotation alone": "rotation and norm, one reading",
    "everything": "rotation, norm and angle, one reading",
    "dense": "angles of every step (first tenth)",
    "cadence": "default cadence, a reading every 50 steps",
    "whole": "a whole training of 10,000 steps",
    "nothing": "a step without a reading",
    "wandb.watch": "`wandb.watch`, one reading",
}


def rewritten(text: str) -> str:
    """A page with its tables as the results have them."""
    return _BLOCK.sub(lambda block: f"{block[1]}{TABLES[block['name']]()}{block[3]}", text)


def optimizer_times() -> str:
    times = _results("optimizer")["times"]
    rows = []
    for base, label in _BASES.items():
        for contender in next(iter(times[base].values())):
            ratios = [workload[contender]["ratio"] for workload in times[base].values()]
            rows.append([_contender(contender, label), *(f"{ratio:.1f}" for ratio in ratios)])
    return _table(["one step, torch's fused step = 1", *times["AdamW"]], rows)


def optimizer_memory() -> str:
    memories = _results("optimizer")["memories"]
    rows = []
    for base, label in _BASES.items():
        for contender in next(iter(memories[base].values())):
            parts = [workload[contender] for workload in memories[base].values()]
            sums = (part["state"] + part["scratch"] + part["momentary"] for part in parts)
            rows.append([_contender(contender, label), *(f"{total:.2f}" for total in sums)])
    return _table(["memory beyond weights and gradients, weights = 1", *memories["AdamW"]], rows)


def training_steps() -> str:
    workloads = _results("training_step")["workloads"]
    names = [name for name in next(iter(workloads.values()))["step"] if name != "AdamW fused"]
    rows = [
        [_WORKLOADS[workload], f"{values['forward_backward_milliseconds'] / 1000:.2f} s"]
        + [f"+{values['step'][name]['overhead_percent']:.2f} %" for name in names]
        for workload, values in sorted(workloads.items(), key=lambda item: list(_WORKLOADS).index(item[0]))
    ]
    heads = [f"**{name}**" if name.startswith("Layca") else name for name in names]
    return _table(["a whole training step, fused AdamW = 0", "forward and backward", *heads], rows)


def monitor() -> str:
    workloads = {name: values["percent_of_step"] for name, values in _results("monitor")["workloads"].items()}
    chosen = [name for name in _WORKLOADS if name in workloads]
    rows = [
        [label, *(f"{workloads[workload][reading]['median']:.3g} %" for workload in chosen)]
        for reading, label in _READINGS.items()
    ]
    return _table(["share of a training step", *(_WORKLOADS[workload] for workload in chosen)], rows)


def runs() -> str:
    """The recorded runs of `docs/pictures.py`."""
    rows, said = [], []
    for run, label in _RUNS.items():
        history = RotationHistory.load(DOCS / "results" / f"{run}.jsonl")
        rotation, straight = (
            sorted(value for value in history.final(quantity).values() if not math.isnan(value))
            for quantity in ("rotation", "straightness")
        )
        accuracy, median = history.facts["metrics"]["val_acc"], statistics.median(straight)
        numbers = [f"{accuracy:.1%}", f"{rotation[0]:.2g} to {rotation[-1]:.2g}", f"{median:.2f}"]
        rows.append([label, *numbers])
        said.append(f"- {label}: *{' '.join(finding_lines(history))}*\n")
    table = _table(["run", "validation accuracy", "final rotation", "straightness, median"], rows)
    return f"{table}\nWhat the monitor said:\n\n{''.join(said)}"


def findings() -> str:
    rows = [
        [code, ", ".join(f"{fault} {hits}" for fault, hits in rule["hits"].items()), rule["false_alarms"]]
        for code, rule in _results("findings")["summary"].items()
        if rule["hits"]
    ]
    return _table(["rule", "seeded fault and how often the rule fired", "fired on healthy runs"], rows)


def mnist() -> str:
    """Five seeds of ours beside the paper's numbers, which `examples/mnist.py` keeps with its results."""
    paper = json.loads((ROOT / "examples" / "results" / "mnist.json").read_text(encoding="utf-8"))["runs"]
    folder = ROOT / "examples" / "results" / "paper" / "mnist" / "MNIST"
    rows = []
    for published in paper:
        files = sorted(folder.glob(f"{published['lr']}_seed?.json"))
        runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        distances, accuracies = [run["rotation"]["values"][-1][0] for run in runs], [run["test_acc"] for run in runs]
        rows.append(
            [
                re.sub(r"\^(.+)", r"<sup>\1</sup>", published["lr"]),
                f"{statistics.mean(distances):.3f} ± {statistics.stdev(distances):.3f}",
                f"{published['paper_first_layer_distance']:.2f}",
                f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}",
                f"{published['paper_test_accuracy']:.2f}",
            ]
        )
    head = ["rate", "rotation of the first layer", "in the paper", "test accuracy, %", "in the paper"]
    return _table(head, rows)


def versions() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    measured = {name: version for file in ("optimizer", "monitor") for name, version in _of_versions(file)}
    required = [("python", project["requires-python"])]
    required += [re.match(r"([\w-]+)(.*)", entry).groups() for entry in project["dependencies"]]
    rows = [[name, f"`{bound}`", measured.get(name, "")] for name, bound in required]
    return _table(["", "accepted", "the committed results were measured with"], rows)


def installs() -> str:
    """Where the wheel was installed and used, as `.ci/install_matrix.py` wrote it."""
    records = json.loads((DOCS / "results" / "installs.json").read_text(encoding="utf-8"))
    # What each step came to stands in the file; what fails here is not published.
    hidden = {"dependencies", "result", "jinja2", "click"}
    shown = [name for name in records[0] if name not in hidden]
    tests = [re.search(r"(\d+) passed", record["result"])[1] for record in records]
    rows = [[*(record[name] for name in shown), passed] for record, passed in zip(records, tests, strict=True)]
    return _table([*shown, "tests passed"], rows)


def workflow() -> str:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    rows = []
    for name, job in jobs.items():
        matrix = {key: ", ".join(map(str, values)) for key, values in job.get("strategy", {}).get("matrix", {}).items()}
        asked = [step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {})]
        # One row a job: what its name says of a single entry of the matrix goes.
        title = job.get("name", name).partition("${{")[0].rstrip(" ,").removesuffix(", Python").removesuffix(" on")
        machine, python = matrix.get("os", job["runs-on"]), matrix.get("python", ", ".join(map(str, asked)))
        rows.append([title, machine, python, matrix.get("resolution", "")])
    return _table(["job", "machine", "Python", "dependencies"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "optimizer-times": optimizer_times,
    "optimizer-memory": optimizer_memory,
    "training-steps": training_steps,
    "monitor": monitor,
    "findings": findings,
    "mnist": mnist,
    "runs": runs,
    "versions": versions,
    "installs": installs,
    "workflow": workflow,
}


def _results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def _of_versions(file: str) -> list[tuple[str, str]]:
    return list(_results(file)["versions"].items())


def _contender(name: str, base: str) -> str:
    if name.startswith("torch"):
        return f"{name.replace('torch', f'torch {base},')}"
    return {"Layca": f"**Layca over {base}**", "naive Layca": f"Layca over {base}, tensor by tensor"}.get(name, name)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # A number and its unit stay on one line.
    cells = [[re.sub(r"^([+.\d]+) (%|s)$", "\\1\u00a0\\2", cell) for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    for page in (DOCS / name for name in PAGES):
        page.write_text(rewritten(page.read_text(encoding="utf-8")), encoding="utf-8")
