"""What a W&B run is sent besides the scalars of every step: layer list, metric definitions, charts and findings."""

import shlex
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pl_layer_rotation.history import RotationHistory, log_keys

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run  # `wandb.Run` came after 0.19

# The x-axis of Lightning's W&B logger. W&B's own `_step` counts rows, and restarts when an offline run is resumed.
_STEP = "trainer/global_step"
_FINDINGS = "layer_rotation_findings"
_SHOWN_LAYERS = 32  # with more layers, one automatic panel a layer would bury the charts
_LISTED_LAYERS = 1000  # about 150 kB of config; W&B advises against values above 1 MB


def run_config(history: RotationHistory, prefix: str = "") -> dict[str, Any]:
    """The layers in depth order, for a run's config: what a logged key stands for.

    Layers form a list, which W&B keeps as one value; a mapping would become a column a layer in its table of runs.
    Of more than 1000 layers, the 500 nearest to the input and the 500 nearest to the output are listed.

    Args:
        history: the recorded curves.
        prefix: the ``prefix`` of the ``WandbLogger``, which stands before the logged keys.

    Returns:
        Plain lists, strings and numbers: the number of layers and, for each layer, its name, its shape (``[]`` where
        unknown) and the key under which its rotation is logged.

    Example::

        >>> run_config(RotationHistory(["stem.conv"], [(8, 1, 3, 3)]))["layer_rotation"]["layers"]
        [{'name': 'stem.conv', 'shape': [8, 1, 3, 3], 'key': 'layer_rotation/000_stem_conv'}]

    """
    keys = log_keys(history.layer_names)
    layers = [
        {"name": name, "shape": list(shape), "key": _logged(key, prefix)}
        for name, shape, key in zip(history.layer_names, history.layer_shapes, keys, strict=True)
    ]
    if len(layers) > _LISTED_LAYERS:
        layers = layers[: _LISTED_LAYERS // 2] + layers[-_LISTED_LAYERS // 2 :]
    return {"layer_rotation": {"n_layers": len(keys), "layers": layers}}


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
        run.define_metric(_logged(key, prefix), step_metric=_STEP, hidden=_layer_part(key) in hidden)


def log_charts(run: "Run", history: RotationHistory, step: int, prefix: str = "") -> None:
    """Send the charts, as interactive Plotly figures, under ``layer_rotation_charts/``, and the findings as text.

    ``rotation`` shows the curves, ``final_rotation`` the last value by layer, ``heatmap`` depth over steps. The
    findings stand in the run's summary, one a line, under ``layer_rotation_findings``. Does
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
    from pl_layer_rotation.report.findings import finding_lines

    charts = {_logged(f"layer_rotation_charts/{name}", prefix): figure for name, figure in figures(history).items()}
    # Without `step=`: W&B drops rows whose step is below its own count, and Lightning's step is.
    run.log({**charts, _STEP: step})
    run.summary[_logged(_FINDINGS, prefix)] = "\n".join(finding_lines(history))


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


def _logged(key: str, prefix: str) -> str:
    """The key as ``WandbLogger`` writes it."""
    return f"{prefix}-{key}" if prefix else key


def _layer_part(key: str) -> str:
    """What follows the section of a key; the same for every quantity of a layer."""
    return key.partition("/")[2]
