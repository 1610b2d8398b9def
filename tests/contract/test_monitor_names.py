"""Contract C28 and C30: names that trip over formats, and machines that do not speak UTF-8."""

import io
import json
import locale
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from contract.monitored import Memory, Weights, assert_true, fit
from nets import Net
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from pl_layer_rotation import LayerRotationMonitor, RotationHistory

HOSTILE = [
    "a/b",
    "a b",
    "a[0]",
    "a:b",
    "a'b\"c`d",
    "<b>bold</b>",
    "</script><script>alert(1)</script>",
    "é",
    "è",
    "E",
    "e",
    "__proto__",
    "constructor",
    "{{ name }}",
    "~/up\\down",
    "nul\u2028line",
    "x" * 300,
]


class Hostile(Net):
    """A chain of layers with these names."""

    def __init__(self) -> None:
        super().__init__()
        for name in HOSTILE:
            self.body.add_module(name, nn.Linear(6, 6, bias=False))


class Elements(HTMLParser):
    """The kinds of elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.kinds.append(tag)


@pytest.fixture(scope="module")
def run_of_hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LayerRotationMonitor, Memory]:
    folder, saved, memory = tmp_path_factory.mktemp("hostile"), Weights(), Memory()
    monitor = LayerRotationMonitor(every_n_steps=1)
    fit(monitor, saved, module=Hostile(), logger=[CSVLogger(folder), TensorBoardLogger(folder), memory])
    assert_true(monitor.history, saved)
    return folder, monitor, memory


@pytest.mark.contract("C28")
def test_every_layer_has_a_key_of_its_own_that_no_logger_splits(run_of_hostile: Any) -> None:
    _, monitor, memory = run_of_hostile
    assert set(monitor.history.layer_names) == {"body.0", "head", *(f"body.{name}" for name in HOSTILE)}
    keys = [key for _, metrics in memory.logged[:1] for key in metrics if key.startswith("layer_rotation/")]
    assert len({key.lower() for key in keys}) == len(keys) == len(HOSTILE) + 2
    assert all(re.fullmatch(r"layer_rotation/\d{3}_[0-9A-Za-z_]{1,100}", key) for key in keys)


@pytest.mark.contract("C28", "C30")
def test_no_file_is_named_after_a_layer(run_of_hostile: Any) -> None:
    folder, _, _ = run_of_hostile
    names = {re.sub(r"events\.out\..*", "events", file.name) for file in folder.rglob("*") if file.is_file()}
    assert names == {"metrics.csv", "hparams.yaml", "events", "layer_rotation.jsonl", "layer_rotation.html"}


@pytest.mark.contract("C28")
def test_the_file_gives_the_names_back_and_every_line_is_strict_json(run_of_hostile: Any) -> None:
    folder, monitor, _ = run_of_hostile
    (file,) = folder.rglob("layer_rotation.jsonl")
    assert RotationHistory.load(file) == monitor.history
    lines = file.read_bytes().decode("utf-8").split("\n")
    header, *rows = [json.loads(line, parse_constant=pytest.fail) for line in lines if line]
    assert [layer["name"] for layer in header["layers"]] == monitor.history.layer_names
    assert [row["step"] for row in rows] == monitor.history.steps


@pytest.mark.contract("C28")
def test_the_page_holds_the_names_as_text_and_never_as_markup(run_of_hostile: Any, tmp_path: Path) -> None:
    folder, monitor, _ = run_of_hostile
    (page,) = folder.rglob("layer_rotation.html")
    tame = RotationHistory([f"layer{i}" for i in range(len(monitor.history.layer_names))], monitor.history.layer_shapes)
    from pl_layer_rotation.report.page import write_page

    for step, row in enumerate(monitor.history.values("rotation").tolist(), start=1):
        tame.append(step, rotation=row)
    write_page(tmp_path / "tame.html", {"run": tame})
    kinds = []
    for file in (page, tmp_path / "tame.html"):
        elements = Elements()
        elements.feed(file.read_text(encoding="utf-8"))
        kinds.append({kind: elements.kinds.count(kind) for kind in ("script", "b", "iframe", "img", "style")})
    assert kinds[0] == kinds[1]


class Foreign(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body.add_module("größe→", nn.Linear(6, 6))


@pytest.fixture
def ascii_files(tmp_path: Path) -> Iterator[None]:
    """What `open` writes without being told is ASCII: stricter than the code pages of Windows."""
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    with (tmp_path / "probe").open("w") as probe:
        if "UTF" in probe.encoding.upper():
            pytest.skip("Python writes UTF-8 here whatever the locale")
    (tmp_path / "probe").unlink()
    yield
    locale.setlocale(locale.LC_CTYPE, before)


@pytest.mark.contract("C30")
def test_files_are_utf_8_on_a_machine_that_is_not(tmp_path: Path, ascii_files: None) -> None:
    saved, monitor = Weights(), LayerRotationMonitor(every_n_steps=1)
    fit(monitor, saved, module=Hostile(), default_root_dir=tmp_path)
    assert RotationHistory.load(tmp_path / "layer_rotation.jsonl") == monitor.history
    assert "body.é" in (tmp_path / "layer_rotation.html").read_bytes().decode("utf-8")


@pytest.mark.contract("C30")
@pytest.mark.parametrize("with_rich", [True, False], ids=["rich", "plain"])
def test_a_console_that_cannot_show_a_name_gets_the_table_all_the_same(
    with_rich: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr("sys.stdout", console)
    if not with_rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    fit(LayerRotationMonitor(every_n_steps=1), module=Foreign(), default_root_dir=tmp_path)
    console.seek(0)
    printed = console.read()
    assert "Layer rotation after 8 steps" in printed
    assert "body.gr" in printed
    assert "größe→" in (tmp_path / "layer_rotation.html").read_bytes().decode("utf-8")
