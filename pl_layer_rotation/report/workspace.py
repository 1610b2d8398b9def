"""The saved W&B dashboard of a project: rotation of every layer, aggregates, runs against their metric."""

import json
import re
import warnings
from importlib import import_module
from typing import Any

from pl_layer_rotation.report.measures import STRAIGHT
from pl_layer_rotation.report.wandb_sink import chart_keys, logged_key

NAME = "Layer rotation"
# By this name, which stands in its address, W&B finds a saved view: saving again finds the one that is there.
_VIEW = "layerrotation"
_STEP = "trainer/global_step"
_NOT_IN_A_NAME = r"[/\\#?%:\s]"


def entity_and_project(text: str) -> tuple[str, str]:
    """The two parts of ``ENTITY/PROJECT``, as W&B's own addresses have them.

    Args:
        text: a user or team, a slash, and one of its projects.

    Raises:
        ValueError: If it is anything else.

    Example::

        >>> entity_and_project("my-team/digits")
        ('my-team', 'digits')

    """
    entity, slash, project = text.partition("/")
    if not slash or not _is_name(entity) or not _is_name(project):
        raise ValueError(
            f"`ENTITY/PROJECT` must be a W&B user or team and one of its projects, got {text!r}. "
            "Take both from the address of the project, https://wandb.ai/ENTITY/PROJECT."
        )
    return entity, project


def workspace_json(entity: str, project: str, metric: str = "val_loss", prefix: str = "") -> str:
    """What :func:`save_workspace` would save for a project without such a view, as indented JSON. Needs no account.

    Args:
        entity: W&B user or team.
        project: its project.
        metric: key of the metric that runs are judged by; rotation and straightness are drawn against it.
        prefix: the ``prefix`` of the runs' ``WandbLogger``.

    Raises:
        ValueError: If ``entity`` or ``project`` is no name that W&B allows.
        ModuleNotFoundError: If wandb-workspaces is not installed.

    Example::

        >>> view = json.loads(workspace_json("my-team", "digits"))
        >>> view["displayName"], view["name"]
        ('Layer rotation', 'nw-layerrotation-v')

    """
    view = _new_workspace(entity, project, metric, prefix)._to_model()
    return json.dumps(json.loads(view.model_dump_json(by_alias=True, exclude_none=True)), indent=2, ensure_ascii=False)


def save_workspace(entity: str, project: str, metric: str = "val_loss", prefix: str = "") -> str:
    """Save the dashboard as a view of a project, or bring the one that is there up to date.

    There is one such view a project, however often this is called. In a view that is there only the section *Layer
    rotation* is replaced; what its users changed elsewhere (other sections, filters, colours) stays.

    Args:
        entity: W&B user or team.
        project: its project; it must exist.
        metric: key of the metric that runs are judged by; rotation and straightness are drawn against it.
        prefix: the ``prefix`` of the runs' ``WandbLogger``.

    Returns:
        The view's address.

    Raises:
        ValueError: If ``entity`` or ``project`` is no name that W&B allows, there is no such project, or this machine
            is not logged in to W&B.
        ModuleNotFoundError: If wandb-workspaces is not installed.

    Example::

        >>> save_workspace("my-team", "digits", metric="val_acc")  # doctest: +SKIP
        'https://wandb.ai/my-team/digits?nw=layerrotation'

    """
    new = _new_workspace(entity, project, metric, prefix)
    from wandb.errors import UsageError

    try:
        saved = _saved_workspace(entity, project)
    except UsageError as error:
        raise ValueError(
            f"`WANDB_API_KEY` must be set to save a workspace, got none ({error}). "
            "Set it, or run `wandb login` once; without an account, look at what would be saved (`--dry-run`)."
        ) from error
    if saved is None:
        saved = new
    else:
        others = [section for section in saved.sections if section.name != NAME]
        saved.sections = [*new.sections, *others]
    return str(saved.save().url)


def _new_workspace(entity: str, project: str, metric: str, prefix: str) -> Any:
    entity_and_project(f"{entity}/{project}")
    ws, wr = _library()

    def key(name: str) -> str:
        return logged_key(name, prefix)

    aggregates = {name: key(f"layer_rotation_stats/{name}") for name in ("mean", "min", "max")}
    straightness = key("layer_straightness_stats/median")
    every_layer = re.sub(r"[.^$*+?()\[\]{}|\\]", r"\\\g<0>", key("layer_rotation/"))
    panels = [
        wr.LinePlot(
            title="Rotation of every layer",
            x=_STEP,
            metric_regex=f"^{every_layer}.+$",
            title_x="optimizer steps",
            title_y="cosine distance from initialization",
            range_y=(0, None),
        ),
        wr.LinePlot(
            title="Rotation: mean, min and max over layers",
            x=_STEP,
            y=list(aggregates.values()),
            title_x="optimizer steps",
            title_y="cosine distance from initialization",
            range_y=(0, None),
        ),
        wr.LinePlot(
            title=f"Straightness: above {STRAIGHT} the learning rate is too low",
            x=_STEP,
            y=[straightness],
            title_x="optimizer steps",
            title_y="times a random walk (median over layers)",
        ),
        wr.MediaBrowser(
            title="Charts: curves by depth, final rotation by layer, depth over steps",
            media_keys=chart_keys(prefix),
            num_columns=1,
        ),
        wr.ScatterPlot(
            title=f"Mean rotation and {metric}",
            x=wr.SummaryMetric(aggregates["mean"]),
            y=wr.SummaryMetric(metric),
        ),
        wr.ScatterPlot(
            title=f"Straightness and {metric}",
            x=wr.SummaryMetric(straightness),
            y=wr.SummaryMetric(metric),
        ),
        wr.RunComparer(diff_only="split"),
    ]
    for number, panel in enumerate(panels):
        # Instead of a random one, so that the same workspace is the same text.
        panel._id = f"layerrotation{number}"
    section = ws.Section(
        name=NAME,
        is_open=True,
        panels=panels,
        layout_settings=ws.SectionLayoutSettings(columns=2, rows=4),
    )
    # The project's other metrics keep their automatic panels, below ours.
    workspace = ws.Workspace(entity=entity, project=project, name=NAME, sections=[section], auto_generate_panels=True)
    # The library has no argument for it, and would make up another name at every call.
    workspace._internal_name = f"nw-{_VIEW}-v"
    return workspace


def _saved_workspace(entity: str, project: str) -> Any | None:
    ws, _ = _library()
    try:
        # Of the address only the path and the view's name are read: the server is the one that wandb is set up for.
        return ws.Workspace.from_url(f"https://wandb.ai/{entity}/{project}?nw={_VIEW}")
    except ValueError as error:
        if f"Workspace `{_VIEW}` not found" in str(error):
            return None
        raise


def _library() -> tuple[Any, Any]:
    """Workspaces and their panels; type checkers cannot see through the library's exports."""
    try:
        with warnings.catch_warnings():
            # It declares its types in a way that pydantic deprecates; nobody here can change that.
            warnings.simplefilter("ignore", DeprecationWarning)
            return import_module("wandb_workspaces.workspaces"), import_module("wandb_workspaces.reports.v2")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The W&B workspace needs wandb-workspaces. Run `pip install 'pl-layer-rotation[workspace]'`.",
            name=error.name,
        ) from error


def _is_name(text: str) -> bool:
    return bool(text) and not re.search(_NOT_IN_A_NAME, text)
