"""Two machines, played by two `torchrun` on this one: the curves of one process, and one set of files."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import free_port

from pl_layer_rotation import RotationHistory

GPT = Path(__file__).parents[2] / "examples" / "gpt.py"
SIZE = {"max-steps": 12, "batch-size": 8, "context": 16, "width": 16, "depth": 2, "heads": 2}
SMALL = ["--accelerator=cpu", *(f"--{name}={value}" for name, value in SIZE.items())]


def run(commands: list[list[str]], folder: Path, timeout: float = 360) -> list[str]:
    """What commands that run at the same time printed; each names the folder, and none of their processes is left."""
    logs = [folder / f"{number}.log" for number in range(len(commands))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONFAULTHANDLER": "1"}
    with contextlib.ExitStack() as files:
        outputs = [files.enter_context(log.open("w", encoding="utf-8")) for log in logs]
        started = [
            subprocess.Popen([sys.executable, *command], env=environment, stdout=output, stderr=subprocess.STDOUT)
            for command, output in zip(commands, outputs, strict=True)
        ]
    end = time.monotonic() + timeout
    # The other node waits for one that failed: whoever is first with an error ends both.
    while None in (codes := [process.poll() for process in started]) and not any(codes) and time.monotonic() < end:
        time.sleep(0.1)
    left = processes_that_name(folder)
    if None in codes:
        # With the fault handler, to have each say where it stands.
        kill(left, signal.SIGABRT)
        time.sleep(2)
    kill(left, signal.SIGKILL)
    for process in started:
        process.wait()
    printed = [log.read_text(encoding="utf-8") for log in logs]
    assert (codes, left) == ([0] * len(commands), []), "\n".join(printed)
    return printed


def kill(processes: list[int], how: signal.Signals) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)


def processes_that_name(folder: Path) -> list[int]:
    """Running processes by their arguments: torchrun's workers are in sessions of their own."""
    listing = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,args="], capture_output=True, text=True, check=True)
    return [int(line.split()[0]) for line in listing.stdout.splitlines() if str(folder) in line]


def on_two_nodes(folder: Path, strategy: str, per_node: int) -> list[str]:
    port = free_port()
    commands = []
    for node in range(2):
        torchrun = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", f"--nproc-per-node={per_node}"]
        rendezvous = ["--master-addr=127.0.0.1", f"--master-port={port}"]
        size = [f"--strategy={strategy}", f"--devices={per_node}", "--num-nodes=2", f"--output={folder / str(node)}"]
        commands.append([*torchrun, *rendezvous, str(GPT), *SMALL, *size])
    return run(commands, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> RotationHistory:
    folder = tmp_path_factory.mktemp("alone")
    run([[str(GPT), *SMALL, f"--output={folder}"]], folder)
    return RotationHistory.load(folder / "layer_rotation.jsonl")


@pytest.mark.timeout(780)
@pytest.mark.parametrize(("strategy", "per_node"), [("ddp", 1), ("fsdp2", 2)])
def test_two_nodes_give_the_curves_of_one_process(
    alone: RotationHistory, tmp_path: Path, strategy: str, per_node: int
) -> None:
    first, second = on_two_nodes(tmp_path, strategy, per_node)
    history = RotationHistory.load(tmp_path / "0" / "layer_rotation.jsonl")
    assert (history.facts["devices"], history.layer_names) == (2 * per_node, alone.layer_names)
    assert history.steps == alone.steps == list(range(1, 13))
    # Norms are those of fp32 weights, which keep 6e-8 of 1.
    for quantity, same in (("rotation", 1e-7), ("angular_update", 1e-7), ("norm_ratio", 1e-6)):
        assert (history.values(quantity) - alone.values(quantity)).abs().max() < same
    assert history.values("rotation")[-1].min() > 1e-5
    # The second node wrote nothing, and printed nothing.
    assert not (tmp_path / "1").exists()
    assert "Layer rotation after 12 steps" in first
    assert "Layer rotation" not in second
