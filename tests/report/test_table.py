"""The table in the terminal: with rich, as plain text, and on consoles that know ASCII only."""

import builtins
import io
import sys
from typing import Any

import pytest

from pl_layer_rotation import RotationHistory
from pl_layer_rotation.report.findings import NOTHING
from pl_layer_rotation.report.table import print_table, table_rows


def history(layers: int = 2) -> RotationHistory:
    recorded = RotationHistory([f"[red]layer{i}" for i in range(layers)], [(8, i + 1) for i in range(layers)])
    recorded.append(7, rotation=[0.25] * layers, norm_ratio=[float("nan")] * layers)
    return recorded


@pytest.fixture
def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def fails(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fails)


def test_rows_are_in_depth_order_with_three_digits() -> None:
    assert table_rows(history()) == [
        ("0", "[red]layer0", "8 × 1", "0.250", "-", "-"),
        ("1", "[red]layer1", "8 × 2", "0.250", "-", "-"),
    ]


def test_rich_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(history())
    printed = capsys.readouterr().out
    assert "Layer rotation after 7 steps" in printed
    assert "[red]layer1" in printed


@pytest.mark.usefixtures("without_rich")
def test_without_rich_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(history())
    title, head, *rows, findings = capsys.readouterr().out.splitlines()
    assert title == "Layer rotation after 7 steps"
    assert [row.index("0.250") for row in rows] == [head.index("rotation")] * 2
    assert findings == NOTHING


@pytest.mark.usefixtures("without_rich")
def test_a_console_without_the_signs_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    print_table(history(100))
    sys.stdout.flush()
    printed = raw.getvalue().decode("ascii")
    assert "8 x 1" in printed
    assert "... 40 more layers" in printed


def test_a_history_without_readings_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(RotationHistory(["a"]))
    assert "Layer rotation: no reading" in capsys.readouterr().out


@pytest.mark.parametrize("plain", [False, True], ids=["rich", "plain"])
def test_findings_follow_the_table_with_names_as_they_are(
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest, plain: bool
) -> None:
    if plain:
        request.getfixturevalue("without_rich")
    recorded = RotationHistory(["fc", "[red]\x1b[2Jout\n"])
    recorded.append(7, rotation=[0.25, 0.0], norm_ratio=[1.0, 1.0])
    print_table(recorded)
    *_, line = capsys.readouterr().out.replace("without \n", "without ").split("`[", 1)
    assert line.startswith("red] [2Jout ` did not turn at all")


def test_a_history_without_readings_has_no_findings(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(RotationHistory(["a"]))
    assert "finding" not in capsys.readouterr().out
