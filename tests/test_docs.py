"""The docs run, build without a warning, and show nothing that no committed result shows."""

import doctest
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import torch
import wandb
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pl_layer_rotation
from pl_layer_rotation import RotationHistory

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]
# Python that is shown, and what a page needs without showing it: `<!-- setup`, code, `-->`.
BLOCK = re.compile(
    r"^(?P<indent> *)(?:```(?P<kind>python|pycon)|<!-- (?P<setup>setup))\n(?P<code>.*?)\n(?P=indent)(?:```|-->)$",
    re.MULTILINE | re.DOTALL,
)
GENERATED = re.compile(r"<!-- table: .*?<!-- end -->", re.DOTALL)
IMAGE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<path>[^)]+)\)")


class Block(NamedTuple):
    kind: str
    code: str
    line: int


class Net(pl.LightningModule):
    """What pages call `Net`: two layers that train in no time."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc2(self.fc1(images).relu())

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def given_names() -> dict[str, Any]:
    """What every page takes as given."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 8), torch.randint(2, (32,)))
    public = {name: getattr(pl_layer_rotation, name) for name in pl_layer_rotation.__all__}
    loaders = {"train_loader": DataLoader(data, batch_size=8), "validation_loader": DataLoader(data, batch_size=8)}
    return {**public, **loaders, "pl": pl, "torch": torch, "nn": nn, "wandb": wandb, "Net": Net, "net": Net()}


def blocks(text: str) -> Iterator[Block]:
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(found["kind"] or found["setup"], textwrap.dedent(found["code"]), line)


def run(block: Block, page: Path, names: dict[str, Any]) -> None:
    if block.kind != "pycon":
        # Empty lines in front make the numbers in a traceback those of the page.
        exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        return
    example = doctest.DocTestParser().get_doctest(block.code + "\n", names, page.name, str(page), block.line)
    said: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(example, out=said.append, clear_globs=False)
    names.update(example.globs)
    assert results.failed == 0, "".join(said)


def load(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{Path(file).stem}", DOCS / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    names = given_names()
    for block in blocks(page.read_text(encoding="utf-8")):
        if "Muon" not in block.code or hasattr(torch.optim, "Muon"):  # it came with torch 2.9
            run(block, page, names)
    wandb.finish()


def test_the_whole_program_of_the_first_page_says_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "index.md").read_text(encoding="utf-8")
    (program,) = [block for block in blocks(page) if "load_digits" in block.code]
    names: dict[str, Any] = {}
    run(program, DOCS / "index.md", names)
    assert [finding.code for finding in names["monitor"].history.findings()] == ["D"]  # the rate is too low
    assert (tmp_path / "lightning_logs" / "version_0" / "layer_rotation.html").is_file()


def test_code_that_fails_or_prints_something_else_is_found() -> None:
    page = 'Text\n\n=== "tab"\n\n    ```python\n    x = 1\n    ```\n\n<!-- setup\ny = x\n-->\n\n```pycon\n>>> x + y\n3\n```\n'
    indented, setup, printed = blocks(page)
    assert (indented, setup) == (Block("python", "x = 1", 5), Block("setup", "y = x", 9))
    with pytest.raises(AssertionError, match=r"Expected:\n +3\n +Got:\n +2\n"):
        run(printed, Path("page.md"), {"x": 1, "y": 1})
    with pytest.raises(NameError, match="name 'x' is not defined"):
        run(setup, Path("page.md"), {})


@pytest.mark.parametrize("page", load("tables.py").PAGES)
def test_tables_are_those_of_the_committed_results(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert load("tables.py").rewritten(text) == text, "run `python docs/tables.py`"


@pytest.mark.parametrize("page", PAGES[:-1], ids=lambda page: page.name)
def test_measured_numbers_stand_in_generated_tables_only(page: Path) -> None:
    by_hand = GENERATED.sub("", page.read_text(encoding="utf-8"))
    rows = [line for line in by_hand.splitlines() if line.startswith("|") and "::test_" not in line]
    assert [row for row in rows if re.search(r"\d\.\d|\d ?%", row)] == []


@pytest.mark.parametrize("name", load("pictures.py").pictures())
def test_a_picture_shows_the_committed_curves(name: str) -> None:
    pictures = load("pictures.py")
    quantity, recorded = pictures.pictures()[name]
    figure = pictures.picture(RotationHistory.load(DOCS / "results" / f"{recorded}.jsonl"), quantity)
    drawn = (DOCS / name).read_text(encoding="utf-8")
    assert f"<!-- curves: {pictures.fingerprint(figure)} -->" in drawn, "run `python docs/pictures.py`"


def test_every_picture_is_made_by_a_script_and_has_a_text() -> None:
    scripts = "".join(file.read_text(encoding="utf-8") for file in [*DOCS.glob("*.py"), *ROOT.glob("benchmarks/*.py")])
    # `run.py pictures mnist` draws mnist-features.png, which is called paper-mnist-features.png among the docs.
    studies = (ROOT / "examples" / "paper" / "pictures.py").read_text(encoding="utf-8")
    kinds = re.findall(r"(\w+)\.png", studies)
    made = {*load("pictures.py").pictures(), *(f"paper-mnist-{kind}.png" for kind in kinds)}
    for page in PAGES[:-1]:
        for image in IMAGE.finditer(page.read_text(encoding="utf-8")):
            assert image["path"] in made or f'"{Path(image["path"]).stem}' in scripts, f"{page.name}: {image['path']}"
            assert len(image["text"]) > 20, f"{page.name}: {image['path']} needs a text for those who do not see it"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={folder}"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page_in_its_navigation(site: Path) -> None:
    navigation = (site / "index.html").read_text(encoding="utf-8")
    for page in PAGES[:-1]:
        assert (site / f"{page.stem}.html").is_file()
        assert f'href="{page.stem}.html"' in navigation or page.stem == "index", f"add {page.name} to mkdocs.yml"


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loads = re.compile(r'<(?:script|img|iframe|source)[^>]*\bsrc="([^"]+)"|<link[^>]*\bhref="([^"]+)"|url\(([^)]+)\)')
    for file in [*site.rglob("*.html"), *site.rglob("*.css")]:
        for found in loads.finditer(file.read_text(encoding="utf-8")):
            target = next(filter(None, found.groups())).strip("'\"")
            assert not target.startswith(("http:", "https:", "//")), f"{file.name}: {target}"


@pytest.mark.parametrize("name", pl_layer_rotation.__all__)
def test_a_public_name_has_an_entry_with_its_docstring(site: Path, name: str) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    entry = page.split(f'id="pl_layer_rotation.{name}"', 1)[1].split('id="pl_layer_rotation.', 1)[0]
    summary = getattr(pl_layer_rotation, name).__doc__.split()[:2]
    assert " ".join(summary) in " ".join(re.sub(r"<[^>]+>", "", entry).split())


def test_nothing_of_sphinx_is_left_on_the_site(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    assert re.findall(r":(?:class|func|meth|attr|math):|\\frac|\\mathrm|\.\. math|Example::", page) == []


def test_formulas_and_roles_become_markdown() -> None:
    docstring = "Is :math:`\\frac{1}{2} x^{-3}`, see :func:`~pl_layer_rotation.Layca` and :meth:`step`::\n\nExample::\n\n    >>> 1\n"
    assert load("docstrings.py").plain_markdown(docstring, "Layca") == (
        "Is *(1 / 2) x<sup>-3</sup>*, see [`Layca`][pl_layer_rotation.Layca] and [`step`][pl_layer_rotation.Layca.step]:\n\n"
        "Examples:\n    >>> 1\n"
    )
    with pytest.raises(ValueError, match=r"docs/docstrings\.py does not know a command in the formula '\\\\int x'\."):
        load("docstrings.py").plain_markdown(":math:`\\int x`", "Layca")


def test_links_to_files_of_the_repository_become_their_names() -> None:
    text = load("site_hooks.py").on_page_markdown("[`run`](../examples/gpt.py), [plan](../README.md), [x](../gone.md)")
    assert text == "`run`, plan (`README.md`), [x](../gone.md)"
