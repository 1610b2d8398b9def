"""What a W&B run is sent besides the scalars: layer list, metric definitions, charts, findings, the page."""

import os
import shlex
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pl_layer_rotation._log_keys import log_keys
from pl_layer_rotation.history import RotationHistory

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run  # `wandb.Run` came after 0.19

# The x-axis of Lightning's W&B logger. W&B's own `_step` counts rows, and restarts when an offline run is resumed.
_STEP = "trainer/global_step"
_CHARTS = ("rotation", "final_rotation", "heatmap")
# Shares of a training after which the charts are sent, besides its end: making them takes a second or so with hundreds
# of layers. From the first one on straightness says something.
_DRAWN_AT = (0.1, 0.25, 0.5, 0.75)
_DRAWN_AFTER = (10, 100, 1000, 10_000)  # readings, where nobody knows how long the training will be
_FACTS = (
    *("module", "optimizer", "learning_rate", "momentum", "weight_decay"),
    *("total_steps", "strategy", "devices", "precision"),
)
_RESULTS: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "rotation": {"mean": torch.mean, "min": torch.min, "max": torch.max},
    "straightness": {"median": torch.median},
}
_SHOWN_LAYERS = 32  # with more layers, one automatic panel a layer would bury the charts
_LISTED_LAYERS = 1000  # about 150 kB of config; W&B advises against values above 1 MB


def run_config(history: RotationHistory, prefix: str = "") -> dict[str, Any]:
    """The layers in depth order, for a run's config: what a logged key stands for; and how the run is trained.

    Layers form a list, which W&B keeps as one value; a mapping would become a column a layer in its table of runs.
    Of more than 1000 layers, the 500 nearest to the input and the 500 nearest to the output are listed.

    Args:
        history: the recorded curves.
        prefix: the ``prefix`` of the ``WandbLogger``, which stands before the logged keys.

    Returns:
        Plain lists, strings and numbers: the number of layers; for each layer its name, its shape (``[]`` where
        unknown) and the key under which its rotation is logged; and what the history knows of optimizer, length,
        strategy and precision.

    Example::

        >>> run_config(RotationHistory(["stem.conv"], [(8, 1, 3, 3)]))["layer_rotation"]["layers"]
        [{'name': 'stem.conv', 'shape': [8, 1, 3, 3], 'key': 'layer_rotation/000_stem_conv'}]

    """
    keys = log_keys(history.layer_names)
    layers = [
        {"name": name, "shape": list(shape), "key": logged_key(key, prefix)}
        for name, shape, key in zip(history.layer_names, history.layer_shapes, keys, strict=True)
    ]
    if len(layers) > _LISTED_LAYERS:
        layers = layers[: _LISTED_LAYERS // 2] + layers[-_LISTED_LAYERS // 2 :]
    facts = {name: history.facts[name] for name in _FACTS if history.facts.get(name) is not None}
    return {"layer_rotation": {"n_layers": len(keys), "layers": layers, **facts}}


def prepare_run(run: "Run", history: RotationHistory, keys: Iterable[str], prefix: str = "") -> None:
    """Write the layer list into the run's config and define each logged key over ``trainer/global_step``.

    With more than 32 layers, the keys of single layers are hidden from W&B's automatic panels; they are logged all the
    same and can be added to any panel. Does nothing for a disabled run and for Lightning's dummy on ranks above 0.

    Args:
        run: what ``WandbLogger.experiment`` gives.
        history: the recorded curves; only its layers are read.
        keys: every key that is going to be logged, of layers and of aggregates, without ``prefix``.
        prefix: the ``prefix`` of the ``WandbLogger``.

    Example::

        >>> import wandb
        >>> history = RotationHistory(["conv", "fc"])
        >>> run = wandb.init(mode="disabled")
        >>> prepare_run(run, history, [*log_keys(history.layer_names), "layer_rotation_stats/mean"])

    """
    if not _records(run):
        return
    # A resumed run already holds these values, possibly of a model with other layers.
    run.config.update(run_config(history, prefix), allow_val_change=True)  # type: ignore[no-untyped-call]
    run.define_metric(_STEP)
    layers = {_layer_part(key) for key in log_keys(history.layer_names)}
    hidden = layers if len(layers) > _SHOWN_LAYERS else set()
    for key in keys:
        # Exact names: Lightning has defined "*", and which of two matching globs wins is left to chance.
        run.define_metric(logged_key(key, prefix), step_metric=_STEP, hidden=_layer_part(key) in hidden)


def charts_due(history: RotationHistory, before: int) -> bool:
    """Whether the charts are sent after the last reading, though training goes on: four times in a run at most.

    That is after a tenth, a quarter, a half and three quarters of the training or, where its length is unknown, after
    10, 100, 1,000 and 10,000 readings. It depends on the history alone, so that a resumed run does not start over.

    Args:
        history: the recorded curves, with the fact ``total_steps`` where it is known.
        before: step of the reading before the last; 0 where there was none. A history may have thinned it out.

    Example::

        >>> history = RotationHistory(["fc"], facts={"total_steps": 100})
        >>> for step in (5, 10, 15, 20, 25):
        ...     history.append(step, rotation=[0.1])
        ...     print(step, charts_due(history, step - 5))
        5 False
        10 True
        15 False
        20 False
        25 True

    """
    total = history.facts.get("total_steps")
    if not total:
        return history.readings in _DRAWN_AFTER
    now = history.steps[-1]
    return now < total and any(before < share * total <= now for share in _DRAWN_AT)


def log_charts(run: "Run", history: RotationHistory, step: int, prefix: str = "") -> None:
    """Send the charts, as interactive Plotly figures, under ``layer_rotation_charts/``.

    ``rotation`` shows the curves, ``final_rotation`` the last value by layer, ``heatmap`` depth over steps. Does
    nothing without readings, for a disabled run, and for Lightning's dummy on ranks above 0.

    Args:
        run: what ``WandbLogger.experiment`` gives.
        history: the recorded curves.
        step: optimizer steps done, the value of ``trainer/global_step``.
        prefix: the ``prefix`` of the ``WandbLogger``.

    Example::

        >>> import wandb
        >>> history = RotationHistory(["conv", "fc"])
        >>> history.append(10, rotation=[0.01, 0.02])
        >>> log_charts(wandb.init(mode="disabled"), history, step=10)

    """
    if not history.steps or not _records(run):
        return
    from pl_layer_rotation.report.figures import figures

    drawn = figures(history)
    charts = {key: drawn[name] for key, name in zip(chart_keys(prefix), _CHARTS, strict=True)}
    # Without `step=`: W&B drops rows whose step is below its own count, and Lightning's step is.
    run.log({**charts, _STEP: step})


def log_results(run: "Run", history: RotationHistory, prefix: str = "") -> None:
    """Write what a table of runs needs into the run's summary: last rotation, straightness, findings.

    These are ``layer_rotation_stats/mean``, ``min`` and ``max`` over the layers, ``layer_straightness_stats/median``
    where it was read, ``layer_rotation_findings`` (a sentence a line) and ``layer_rotation_finding_codes`` (such as
    ``A, D``, or ``none``). Does nothing without readings, for a disabled run, and for Lightning's dummy.

    Args:
        run: what ``WandbLogger.experiment`` gives.
        history: the recorded curves.
        prefix: the ``prefix`` of the ``WandbLogger``.

    Example::

        >>> import wandb
        >>> history = RotationHistory(["conv", "fc"])
        >>> history.append(10, rotation=[0.25, 0.5])
        >>> run = wandb.init(mode="disabled")
        >>> log_results(run, history)

    """
    if not history.steps or not _records(run):
        return
    from pl_layer_rotation.report.findings import finding_lines

    codes = list(dict.fromkeys(finding.code for finding in history.findings()))
    results: dict[str, Any] = {
        "layer_rotation_findings": "\n".join(finding_lines(history)),
        "layer_rotation_finding_codes": ", ".join(codes) or "none",
    }
    for quantity, statistics in _RESULTS.items():
        values = _last_defined(history, quantity)
        if len(values):
            results.update({f"layer_{quantity}_stats/{name}": float(take(values)) for name, take in statistics.items()})
    run.summary.update({logged_key(key, prefix): value for key, value in results.items()})


def log_page(run: "Run", path: str | os.PathLike[str], step: int, prefix: str = "") -> None:
    """Send a page that :func:`~pl_layer_rotation.report.page.write_page` wrote, as a panel of the run.

    It is the whole page (some megabytes), under ``layer_rotation_charts/page``. Does nothing for a disabled run, and
    for Lightning's dummy on ranks above 0.

    Args:
        run: what ``WandbLogger.experiment`` gives.
        path: the page.
        step: optimizer steps done, the value of ``trainer/global_step``.
        prefix: the ``prefix`` of the ``WandbLogger``.

    Raises:
        FileNotFoundError: If there is no such page.

    Example::

        >>> import wandb
        >>> log_page(wandb.init(mode="disabled"), "layer_rotation.html", step=10)

    """
    if not _records(run):
        return
    from wandb import Html

    # `inject` would add a stylesheet of W&B's. Given a path that is no file, `Html` would show the path.
    page = Html(Path(path).read_text(encoding="utf-8"), inject=False, data_is_not_path=True)
    run.log({logged_key("layer_rotation_charts/page", prefix): page, _STEP: step})


def logged_key(key: str, prefix: str = "") -> str:
    """The key as a ``WandbLogger`` with this ``prefix`` writes it."""
    return f"{prefix}-{key}" if prefix else key


def chart_keys(prefix: str = "") -> list[str]:
    """The keys of the charts: curves, final rotation, heatmap."""
    return [logged_key(f"layer_rotation_charts/{name}", prefix) for name in _CHARTS]


def viewing_hint(run: "Run") -> str | None:
    """Where the run can be seen: its address, or for an offline run its folder and what to do with it.

    Args:
        run: what ``WandbLogger.experiment`` gives.

    Returns:
        Text to print, of one line or a few; None for a disabled run, and for Lightning's dummy on ranks above 0.

    Example::

        >>> import wandb
        >>> viewing_hint(wandb.init(mode="disabled")) is None
        True

    """
    if not _records(run):
        return None
    if not run.offline:
        return f"W&B run: {run.url}"
    # Not `run.sync_dir`, which wandb 0.28 does not have yet. Relative where the logger's `save_dir` is, as by default.
    folder = Path(run.dir).absolute().parent
    lines = [f"W&B run, kept on this machine: {folder}", f"  upload it: wandb sync {shlex.quote(str(folder))}"]
    # wandb 0.28 brought the viewer.
    if find_spec("wandb.cli.leet"):
        lines.append(f"  look at it without an account: wandb leet {shlex.quote(str(folder))}")
    return "\n".join(lines)


def _records(run: object) -> bool:
    """Whether the run keeps what it is sent, so that making charts for it is worth the time."""
    # Lightning's dummy answers every attribute with a function that does nothing.
    return getattr(run, "disabled", True) is False


def _layer_part(key: str) -> str:
    """What follows the section of a key; the same for every quantity of a layer."""
    return key.partition("/")[2]


def _last_defined(history: RotationHistory, quantity: str) -> Tensor:
    """Values of the last reading that are numbers."""
    if quantity not in history.quantities:
        return torch.empty(0)
    values = history.values(quantity)[-1]
    return values[values.isfinite()]
