"""Rotation measured from weights that were given: fine-tuning."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from nets import Net, batches, trainer
from torch import Tensor

from pl_layer_rotation import LayerRotationMonitor, layer_rotation


def pretrained() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {key: torch.randn(value.shape, generator=generator) for key, value in Net().state_dict().items()}


def given(kind: str, weights: dict[str, Tensor], folder: Path) -> Any:
    if kind == "state dict":
        return weights
    file = folder / "weights.ckpt"
    torch.save({"state_dict": weights, "epoch": 3} if kind == "checkpoint" else weights, file)
    return str(file) if kind == "checkpoint" else file


@pytest.mark.parametrize("kind", ["state dict", "file", "checkpoint"])
def test_rotation_is_measured_from_the_given_weights(kind: str, tmp_path: Path) -> None:
    weights, module = pretrained(), Net()
    monitor = LayerRotationMonitor(every_n_steps=8, report=False, reference=given(kind, weights, tmp_path))
    trainer(monitor, max_epochs=1).fit(module, batches())
    for layer, weight in (("body.0", module.body[0].weight), ("head", module.head.weight)):
        expected = layer_rotation(weight.detach(), weights[f"{layer}.weight"])
        assert monitor.history.final()[layer] == pytest.approx(float(expected), rel=1e-6)
        ratio = float(weight.detach().double().norm() / weights[f"{layer}.weight"].double().norm())
        assert monitor.history.final("norm_ratio")[layer] == pytest.approx(ratio, rel=1e-6)


@pytest.mark.parametrize("missing", ["absent", "of another shape"])
def test_layers_that_it_lacks_are_named_and_measured_from_the_start(missing: str) -> None:
    weights, module = pretrained(), Net()
    start = module.head.weight.detach().clone()
    if missing == "absent":
        del weights["head.weight"]
    else:
        weights["head.weight"] = torch.ones(2, 6)
    monitor = LayerRotationMonitor(every_n_steps=8, report=False, reference=weights)
    with pytest.warns(UserWarning, match="`reference` has no weights for 'head': measured from the start of training"):
        trainer(monitor, max_epochs=1).fit(module, batches())
    expected = layer_rotation(module.head.weight.detach(), start)
    assert monitor.history.final()["head"] == pytest.approx(float(expected), rel=1e-6)


def test_a_resumed_training_keeps_the_reference_of_its_checkpoint(tmp_path: Path) -> None:
    def fit(epochs: int, **options: Any) -> LayerRotationMonitor:
        monitor = LayerRotationMonitor(every_n_steps=1, report=False, reference=pretrained())
        run = trainer(monitor, max_epochs=epochs)
        run.fit(Net(), batches(identical=True), **options)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return monitor

    straight = fit(2)
    fit(1)
    resumed = fit(2, ckpt_path=tmp_path / "1.ckpt", weights_only=True)
    for quantity in straight.history.quantities:
        ours, expected = (monitor.history.values(quantity).numpy() for monitor in (resumed, straight))
        np.testing.assert_array_equal(ours, expected)


def test_weights_of_which_no_layer_is_known_stop_before_the_first_step() -> None:
    monitor = LayerRotationMonitor(reference={"other.weight": torch.ones(3, 3)})
    text = "`reference` must hold weights of the layers ('body.0', 'head'), got 'other.weight', of which none"
    with pytest.raises(MisconfigurationException, match=re.escape(text)):
        trainer(monitor, max_epochs=1).fit(Net(), batches())


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (3, "`reference` must be 'init', a state dict or the path of a checkpoint, got 3. Pass for instance"),
        ("no_such.ckpt", "got 'no_such.ckpt', which is no file. Check the path."),
    ],
)
def test_what_is_no_reference_is_refused_at_once(reference: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        LayerRotationMonitor(reference=reference)


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    monitor = LayerRotationMonitor(reference=tmp_path / "list.pt")
    with pytest.raises(MisconfigurationException, match=r"got .* with a list. Save `module.state_dict\(\)`"):
        trainer(monitor, max_epochs=1).fit(Net(), batches())
