"""What pages, comparisons, findings and suggestions refuse to read, and the facts that pages turn into plain ones."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from histories import history_of

from pl_layer_rotation.report.compare import render_comparison, write_comparison
from pl_layer_rotation.report.comparison import compare, judged_by
from pl_layer_rotation.report.findings import findings
from pl_layer_rotation.report.page import render_page, write_page
from pl_layer_rotation.report.suggestion import suggest_lr

READERS = {
    "render_page": render_page,
    "write_page": partial(write_page, "page.html"),
    "render_comparison": render_comparison,
    "write_comparison": partial(write_comparison, "page.html"),
    "compare": compare,
    "judged_by": judged_by,
}


@pytest.fixture(params=READERS.values(), ids=READERS)
def read(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    return request.param


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        (history_of([0.1]), "must be a mapping from names to histories, got RotationHistory. Pass {name: history}."),
        ([history_of([0.1])], "must be a mapping from names to histories, got list. Pass {name: history}."),
        (
            {0.1: history_of([0.1]), 0.01: history_of([0.2])},
            "must have names that are text, got 0.1. Pass {str(name): history}.",
        ),
        ({"one": "run.jsonl", "two": "b"}, "must hold histories, got str for 'one'. Pass {name: history}."),
    ],
    ids=["one history", "a list", "numbers for names", "paths"],
)
def test_what_is_no_mapping_from_text_to_histories_is_refused(histories: Any, message: str, read: Any) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(f'`histories` {message}')}$"):
        read(histories)
    assert not list(Path().iterdir())


def test_a_fact_that_no_page_can_hold_is_named(read: Any) -> None:
    runs = {"one": history_of([0.1], net={"tags": {"a"}}), "two": history_of([0.1])}
    with pytest.raises(
        ValueError, match=r"^`facts` must hold .*, got set in 'net\.tags'\. Convert it, or leave it out\.$"
    ):
        read(runs)


def test_pages_show_scalars_of_other_libraries_as_numbers_and_leave_the_histories_alone() -> None:
    runs = {"one": history_of([0.1, 0.3]), "two": history_of([0.2, 0.5])}
    later = {
        "learning_rate": np.float32(0.125),
        "data": Path("sets"),
        "metrics": {"val_acc": torch.tensor(0.75), "val_loss": np.float16(0.5)},
    }
    runs["one"].facts.update(later)
    plain = {
        "one": history_of([0.1, 0.3], learning_rate=0.125, data="sets", metrics={"val_acc": 0.75, "val_loss": 0.5})
    }
    plain["two"] = runs["two"]
    for render in (render_page, render_comparison):
        assert render(runs) == render(plain)
    assert runs["one"].facts == later
    assert compare(runs).runs[0].metric is None  # of one run only
    assert compare(runs, "val_acc").runs[0].metric == 0.75


@pytest.mark.parametrize(
    ("ask", "argument", "got"),
    [
        (lambda: suggest_lr([history_of([0.1])] * 2), "history", "list"),
        (lambda: suggest_lr(history_of([0.1]), [history_of([0.1])]), "others", "list"),
        (lambda: history_of([0.1]).suggest_lr("run.jsonl"), "others", "str"),
        (lambda: findings({"run": history_of([0.1])}), "history", "dict"),
        (lambda: findings(None), "history", "NoneType"),
    ],
)
def test_what_is_no_history_is_refused_by_name(ask: Callable[[], object], argument: str, got: str) -> None:
    message = (
        f"`{argument}` must be a RotationHistory, got {got}. "
        "Pass `monitor.history` or `RotationHistory.load(path)`; several as arguments of their own."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        ask()


def test_a_rate_that_was_added_as_a_scalar_counts_as_a_saved_one_does() -> None:
    run = history_of([0.0])
    run.facts["learning_rate"] = np.float32(0.5)
    assert suggest_lr(run).lr == 50.0
