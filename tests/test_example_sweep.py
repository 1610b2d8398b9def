"""examples/sweep.py as users run it: here, and as a W&B sweep against a server on the loopback interface."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from wandb_server import WandbServer, wandb_server

EXAMPLE = Path(__file__).parents[1] / "examples" / "sweep.py"
pytestmark = pytest.mark.timeout(300)  # seconds where nothing else runs; the agent of a sweep waits for five at a time
AGGREGATE = "layer_straightness_stats/median"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    with wandb_server(monkeypatch, tmp_path / "client") as server:
        yield server


def run(*arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        cwd=cwd, env=os.environ, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rate_that_is_too_low_is_stopped_and_a_good_one_is_not(tmp_path: Path) -> None:
    _, low, good = run("--rates", "0.003", "0.1", "--max-epochs=6", cwd=tmp_path).splitlines()
    assert low.endswith("stopped: too straight")
    assert int(low.split()[1]) <= 5
    rate, epochs, straightness, accuracy = good.split()
    assert (rate, epochs) == ("0.1", "6")
    assert 0.8 < float(straightness) < 1.3
    assert float(accuracy.rstrip("%")) > 93


def test_sweep_online_ranks_its_runs_by_the_aggregate_that_they_log(server: WandbServer, tmp_path: Path) -> None:
    server.jobs = [
        {"type": "run", "run_id": f"run-{lr}", "args": {"lr": {"value": lr}}, "program": "-"} for lr in (0.003, 0.1)
    ]
    run("--online", "--rates", "0.003", "0.1", "--max-epochs=2", "--project=digits", cwd=tmp_path)
    (sweep,) = server.sweeps
    configuration = yaml.safe_load(sweep["config"])
    assert configuration["metric"] == {"name": AGGREGATE, "goal": "minimize"}
    assert configuration["early_terminate"]["type"] == "hyperband"
    low, good = (server.runs[f"run-{lr}"] for lr in (0.003, 0.1))
    assert (low.config["lr"]["value"], good.config["lr"]["value"]) == (0.003, 0.1)
    # 42 steps, read every fifth and after the last: enough for the first bracket.
    steps = [*range(4, 40, 5), 41]
    assert [[step for step, _ in served.series(AGGREGATE)][-len(steps) :] for served in (low, good)] == [steps] * 2
    assert low.series(AGGREGATE)[-1][1] > good.series(AGGREGATE)[-1][1] > 0
