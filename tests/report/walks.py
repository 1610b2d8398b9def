"""Histories that were made up for a finding, and what is found in them."""

from typing import Any

from pl_layer_rotation import RotationHistory
from pl_layer_rotation.report.findings import Finding, findings


def walk(
    thetas: list[list[float]],
    rotation: list[float] | None = None,
    norms: list[float] | None = None,
    every: int = 1,
    names: list[str] | None = None,
    **facts: Any,
) -> RotationHistory:
    """A run with these angles, a row a reading; rotation and norm as at the end, in every reading."""
    layers = len(thetas[0])
    history = RotationHistory(names or [f"fc{i + 1}" for i in range(layers)], facts=facts)
    for i, row in enumerate(thetas, 1):
        history.append(
            i * every, rotation=rotation or [0.1] * layers, norm_ratio=norms or [1.0] * layers, angular_update=row
        )
    return history


def steady(*each: float, steps: int = 40) -> list[list[float]]:
    return [list(each)] * steps


def stopping(*shares: float, steps: int = 100) -> list[list[float]]:
    return [[0.01 if step < round(share * steps) else 0.0 for share in shares] for step in range(steps)]


def with_sums(history: RotationHistory, **sums: list[float]) -> RotationHistory:
    """The same readings with these sums at the end, of which paths have grown evenly."""
    state = history.state_dict()
    for row in state["rows"]:
        for name, values in sums.items():
            share = row["step"] / history.steps[-1] if name.startswith("path") else 1.0
            row[name] = [share * value for value in values]
    return RotationHistory.from_state_dict(state)


def codes(history: RotationHistory) -> list[str]:
    return [finding.code for finding in findings(history)]


def only(history: RotationHistory) -> Finding:
    (finding,) = findings(history)
    return finding
