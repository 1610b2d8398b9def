"""Wrong options, where the weights to measure from live, which angles are read, and what cannot be measured."""

import math
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from contract.cases import skip_on_torch_2_6
from lightning_fabric.utilities.exceptions import MisconfigurationException
from nets import Net, batches, trainer
from processes import launch
from pytorch_lightning.loggers import CSVLogger
from test_layca_strategies import pytestmark as STRATEGY_MARKS
from test_layca_strategies import train
from test_monitor_strategies import OneGroup
from torch import nn

from pl_layer_rotation import Layca, LayerRotationMonitor, RotationHistory, _recording, layca_optimizers, layer_rotation
from pl_layer_rotation import _geometry as geometry
from pl_layer_rotation import monitor as monitor_module
from pl_layer_rotation._measuring import Measuring
from pl_layer_rotation._reference import References

pytestmark = STRATEGY_MARKS


def fit(monitor: LayerRotationMonitor, module: Any = None, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    run = trainer(monitor, *callbacks, **options)
    run.fit(module or Net(), batches())
    return run


def layca(module: pl.LightningModule) -> Any:
    return layca_optimizers(module, lr=0.05, momentum=0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference_device": "cuda"}, "`reference_device` must be 'same' or 'cpu', got 'cuda'"),
        ({"reference_dtype": "int8"}, "`reference_dtype` must be None or one of float64, float32, bfloat16, float16"),
        ({"reference_dtype": torch.int32}, r"`reference_dtype` must be .*, got torch.int32. None keeps"),
        ({"angular_update": "always"}, "`angular_update` must be True, False or 'auto', got 'always'"),
        ({"every_n_steps": 0}, "`every_n_steps` must be an integer of at least 1 or None, got 0"),
        ({"every_n_steps": 2.5}, "`every_n_steps` must be an integer of at least 1 or None, got 2.5"),
        ({"log_quantities": ["speed"]}, r"`log_quantities` must be a list out of rotation, .* got \['speed'\]"),
        ({"log_quantities": "rotation"}, "must be a list out of rotation, .* got 'rotation'"),
        ({"log_quantities": None}, "must be a list out of rotation, .* got None"),
        ({"every_n_steps": True}, "`every_n_steps` must be an integer of at least 1 or None, got True"),
        ({"save_reference": "false"}, "`save_reference` must be True or False, got 'false'"),
        ({"include": 3}, "`include` must hold patterns as strings, got 3"),
        ({"exclude": {"head": 1}}, "`exclude` must hold patterns as strings, got {'head': 1}"),
    ],
)
def test_a_wrong_option_is_named_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        LayerRotationMonitor(**arguments)


def test_a_reference_on_the_host_gives_the_same_curves() -> None:
    histories = []
    for device in ("same", "cpu"):
        monitor = LayerRotationMonitor(report=False, reference_device=device)  # type: ignore[arg-type]
        fit(monitor)
        histories.append(monitor.history)
    assert histories[0] == histories[1]


@pytest.mark.parametrize(("dtype", "angle"), [("bfloat16", 1.7e-3), (torch.float16, 2.1e-4)])
def test_a_rounded_reference_is_off_by_its_rounding(dtype: Any, angle: float) -> None:
    module = nn.Linear(400, 400, bias=False)
    monitor = LayerRotationMonitor(report=False, reference_dtype=dtype)
    frozen = Still(module)
    fit(monitor, frozen)
    (rotation,) = monitor.history.final().values()
    assert math.sqrt(2 * rotation) == pytest.approx(angle, rel=0.15)
    assert rotation < monitor.history.facts["reference_resolution"]
    assert [finding.code for finding in monitor.history.findings()] == ["A"]


class Still(Net):
    """A layer that no optimizer knows."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.body, self.head, self.still = nn.Sequential(nn.Identity()), nn.Identity(), layer
        self.gain = nn.Parameter(torch.ones(7))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int = 0) -> torch.Tensor:
        return (batch[0] * self.gain).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.gain], lr=0.1)


def test_a_long_history_is_thinned_and_goes_on_after_a_resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_recording, "_MOST_READINGS", 5)
    monkeypatch.setattr(_recording, "_FEWEST_KEPT", 2)
    path = str(tmp_path / "half.ckpt")
    straight, first, resumed = (LayerRotationMonitor(report=False) for _ in range(3))
    fit(straight, max_epochs=3)
    fit(first, max_epochs=2).save_checkpoint(path)
    trainer(resumed, max_epochs=3).fit(Net(), batches(), ckpt_path=path, weights_only=True)
    assert straight.history.steps == [1, 9, 17, 24]
    assert resumed.history == straight.history


def test_the_file_of_a_thinned_history_loads_and_holds_what_was_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_recording, "_MOST_READINGS", 5)
    monkeypatch.setattr(_recording, "_FEWEST_KEPT", 2)
    seen: list[list[int]] = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(RotationHistory.load(tmp_path / "layer_rotation.jsonl").steps)

    monitor = LayerRotationMonitor()
    fit(monitor, None, Looks(), default_root_dir=tmp_path, max_epochs=2)
    assert [steps[-1] for steps in seen] == list(range(1, 17))
    assert max(map(len, seen)) <= 10
    assert seen[-1][0] == 1
    assert RotationHistory.load(tmp_path / "layer_rotation.jsonl") == monitor.history


class TestAnglesOfLayca:
    def test_they_are_those_of_the_weights_in_every_step_without_a_copy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monitor, module, before = LayerRotationMonitor(report=False, every_n_steps=5), Net(layca), []
        turned: list[float] = []

        class ByHand(pl.Callback):
            def on_before_optimizer_step(self, *args: Any) -> None:
                before.append(module.head.weight.detach().clone())

            def on_train_batch_end(self, *args: Any) -> None:
                distance = layer_rotation(module.head.weight, before[-1])
                turned.append(float(geometry.angle(distance)))

        monkeypatch.setattr(Measuring, "copy", lambda self, layers: before.append(layers) if layers else None)
        fit(monitor, module, ByHand(), max_epochs=2)
        final = {quantity: monitor.history.final(quantity)["head"] for quantity in ("path", "path_square", "peak")}
        assert final == pytest.approx(
            {"path": sum(turned), "path_square": sum(np.square(turned)), "peak": max(turned)}, rel=1e-5
        )
        assert monitor.history.facts["angle_readings"] == monitor.history.facts["dense_steps"] == 16
        requested = monitor.history.values("requested_angle")
        assert requested.flatten().tolist() == pytest.approx([math.atan(0.05)] * requested.numel())
        assert not any(isinstance(entry, dict) for entry in before)

    def test_layers_that_take_plain_steps_are_copied_beside_them(self) -> None:
        def make(module: pl.LightningModule) -> Any:
            groups = [{"params": [module.head.weight], "rotate": False}, {"params": [module.body[0].weight]}]
            return Layca(groups, lr=0.05)

        monitor = LayerRotationMonitor(report=False)
        fit(monitor, Net(make))
        angles = monitor.history.values("angular_update")
        assert angles[:, 0].tolist() == pytest.approx([math.atan(0.05)] * 8)
        assert (angles[:, 1] > 0).all()
        assert (angles[:, 1] - math.atan(0.05)).abs().min() > 1e-4
        assert monitor.history.values("requested_angle")[:, 1].isnan().all()
        assert monitor.history.values("path")[-1].tolist() == pytest.approx(angles.sum(0).tolist(), rel=1e-9)

    def test_a_layer_without_gradient_turned_by_nothing(self) -> None:
        class Frozen(Net):
            def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
                self.head.weight.requires_grad_(batch_idx % 2 == 0)

        monitor = LayerRotationMonitor(report=False)
        fit(monitor, Frozen(layca))
        expected = [math.atan(0.05), 0.0] * 4
        assert monitor.history.values("angular_update")[:, 1].tolist() == pytest.approx(expected)
        assert monitor.history.final("path")["head"] == pytest.approx(sum(expected))

    @pytest.mark.parametrize("kind", ["half precision", "without projection"])
    def test_where_the_angle_is_not_that_of_the_rate_it_is_read(self, kind: str) -> None:
        options: dict[str, Any] = {"precision": "bf16-true"} if kind == "half precision" else {}

        def make(module: pl.LightningModule) -> Any:
            return Layca([module.head.weight, module.body[0].weight], lr=0.05, tangential=bool(options))

        monitor = LayerRotationMonitor(report=False)
        fit(monitor, Net(make), **options)
        angles = monitor.history.values("angular_update")
        assert angles.flatten().tolist() == pytest.approx([math.atan(0.05)] * 16, rel=0.2)
        assert (angles - math.atan(0.05)).abs().min() > 1e-9


@pytest.mark.parametrize(("option", "read"), [(True, True), (False, False), ("auto", False)])
def test_angles_that_need_a_large_copy_are_read_on_demand(
    monkeypatch: pytest.MonkeyPatch, option: Any, read: bool
) -> None:
    monkeypatch.setattr(monitor_module, "_MOST_COPIED", 100)
    monitor = LayerRotationMonitor(report=False, angular_update=option)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(monitor)
    told = [
        str(w.message) for w in seen if "takes over 1 GB: angles are read only of layers that Layca" in str(w.message)
    ]
    assert len(told) == (option == "auto")
    assert ("angular_update" in monitor.history.quantities) is read
    assert ("straightness" in monitor.history.quantities) is read


class Codes(torch.Tensor):
    """Stands for the tensors of quantization libraries: they say how to get floats out of what they hold."""

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        raise NotImplementedError


@pytest.mark.parametrize("kind", ["integers", "a class of its own"])
def test_quantized_weights_are_named_and_the_rest_is_measured(kind: str) -> None:
    module = Net()
    if kind == "integers":
        codes = nn.Parameter(torch.ones(8, 3, dtype=torch.uint8), requires_grad=False)
    else:
        codes = nn.Parameter(torch.ones(8, 3).as_subclass(Codes), requires_grad=False)
    module.register_parameter("codes", codes)
    monitor = LayerRotationMonitor(report=False)
    with pytest.warns(UserWarning, match="'codes' hold quantized weights, which have no direction: not measured"):
        run = fit(monitor, module)
    assert run.state.finished
    assert list(monitor.history.final()) == ["body.0", "head"]
    assert min(monitor.history.final().values()) > 0


def test_weights_that_deepspeed_has_partitioned_are_named_and_training_goes_on() -> None:
    """DeepSpeed itself needs a GPU: this is the mark that its stage 3 leaves on parameters."""
    module = Net()
    module.head.weight.ds_tensor = torch.zeros(9)  # type: ignore[attr-defined]
    monitor = LayerRotationMonitor()
    with pytest.warns(UserWarning, match=r"training goes on without: .*'head.weight', of which DeepSpeed's stage 3"):
        run = fit(monitor, module)
    assert run.global_step == 8
    assert len(monitor.history) == 0


def fit_and_fail(rank: int, strategy: str, where: str) -> tuple[int, int, list[str]]:
    """One of two processes cannot read its pieces in the third step."""
    monitor = LayerRotationMonitor(every_n_steps=1, report=False)
    calls = iter(range(100))

    def failing(original: Any) -> Any:
        def method(*arguments: Any) -> Any:
            if next(calls) == 2 and rank == 1:
                raise MemoryError("no room")
            return original(*arguments)

        return method

    setattr(Measuring, where, failing(getattr(Measuring, where)))
    with warnings.catch_warnings(record=True) as seen:
        warnings.filterwarnings("always", "LayerRotationMonitor")
        run = train(OneGroup(strategy), strategy, 2, monitor, resume=None)
    return run.global_step, len(monitor.history), [str(w.message) for w in seen if "LayerRot" in str(w.message)]


@pytest.mark.parametrize("where", ["_rotation_sums", "_step_sums"])
@pytest.mark.parametrize("strategy", ["FSDP1 FULL_SHARD", "FSDP2"])
def test_a_failure_in_one_process_of_cut_layers_stops_reading_in_all_and_training_goes_on(
    strategy: str, where: str
) -> None:
    if strategy == "FSDP2":
        skip_on_torch_2_6("cannot run FSDP2 on the CPU")
    (steps, rows, (told,)), (other_steps, other_rows, _) = launch(fit_and_fail, strategy, where, timeout=60)
    assert steps == other_steps == 6
    assert rows == other_rows == 2
    assert (
        "measuring failed and stops here: RuntimeError: another process could not read its part of the layers" in told
    )


def test_options_may_be_read_once_only(tmp_path: Path) -> None:
    monitor = LayerRotationMonitor(
        include=(name for name in ["head"]),  # type: ignore[arg-type]
        log_quantities=(name for name in ["norm_ratio"]),  # type: ignore[arg-type]
        report=False,
    )
    run = fit(monitor, logger=CSVLogger(tmp_path))
    assert monitor.history.layer_names == ["head"]
    assert "layer_norm_ratio/000_head" in next(tmp_path.rglob("metrics.csv")).read_text().partition("\n")[0]
    assert "layer_norm_ratio_stats/mean" in run.callback_metrics


def test_the_monitor_misses_no_angle_that_its_user_took() -> None:
    class Looks(Net):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            seen.append(self.optimizers().optimizer.take_angles()[1].tolist())

    seen: list[list[float]] = []
    monitor = LayerRotationMonitor(report=False)
    fit(monitor, Looks(layca))
    assert monitor.history.values("angular_update").tolist() == [pytest.approx(angles) for angles in seen]
    assert seen[0] == pytest.approx([math.atan(0.05)] * 2)


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02cpathlib\nPath\n."])
def test_a_reference_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "pretrained.ckpt"
    file.write_bytes(content)
    with pytest.raises(MisconfigurationException, match=r"`reference` must be the path of weights .*pretrained\.ckpt'"):
        fit(LayerRotationMonitor(report=False, reference=file))


def test_the_angle_of_a_rate_is_recorded_only_of_steps_that_were_looked_at() -> None:
    """Not that of the rate at the start, which the schedule has left behind when the only reading is at the end."""

    def warmed_up(module: pl.LightningModule) -> Any:
        return layca_optimizers(module, lr=0.05, momentum=0.9, warmup_steps=4)

    monitor = LayerRotationMonitor(report=False, angular_update=False, every_n_steps=100)
    fit(monitor, Net(warmed_up))
    assert (monitor.history.steps, "requested_angle" in monitor.history.quantities) == ([8], False)


def test_a_resumed_fit_lets_go_of_the_weights_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor, module = LayerRotationMonitor(report=False), Net()
    fit(monitor, module).save_checkpoint(tmp_path / "run.ckpt")
    before = [weakref.ref(piece) for piece in monitor._recording.references.pieces.values()]
    alive: list[int] = []
    original = References.load_state_dict

    def noting(*args: Any) -> None:
        original(*args)
        alive.append(sum(piece() is not None for piece in before))

    monkeypatch.setattr(References, "load_state_dict", noting)
    again = trainer(monitor, max_epochs=2)
    again.fit(module, batches(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert (len(before), alive) == (2, [0])
