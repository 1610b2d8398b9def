"""The folder of a study's results: what was asked for, one JSON file a training, and what a stopped one left."""

import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from errors import InputError
from plans import Plan
from studies import Setting
from torch import Tensor
from training import Finished

import pl_layer_rotation
from pl_layer_rotation import RotationHistory

FEATURES = range(5, 10)  # the neurons of the first layer that the paper shows
_PLAN = "plan.json"


class StudyFolder:
    """Results of one study on one task, at one scale.

    Args:
        path: the folder; made when the first result is written.
        study: name of the study.
        task: name of the task.

    """

    def __init__(self, path: Path, study: str, task: str) -> None:
        self.path, self.study, self.task = path, study, task

    def claim(self, settings: list[Setting], plans: list[Plan], source: str) -> None:
        """Note what is run here, or check that it is what was run here before.

        Raises:
            InputError: If the folder holds other files, or results of other settings.

        """
        asked = json.loads(
            json.dumps(
                {
                    "study": self.study,
                    "task": self.task,
                    "data": source,
                    "settings": {s.name: asdict(s) | {"plan": asdict(p)} for s, p in zip(settings, plans, strict=True)},
                }
            )
        )
        file = self.path / _PLAN
        if not file.is_file():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise InputError(
                    f"`--output` must name a new folder or one of this study, got {self.path}, which holds something "
                    "else. Name another folder."
                )
            write_json(file, asked)
        elif (found := json.loads(file.read_text(encoding="utf-8"))) != asked:
            raise InputError(
                f"`--output` must name a new folder or one of the same settings, got {self.path}, where "
                f"{_first_difference(found, asked)}. Name another folder, or repeat the options of the first run."
            )

    def result(self, setting: str, seed: int) -> Path:
        return self.path / f"{setting}_seed{seed}.json"

    def checkpoint(self, setting: str, seed: int) -> Path:
        return self.path / "unfinished" / f"{setting}_seed{seed}" / "last.ckpt"

    def rates(self, setting: str, seed: int) -> Path:
        return self.path / f"{setting}_seed{seed}.rates.pt"

    def features(self, setting: str, seed: int) -> Path:
        return self.path / f"{setting}_seed{seed}.features.json"

    def write(self, setting: Setting, plan: Plan, seed: int, finished: Finished, source: str, command: str) -> None:
        """Write a result; only then does its checkpoint go."""
        metrics = finished.metrics
        percent = {
            name: round(100 * metrics[name], 2) for name in ("test_acc", "val_acc", "train_acc") if name in metrics
        }
        result = {
            "study": self.study,
            "task": self.task,
            "setting": setting.name,
            "seed": seed,
            **percent,
            "seconds": round(metrics["seconds"], 1),
            "resumed_after_epoch": metrics.get("resumed_after_epoch"),
            "scale": plan.scale,
            "recipe": asdict(setting),
            "plan": asdict(plan),
            "data": source,
            "command": command,
            "machine": machine(finished.device),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "pytorch_lightning": pl.__version__,
                "pl_layer_rotation": pl_layer_rotation.__version__,
            },
            "rotation": curves_by_epoch(finished.history, plan),
        }
        write_json(self.result(setting.name, seed), result)
        shutil.rmtree(self.checkpoint(setting.name, seed).parent, ignore_errors=True)

    def read(self) -> Iterator[dict[str, Any]]:
        """The finished trainings, in the order of the study's settings and of the seeds."""
        asked = json.loads((self.path / _PLAN).read_text(encoding="utf-8"))
        for setting in asked["settings"]:
            found = [json.loads(f.read_text(encoding="utf-8")) for f in self.path.glob("*_seed*.json") if _is_result(f)]
            yield from sorted((r for r in found if r["setting"] == setting), key=lambda r: r["seed"])


def curves_by_epoch(history: RotationHistory, plan: Plan) -> dict[str, Any]:
    """Rotation of every layer at the end of every epoch; None where undefined."""
    rows = dict(zip(history.steps, history.values("rotation").tolist(), strict=True))
    ends = {epoch: epoch * plan.steps_per_epoch for epoch in range(1, plan.epochs + 1)}
    epochs = [epoch for epoch, step in ends.items() if step in rows]
    return {
        "layers": history.layer_names,
        "epochs": epochs,
        "values": [[float(f"{v:.5g}") if v == v else None for v in rows[ends[epoch]]] for epoch in epochs],
    }


def feature_images(weight: Tensor) -> list[list[int]]:
    """Weights of some neurons of the first layer, in units of 1e-4."""
    return [(1e4 * weight[neuron].detach().cpu()).round().int().tolist() for neuron in FEATURES]


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


def write_json(file: Path, value: Any) -> None:
    """The file appears whole or not at all; each of its entries on a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    entries = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(f"{{\n{entries}\n}}\n", encoding="utf-8")
    draft.replace(file)


def _is_result(file: Path) -> bool:
    return not file.name.endswith(".features.json")


def _first_difference(found: Any, asked: Any, where: str = "") -> str:
    if isinstance(found, dict) and isinstance(asked, dict):
        for key in [*found, *(key for key in asked if key not in found)]:
            if found.get(key) != asked.get(key):
                return _first_difference(found.get(key), asked.get(key), f"{where} {key}".strip())
    return f"`{where}` is {found!r}, not {asked!r}"
