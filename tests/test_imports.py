"""Who may import whom, what an import may cost, and that every public name shows an example."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pl_layer_rotation

PACKAGE = Path(pl_layer_rotation.__file__).parent
SOURCES = {file.relative_to(PACKAGE).with_suffix("").as_posix(): file for file in sorted(PACKAGE.rglob("*.py"))}
HEAVY = {"plotly", "wandb"}
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}

# Two chains, each module seeing only what stands left of it: measuring and turning, recording and reporting. The
# monitor and the package itself tie them together.
ANY = set(SOURCES)
REPORT = {"history", *(name for name in SOURCES if name.startswith("report/"))}
MAY_IMPORT: dict[str, set[str]] = {
    "layer_selection": {"_sharding"},
    "_geometry": set(),
    "_sharding": set(),
    "_base_optimizer": {"_geometry"},
    "_direction_check": {"_base_optimizer"},
    "_numbers": set(),
    "learning_rate": {"_numbers"},
    "metric": {"layer_selection", "_geometry", "_sharding"},
    "param_groups": {"layer_selection", "_sharding", "_numbers", "_options"},
    "_scratch": {"_geometry", "_sharding", "_base_optimizer"},
    "_turning": {"_geometry", "_sharding", "_scratch"},
    "_options": {"_geometry", "_numbers", "_scratch", "_sharding"},
    "_initial_norms": {"_geometry", "_scratch", "_sharding", "_options"},
    "_saved_state": {"_base_optimizer", "_options", "_scratch", "_sharding"},
    "layca": {
        *("_base_optimizer", "_direction_check", "_initial_norms", "_options"),
        *("_saved_state", "_scratch", "_turning"),
    },
    "_schedules": set(),
    "configure": {"layer_selection", "param_groups", "learning_rate", "layca", "_base_optimizer", "_schedules"}
    | {"_numbers", "_options"},
    "_running_sums": {"_geometry"},
    "_reference": {"_geometry", "_sharding"},
    "_arguments": {"_numbers"},
    "_cadence": set(),
    "_sidecar": {"_geometry", "_sharding"},
    "_measuring": {"_geometry", "_sharding", "_reference", "_running_sums"},
    "_text_file": set(),
    "_log_keys": set(),
    "_output": {"_lightning", "_log_keys", *REPORT},
    "_lightning": {"layca", "_scratch", "_turning", "layer_selection"},
    "_known_angles": {"_lightning"},
    "_recording": {"_known_angles", "_lightning", "_measuring", "_output", "_reference", "_running_sums", "_sharding"}
    | {"history"},
    "_start_of_training": {"_lightning", "_output", "_recording", "_reference", "_running_sums", "history"}
    | {"layer_selection"},
    "_thinning": set(),
    "_history_file": {"_text_file"},
    "_history_rows": set(),
    "_history_facts": set(),
    "history": {"_thinning", "_history_facts", "_history_file", "_history_rows"},
    **dict.fromkeys(
        REPORT - {"history"}, REPORT | {"_geometry", "_history_facts", "_log_keys", "_numbers", "_text_file"}
    ),
    "cli": REPORT,
    "monitor": ANY,
    "__init__": ANY,
}


def nodes(tree: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    """What runs on import, and what runs in functions where asked; blocks for type checkers never."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from nodes(ast.Module(node.orelse, []), inside_functions)
            continue
        yield node
        if inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from nodes(node, inside_functions)


def imported(name: str, *, inside_functions: bool = False) -> set[str]:
    """Full names that a source file of the package imports."""
    found: set[str] = set()
    for node in nodes(ast.parse(SOURCES[name].read_text(encoding="utf-8")), inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import, line {node.lineno}"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def siblings(name: str) -> set[str]:
    """Modules of the package among what a source file imports when it is imported itself."""
    own = [
        full.removeprefix("pl_layer_rotation.").replace(".", "/") for full in imported(name) if full.startswith("pl_")
    ]
    return {module for module in own if module in SOURCES}


def top_level(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_the_table_for_contributors_names_every_module() -> None:
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = "".join(line for line in page.splitlines() if line.startswith("|"))
    named = [Path(name).name for name in re.findall(r"`([\w/]+\.py)`", table)]
    assert sorted(named) == sorted(file.name for file in SOURCES.values() if file.name != "__init__.py")


@pytest.mark.parametrize("name", SOURCES)
def test_each_module_imports_only_what_stands_before_it(name: str) -> None:
    assert name in MAY_IMPORT, f"say in MAY_IMPORT where {name} stands"
    assert siblings(name) <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", [name for name in SOURCES if not name.startswith("report/")])
def test_nothing_outside_of_report_imports_plotly_or_wandb_at_module_level(name: str) -> None:
    assert not top_level(imported(name)) & HEAVY


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("report/")])
def test_report_never_imports_lightning(name: str) -> None:
    assert not top_level(imported(name, inside_functions=True)) & LIGHTNING


def test_the_rules_see_the_imports_that_they_are_about() -> None:
    assert siblings("metric") == {"layer_selection", "_geometry", "_sharding"}
    assert "plotly" in top_level(imported("report/figures"))
    everywhere = imported("history", inside_functions=True)
    assert "plotly" not in top_level(everywhere)
    assert "pl_layer_rotation.report.figures" in everywhere - imported("history")
    assert "layca" in siblings("monitor") | siblings("_lightning")


@pytest.mark.parametrize(
    ("code", "spared"),
    [
        ("import pytorch_lightning\nfrom pl_layer_rotation import *", HEAVY),
        ("from pl_layer_rotation.cli import main\nmain(['--help'], standalone_mode=False)", {"torch"} | LIGHTNING),
        ("from pl_layer_rotation.report import compare, page, runs, table", LIGHTNING),
    ],
    ids=["training", "help of the command", "reading recorded runs"],
)
def test_nobody_waits_for_imports_that_others_need(code: str, spared: set[str]) -> None:
    code += "\nimport sys\nprint()\nprint(*{name.split('.')[0] for name in sys.modules})"
    root = PACKAGE.parent
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=root, check=True
    )
    loaded = set(run.stdout.splitlines()[-1].split())
    assert "pl_layer_rotation" in loaded
    assert not loaded & spared


def test_the_public_names_are_the_documented_ones() -> None:
    assert set(pl_layer_rotation.__all__) == {
        *("LayerRotationMonitor", "LayerRotation", "layer_rotation", "Layca", "layca_optimizers"),
        *("layca_param_groups", "rotation_lr", "select_layers", "RotationHistory"),
    }
    assert list(pl_layer_rotation.__all__) == sorted(pl_layer_rotation.__all__)


def test_type_checkers_are_shown_the_names_that_the_package_imports_at_their_first_use() -> None:
    shown = {
        alias.name: node.module
        for node in ast.walk(ast.parse(SOURCES["__init__"].read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module not in ("importlib", "typing")
        for alias in node.names
    }
    assert sorted(shown) == pl_layer_rotation.__all__
    for name, module in shown.items():
        assert getattr(pl_layer_rotation, name) is getattr(sys.modules[str(module)], name)
    assert set(pl_layer_rotation.__all__) <= set(dir(pl_layer_rotation))


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match=r"^module 'pl_layer_rotation' has no attribute 'LayCa'$"):
        pl_layer_rotation.LayCa  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", pl_layer_rotation.__all__)
def test_every_public_name_shows_an_example(name: str) -> None:
    docstring = inspect.getdoc(getattr(pl_layer_rotation, name)) or ""
    assert "Example::\n\n    >>> " in docstring
    assert len(docstring.splitlines()[0]) > 20
