"""Which run turned most, which did best, and whether the two go together."""

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from histories import history_of
from scipy.stats import spearmanr

from pl_layer_rotation import RotationHistory
from pl_layer_rotation.report.compare import render_comparison, write_comparison
from pl_layer_rotation.report.comparison import compare, correlation, headline, judged_by, spearman


def runs_of(*metrics: dict[str, float]) -> dict[str, RotationHistory]:
    """A run for each, the n-th turned by a tenth of n."""
    return {f"run{i}": history_of([0.1 * i, 0.1 * i + 0.02], metrics=own) for i, own in enumerate(metrics, start=1)}


def straight(value: float, readings: int = 30) -> RotationHistory:
    history = RotationHistory(["a", "b", "c"])
    for step in range(1, readings + 1):
        history.append(step, rotation=[0.1] * 3, angular_update=[0.01] * 3, straightness=[value - 0.5, value, 9.0])
    return history


@pytest.mark.parametrize("distinct", [2, 5, 1000], ids=["mostly ties", "some ties", "hardly any"])
@pytest.mark.parametrize("count", [4, 7, 200])
def test_rank_correlation_is_scipys(count: int, distinct: int) -> None:
    draw = random.Random(count * distinct)
    first = [float(draw.randrange(distinct)) for _ in range(count)] + [0.0, 1.0]
    second = [value + draw.randrange(distinct) for value in first]
    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("first", "second"),
    [([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), ([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]), ([1.0, 2.0, 3.0, 4.0], [2.0] * 4)],
    ids=["too few", "first equal", "second equal"],
)
def test_no_rank_correlation_where_there_is_none(first: list[float], second: list[float]) -> None:
    assert spearman(first, second) is None


def test_rank_correlation_takes_runs_that_have_both_numbers() -> None:
    runs = runs_of(*({"val_loss": loss} for loss in (0.9, 0.7, 0.8, 0.1)), {}, {"val_loss": math.nan})
    runs["undefined"] = history_of([math.nan], metrics={"val_loss": 0.5})
    comparison = compare(runs)
    assert correlation(comparison, "mean") == (pytest.approx(-0.8, rel=1e-12), 4)
    assert correlation(comparison, "straightness") == (None, 0)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train_acc", "val_loss"], ("val_loss", "min")),
        (["val_loss", "val_acc"], ("val_acc", "max")),
        (["loss", "train_f1"], ("train_f1", "max")),
        (["interval_acc", "device_loss", "Valid/loss"], ("Valid/loss", "min")),
        (["valid/error"], ("valid/error", "min")),
        (["val_AUROC", "epoch_time"], ("val_AUROC", "max")),
        (["epoch_time", "lr"], (None, None)),
        ([], (None, None)),
    ],
)
def test_metric_and_direction_are_read_from_the_names(names: list[str], expected: tuple[Any, Any]) -> None:
    metrics = dict.fromkeys(names, 0.5)
    assert judged_by(runs_of(metrics, metrics)) == expected


LARGER = [
    *("val_acc", "val/acc", "accuracy", "val_accuracy", "valAcc", "val-acc", "acc1", "acc@5", "top5", "testacc"),
    *("f1", "macro_f1", "valF1", "auc", "roc_auc", "auroc", "val_AUROC", "mAP", "val_mAP50", "val_map", "AP"),
    *("IoU", "val_mIoU", "MeanIoU", "val_r2", "R2Score", "bleu4", "val_transferred_acc", "val_supplement_acc"),
    *("BinaryAccuracy", "MulticlassF1Score", "BinaryAUROC", "MulticlassJaccardIndex", "SacreBLEUScore"),
    *("MulticlassPrecision", "BinaryRecall", "MeanAveragePrecision", "DiceScore"),
]
SMALLER = [
    *("loss", "val_loss", "train_loss", "valLoss", "val/loss", "loss_epoch", "loss2", "celoss", "l1_loss"),
    *("error", "err", "top1_err", "val_error", "errors", "mse", "mae", "valRMSE", "rmse", "ppl", "perplexity", "nll"),
    *("MeanSquaredError", "WordErrorRate", "Perplexity", "HingeLoss", "acc_loss", "dice_loss", "MSELoss"),
]


@pytest.mark.parametrize(("name", "mode"), [*((name, "max") for name in LARGER), *((name, "min") for name in SMALLER)])
def test_words_say_what_is_better(name: str, mode: str) -> None:
    assert judged_by(runs_of({name: 0.5}, {name: 0.6})) == (name, mode)


@pytest.mark.parametrize(
    "name",
    [
        *("val_layer2_norm", "val_accumulated_time", "val_decoder2_len", "transferred", "supplement", "accelerator"),
        *("lossless_size", "terrain", "Interrupts", "caption", "top", "stop1", "f16", "epoch"),
    ],
)
def test_parts_of_other_words_say_nothing(name: str) -> None:
    assert judged_by(runs_of({name: 0.5}, {name: 0.6})) == (None, None)


def test_metric_of_one_run_only_judges_nobody_unless_asked() -> None:
    runs = runs_of({"val_acc": 0.5}, {"val_loss": 0.5}, {"val_loss": "broken", "train_loss": True})
    assert judged_by(runs) == (None, None)
    assert judged_by(runs, "val_acc") == ("val_acc", "max")
    assert judged_by(runs, "val_acc", "min") == ("val_acc", "min")


def test_metric_that_no_run_has_is_refused_with_those_that_are_known() -> None:
    message = r"^`metric` must be one that a run has \(acc, loss\), got 'f1'\.$"
    with pytest.raises(ValueError, match=message):
        judged_by(runs_of({"loss": 1.0}, {"acc": 1.0}), "f1")


def test_direction_must_be_given_where_the_name_does_not_say() -> None:
    runs = runs_of({"speed": 1.0}, {"speed": 2.0})
    message = r"^`mode` must be 'min' or 'max': the name 'speed' does not say which is better\. Pass it\.$"
    with pytest.raises(ValueError, match=message):
        compare(runs, "speed")
    assert compare(runs, "speed", "max").ranked() == [1, 0]


@pytest.mark.parametrize("mode", ["MAX", "larger", True, ""], ids=repr)
def test_mode_that_there_is_not_is_refused_by_all_who_take_it(mode: Any, tmp_path: Path) -> None:
    runs = runs_of({"val_acc": 0.5}, {"val_acc": 0.75})
    message = rf"^`mode` must be 'min', 'max' or None, got {mode!r}\. None reads it from the metric's name\.$"
    for judge in (judged_by, compare, render_comparison, partial(write_comparison, tmp_path / "page.html")):
        for histories in (runs, runs_of({}, {})):
            with pytest.raises(ValueError, match=message):
                judge(histories, mode=mode)
    assert not list(tmp_path.iterdir())


def test_ranked_by_the_metric_and_runs_without_one_last() -> None:
    runs = runs_of({"val_loss": 0.9}, {}, {"val_loss": 0.1}, {"val_loss": 0.5})
    assert compare(runs).ranked() == [2, 3, 0, 1]
    assert compare(runs, mode="max").ranked() == [0, 3, 2, 1]


def test_ranked_by_rotation_where_no_metric_is_shared() -> None:
    assert compare(runs_of({}, {}, {})).ranked() == [2, 1, 0]


def test_summary_has_the_last_defined_rotation_over_layers() -> None:
    history = history_of([0.1, 0.2, 0.3], [0.5, math.nan, 0.2], names=["a", "b", "c"])
    (run, _) = compare({"one": history, "two": RotationHistory([])}).runs
    assert (run.steps, run.layers, run.low, run.high) == (20, 3, 0.2, 0.5)
    assert run.mean == pytest.approx(0.3, rel=1e-12)


def test_straightness_is_the_median_of_the_layers_and_needs_30_readings() -> None:
    comparison = compare({"enough": straight(1.2), "few": straight(1.2, readings=29)})
    assert [run.straightness for run in comparison.runs] == [1.2, None]


def test_headline_says_who_turned_most_and_did_best() -> None:
    assert headline(compare(runs_of({"val_acc": 0.5}, {"val_acc": 0.75}, {"val_acc": 0.25}))) == [
        "`run3` turned most (mean rotation 0.310), `run1` least (0.110).",
        "Best `val_acc` at the end (largest of 3): 0.750 in `run2`.",
    ]


def test_headline_says_that_others_did_as_well() -> None:
    sentences = headline(compare(runs_of({"loss": 0.5}, {"loss": 0.5}, {"loss": 0.5}, {})))
    assert sentences[1] == "Best `loss` at the end (smallest of 3): 0.500 in `run1`, as had 2 others."


@pytest.mark.parametrize(("value", "above"), [(1.7, 0), (1.71, 1)])
def test_headline_counts_runs_straighter_than_the_threshold(value: float, above: int) -> None:
    sentences = headline(compare({"one": straight(value), "two": straight(1.0), "three": history_of([0.1])}))
    assert sentences[-1] == f"{above} of 2 runs had a median straightness above 1.7."


def test_headline_without_readings() -> None:
    runs = {"one": RotationHistory(["fc"]), "two": RotationHistory([])}
    assert headline(compare(runs)) == ["No run has a defined rotation yet."]


def test_settings_are_told_apart_and_nested_ones_named_by_dots() -> None:
    one = history_of([0.1], lr=0.1, seed=1, net={"depth": 3, "wide": True}, betas=[0.9, 0.99], metrics={"a": 1.0})
    two = history_of(
        [0.1], lr=0.2, seed=1, net={"depth": 4, "wide": True}, betas=[0.9, 0.99], dense_steps=7, not_finite=["a"]
    )
    comparison = compare({"one": one, "two": two, "three": history_of([0.1], seed=1, betas=[0.9, 0.99])})
    assert comparison.varied == {"lr": [0.1, 0.2, None], "net.depth": [3, 4, None], "net.wide": [True, True, None]}
    assert comparison.shared == {"seed": 1, "betas": "[0.9, 0.99]"}
    assert comparison.other_metrics == {"a": [1.0, None, None]}
