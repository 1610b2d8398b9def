"""What the page says, and that nothing in it can break out of its place."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from histories import history_of, unpacked

from pl_layer_rotation import RotationHistory
from pl_layer_rotation.report.page import render_page, write_page

EVIL = '</script><b>"x"</b>&\''


class Reader(HTMLParser):
    """Collects the visible text, the rows of all tables, the tags and the data of the figures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self._inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input"):
            self._inside.append(tag)
        self._space_around(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop() == tag
        self._space_around(tag)

    def _space_around(self, tag: str) -> None:
        if tag not in ("bdi", "code"):
            self.words.append(" ")

    def handle_data(self, data: str) -> None:
        if self._inside[-1:] == ["script"]:
            self.scripts[self.tags[-1][1].get("id")] = data
        elif self._inside and "style" not in self._inside:
            self.words.append(data)
            if data.strip() and ("td" in self._inside or "th" in self._inside):
                self.rows[-1].append(data)

    @property
    def figures(self) -> dict[str, Any]:
        return dict(json.loads(unpacked(self.scripts["figures"])))

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def read(**histories: RotationHistory) -> Reader:
    return Reader(render_page(histories))


def test_the_headline_has_the_numbers_that_matter() -> None:
    text = read(run=history_of([0.1, 0.2, 0.3], [0.25, 0.5, 0.75])).text
    assert (
        "After 20 optimizer steps: mean rotation 0.500 over 3 layers; layer0 turned least (0.250), layer2 most (0.750)."
        in text
    )


def test_says_what_the_lines_are_and_promises_nothing() -> None:
    text = read(run=history_of([0.1])).text
    assert "Each line is one layer: how far its weights have turned away from where they started" in text
    assert "A high rotation alone does not mean that a run generalizes better." in text


def test_another_reference_than_the_initialization_is_named() -> None:
    tuned = history_of([0.1], [0.2], reference=f"base{EVIL}.ckpt")
    text = read(run=tuned).text
    assert f"turned away from the reference weights (base{EVIL}.ckpt) (0" in text
    assert f"Cosine distance from the reference weights (base{EVIL}.ckpt)." in text
    assert "initialization" not in text
    assert "from the weights that each run is measured from" in read(run=tuned, other=history_of([0.1])).text


@pytest.mark.parametrize("facts", [{}, {"reference": "init"}])
def test_the_initialization_is_named_where_it_is_the_reference(facts: dict[str, str]) -> None:
    assert "Cosine distance from initialization." in read(run=history_of([0.1], **facts)).text


@pytest.mark.parametrize(
    ("history", "sentence"),
    [
        (RotationHistory([]), "This run has no layers to show."),
        (RotationHistory(["a", "b"]), "This run has 2 layers and no readings yet."),
        (history_of([math.nan, math.nan]), "After 10 optimizer steps none of the 2 layers has a defined rotation."),
        (history_of([0.5]), "After 10 optimizer steps: 1 layer, rotation 0.500 (layer0)."),
    ],
    ids=["no layers", "no readings", "undefined", "one layer"],
)
def test_sparse_runs_are_put_in_words(history: RotationHistory, sentence: str) -> None:
    assert sentence in read(run=history).text
    assert sentence in read(run=history, other=history_of([0.1])).text


def test_findings_stand_under_the_headline() -> None:
    history = RotationHistory(["fc", EVIL])
    history.append(10, rotation=[0.1, 0.0], norm_ratio=[1.0, 1.0])
    text = read(run=history).text
    assert f"fc most (0.100). {EVIL} did not turn at all: its weights never changed." in text
    assert "(layer0). No finding. This does not mean that the run is well tuned." in read(run=history_of([0.1])).text


def test_without_readings_there_are_no_findings() -> None:
    assert "findings" not in [a.get("class") for _, a in read(run=RotationHistory(["a"])).tags]


def test_layer_table_has_every_quantity_that_was_recorded() -> None:
    history = RotationHistory(["conv", "fc"], [(8, 3), ()])
    history.append(10, rotation=[0.5, math.nan], norm_ratio=[1.0, 1234.5], angular_update=[0.0369, 1e-7])
    assert read(run=history).rows == [
        ["depth", "layer", "shape", "final rotation", "norm ratio", "last angular update (rad)"],
        ["0", "conv", "8 \u00d7 3", "0.500", "1.00", "0.0369"],
        ["1", "fc", "unknown", "\u2013", "1,234", "1.00e-07"],
    ]


def test_facts_are_shown_known_or_not() -> None:
    facts = {"optimizer": "SGD", "learning_rate": 1 / 3, "nesterov": True, "seed": None, "betas": [0.9, 0.99]}
    text = read(run=history_of([0.1], **facts, metrics={"val_acc": 0.98765})).text
    for shown in (
        "optimizer steps 10",
        "optimizer SGD",
        "learning rate 0.333",
        "nesterov yes",
        "seed \u2013",
        "betas [0.9, 0.99]",
    ):
        assert shown in text
    assert "val_acc 0.988" in text


def test_facts_begin_with_what_readers_look_for() -> None:
    facts = {"module": "Net", "precision": "32-true", "devices": 2, "strategy": "DDPStrategy", "learning_rate": 0.1}
    unseen = {"reference_steps": {"layer0": 10}, "reference_resolution": 3e-6, "not_finite": []}
    text = read(run=history_of([0.1], **facts, optimizer="SGD", total_steps=500, **unseen)).text
    facts_shown = text.partition("About this run ")[2]
    assert facts_shown.startswith(
        "optimizer SGD learning rate 0.1 optimizer steps 10 strategy DDPStrategy devices 2 precision 32-true module Net"
        " planned steps 500 How to read"
    )


def test_comparison_has_recipe_rotation_metrics_and_what_differs() -> None:
    one = history_of([0.2, 0.4], optimizer="SGD", learning_rate=0.1, devices=2, seed=1, metrics={"acc": 0.9})
    two = history_of([0.5, 0.7], optimizer="SGD", devices=2, seed=2)
    assert read(one=one, two=two).rows[:3] == [
        ["run", "optimizer", "learning rate", "mean rotation", "min", "max", "straightness", "acc", "seed"],
        ["one", "SGD", "0.1", "0.300", "0.200", "0.400", "\u2013", "0.900", "1"],
        ["two", "SGD", "\u2013", "0.600", "0.500", "0.700", "\u2013", "\u2013", "2"],
    ]


def test_runs_are_drawn_on_one_scale() -> None:
    drawn = read(one=history_of([0.2], [0.1]), two=history_of([0.5])).figures
    for i in range(2):
        assert drawn[f"rotation-{i}"]["layout"]["yaxis"]["range"] == [0, 0.52]
        assert drawn[f"final_rotation-{i}"]["layout"]["xaxis"]["range"] == [0, 0.52]
        assert drawn[f"heatmap-{i}"]["layout"]["coloraxis"]["cmax"] == 0.5


def test_each_run_has_its_plots_and_several_an_overview() -> None:
    plots = [attributes for _, attributes in read(one=history_of([0.1]), two=history_of([0.2])).tags]
    ids = [a["id"] for a in plots if a.get("class") == "plot"]
    each = [f"{kind}-{i}" for i in range(2) for kind in ("curves", "final_rotation", "heatmap")]
    assert ids == ["overview-0", "overview-1", *each]


def test_no_text_breaks_out_of_its_place() -> None:
    history = history_of([0.1, 0.2], names=[EVIL, "fc"], **{EVIL: EVIL}, metrics={EVIL: EVIL})
    reader = Reader(render_page({EVIL: history, "other": history}))
    assert "b" not in {tag for tag, _ in reader.tags}
    assert reader.text.count(EVIL) >= 8
    assert sorted(reader.scripts, key=str) == [None, "figures", "plotly"]
    assert reader.figures["rotation-0"]["data"][0]["name"] == EVIL.replace("&", "&amp;").replace("<", "&lt;").replace(
        ">", "&gt;"
    )


def test_nothing_is_loaded_from_elsewhere() -> None:
    tags = read(run=history_of([0.1])).tags
    sources = [a.get("src") or (a.get("href") if tag == "link" else None) for tag, a in tags]
    assert {source for source in sources if source} == {"data:,"}
    policy = [a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0] is not None
    assert policy[0].startswith("default-src 'none'; script-src 'sha256-")


def test_the_policy_permits_the_two_scripts_of_the_page_and_no_other() -> None:
    reader = read(run=history_of([0.1]))
    policy = next(a["content"] or "" for _, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    permitted = next(part for part in policy.split("; ") if part.startswith("script-src "))
    scripts = [reader.scripts[None] or "", unpacked(reader.scripts["plotly"])]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert permitted == "script-src " + " ".join(f"'sha256-{digest}'" for digest in digests)


def test_head_is_complete() -> None:
    page = render_page({"my run": history_of([0.1])})
    for part in ('<html lang="en">', '<meta charset="utf-8">', 'name="viewport"'):
        assert part in page
    assert re.findall("<title>(.*)</title>", page.split("<style>")[0]) == ["Layer rotation: my run"]


def test_plotly_is_there_once_and_small() -> None:
    page = render_page({"one": history_of([0.1]), "two": history_of([0.2])})
    assert unpacked(Reader(page).scripts["plotly"]).count("* plotly.js v") == 1
    assert len(page) < 2_200_000


def test_500_layers_and_500_readings_stay_below_three_megabytes() -> None:
    history = RotationHistory([f"encoder.block{i}.attention.projection" for i in range(500)], [(64, 64)] * 500)
    for step in range(1, 501):
        values = [math.sin(step * depth) ** 2 for depth in range(1, 501)]
        history.append(step, rotation=values, angular_update=values, norm_ratio=values, straightness=values)
    page = render_page({"run": history})
    assert len(page) < 3_000_000
    assert len(Reader(page).figures["rotation-0"]["data"][0]["x"]) == 40


def test_same_histories_give_the_same_bytes() -> None:
    def page() -> str:
        return render_page({"run": history_of([0.1, 0.2], optimizer="SGD")})

    assert page() == page()


def test_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    history = history_of([0.1], names=["層"])
    write_page(tmp_path / "new" / "page.html", {"run": history})
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == render_page({"run": history})
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_no_run_at_all_is_refused(tmp_path: Path) -> None:
    message = r"`histories` must hold at least one run, got none\. Pass \{name: history\}\."
    with pytest.raises(ValueError, match=message):
        write_page(tmp_path / "page.html", {})
    assert not (tmp_path / "page.html").exists()
