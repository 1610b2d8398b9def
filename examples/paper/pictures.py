"""Pictures like the paper's, from a study's results: curves by depth, accuracy against rotation, features by rate."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from errors import InputError
from results import FEATURES, StudyFolder
from table import with_spread

from pl_layer_rotation import RotationHistory
from pl_layer_rotation.report.figures import depth_colors
from pl_layer_rotation.report.page import write_page

try:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise InputError("pictures need matplotlib, which is not installed. Run `uv pip install matplotlib`.") from error

Result = dict[str, Any]
_MOST_COLUMNS = 8


def draw(study: str, folders: Sequence[StudyFolder], output: Path) -> list[Path]:
    """Draw every picture of a study, and its page of curves, into the output folder; say where."""
    results = {folder.task: list(folder.read()) for folder in folders}
    results = {task: found for task, found in results.items() if found}
    if not results:
        raise InputError(
            f"`--output` must hold a finished setting of {study}, got none in {output}. Run the study first."
        )
    files = [output / f"{study}-{kind}" for kind in ("rotation.png", "accuracy.png", "rotation.html")]
    _save(rotation_sheet(results), files[0])
    _save(accuracy_against_rotation(results), files[1])
    write_page(
        files[2],
        {f"{task}, {r['setting']}": history_of(r) for task, found in results.items() for r in first_seed(found)},
    )
    with_features = [folder for folder in folders if any(folder.path.glob("*.features.json"))]
    for folder in with_features:
        files.append(output / f"{study}-features.png")
        _save(feature_sheet(folder, results[folder.task]), files[-1])
    for file in files:
        print(file)
    return files


def rotation_sheet(results: dict[str, list[Result]]) -> Figure:
    """Curves of every layer for every setting, first to last layer from blue to amber."""
    panels = [(task, result) for task, found in results.items() for result in first_seed(found)]
    columns = min(_MOST_COLUMNS, max(len(first_seed(found)) for found in results.values()))
    rows = [
        [(task, r) for r in first_seed(found)[start : start + columns]]
        for task, found in results.items()
        for start in range(0, len(first_seed(found)), columns)
    ]
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(2.4 * columns + 1, 2.3 * len(rows) + 0.7), squeeze=False, layout="constrained"
    )
    for line, row in enumerate(rows):
        for column, axis in enumerate(axes[line]):
            if column < len(row):
                _curves(axis, row[column][1], results[row[column][0]])
            else:
                axis.axis("off")
        axes[line, 0].set_ylabel(f"{row[0][0]}\ncosine distance")
    scale = {result["scale"] for _, result in panels}
    figure.suptitle("Layer rotation, first to last layer from blue to amber" + _shortened(scale), fontsize=11)
    return figure


def accuracy_against_rotation(results: dict[str, list[Result]]) -> Figure:
    """Test accuracy over the mean final distance of the layers; on MNIST over the first layer's."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(4.2 * len(results) + 0.5, 3.6), squeeze=False, layout="constrained"
    )
    for axis, (task, found) in zip(axes[0], results.items(), strict=True):
        names = list(dict.fromkeys(result["setting"] for result in found))
        for name, color in zip(names, _colors(len(names)), strict=True):
            runs = [result for result in found if result["setting"] == name]
            points = [(final_distance(r, task), r["test_acc"]) for r in runs]
            axis.scatter(*zip(*points, strict=True), color=color, s=18, label=_power(name))
        where = " of the first layer" if task == "MNIST" else ", mean over layers"
        axis.set(title=task, xlabel=f"final cosine distance{where}", ylabel="test accuracy (%)")
        axis.set_xlim(0, max(1.0, axis.get_xlim()[1]))
        axis.legend(fontsize=7, frameon=False)
    scale = {result["scale"] for found in results.values() for result in found}
    figure.suptitle("Accuracy against rotation" + _shortened(scale), fontsize=11)
    return figure


def feature_sheet(folder: StudyFolder, found: Sequence[Result]) -> Figure:
    """What some neurons of the first layer look at, as they start and as each rate leaves them."""
    shown = [r for r in first_seed(found) if folder.features(r["setting"], r["seed"]).is_file()]
    features = [json.loads(folder.features(r["setting"], r["seed"]).read_text(encoding="utf-8")) for r in shown]
    rows = [("initialization", "", features[0]["initial"])]
    for result, images in zip(shown, features, strict=True):
        runs = [other for other in found if other["setting"] == result["setting"]]
        label = f"lr {_power(result['setting'])}\ndistance {final_distance(result, folder.task):.2f}"
        rows.append((label, f"train {_over(runs, 'train_acc')} %\ntest {_over(runs, 'test_acc')} %", images["final"]))
    figure, axes = plt.subplots(
        len(rows), len(FEATURES), figsize=(1.5 * len(FEATURES) + 3.4, 1.5 * len(rows) + 0.4), layout="constrained"
    )
    for line, (label, score, images) in zip(axes, rows, strict=True):
        for axis, pixels in zip(line, images, strict=True):
            side = math.isqrt(len(pixels))
            axis.imshow([pixels[start : start + side] for start in range(0, len(pixels), side)], cmap="viridis")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        line[-1].annotate(score, (1.1, 0.5), xycoords="axes fraction", va="center")
    seeds = len({result["seed"] for result in found})
    mean_of = f"; accuracies: mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    figure.suptitle(f"Weights of five neurons of the first layer, seed {shown[0]['seed']}{mean_of}", fontsize=10)
    return figure


def history_of(result: Result) -> RotationHistory:
    """The curves of a result as the package's figures take them."""
    rotation, optimizer = result["rotation"], result["recipe"]["base"]
    name = f"Layca over {optimizer}" if result["recipe"]["layca"] else optimizer
    facts = {"optimizer": name, "learning_rate": result["recipe"]["lr"], "test accuracy (%)": result["test_acc"]}
    history = RotationHistory(rotation["layers"], facts=facts)
    for epoch, values in zip(rotation["epochs"], rotation["values"], strict=True):
        history.append(
            epoch * result["plan"]["steps_per_epoch"], rotation=[math.nan if v is None else v for v in values]
        )
    return history


def first_seed(found: Sequence[Result]) -> list[Result]:
    """One result a setting: that of its smallest seed."""
    return list({result["setting"]: result for result in reversed(found)}.values())[::-1]


def final_distance(result: Result, task: str) -> float:
    last = [value for value in result["rotation"]["values"][-1] if value is not None]
    if not last:
        return math.nan
    return last[0] if task == "MNIST" else mean(last)


def _curves(axis: Axes, result: Result, found: Sequence[Result]) -> None:
    rotation = result["rotation"]
    for depth, color in enumerate(_colors(len(rotation["layers"]))):
        values = [math.nan if row[depth] is None else row[depth] for row in rotation["values"]]
        axis.plot([0, *rotation["epochs"]], [0.0, *values], color=color, lw=1.2)
    runs = [other for other in found if other["setting"] == result["setting"]]
    axis.set_title(f"{_power(result['setting'])}: {_over(runs, 'test_acc')} %", fontsize=9)
    axis.set(ylim=(0, 1.02), xlim=(0, result["plan"]["epochs"]))
    axis.set_xlabel("epoch", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)


def _over(runs: Sequence[Result], what: str) -> str:
    return with_spread([run[what] for run in runs], 2)


def _power(setting: str) -> str:
    base, _, exponent = setting.partition("^")
    return f"${base}^{{{exponent}}}$" if exponent else setting.replace("_", " ")


def _shortened(scales: set[float]) -> str:
    return f"\nshortened to {max(scales):g} of the paper's work" if scales != {1.0} else ""


def _colors(count: int) -> list[tuple[float, ...]]:
    return [
        tuple(int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(","))
        for color in depth_colors(count)
    ]


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)
