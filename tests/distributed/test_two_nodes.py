"""Two machines, played by two `torchrun` on this one: the curves of one process, and one set of files."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import free_port

from pl_layer_rotation import RotationHistory

GPT = Path(__file__).parents[2] / "examples" / "gpt.py"
# In float64 nothing but the order of sums tells one process from several.
SMALL = (
    "--accelerator=cpu --precision=64-true --max-steps=12 --batch-size=8 --context=16 --width=16 --depth=2 --heads=2"
).split()


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """A command in a session of its own, so that all its processes can be ended together."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(processes: list[subprocess.Popen[str]], timeout: float) -> list[str]:
    """What the commands printed; none of their processes is left, whatever happened."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def on_two_nodes(folder: Path, strategy: str, per_node: int) -> list[str]:
    port = free_port()
    nodes = []
    for node in range(2):
        torchrun = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", f"--nproc-per-node={per_node}"]
        rendezvous = ["--master-addr=127.0.0.1", f"--master-port={port}"]
        size = [f"--strategy={strategy}", f"--devices={per_node}", "--num-nodes=2", f"--output={folder / str(node)}"]
        nodes.append(start([*torchrun, *rendezvous, str(GPT), *SMALL, *size], folder))
    return finish(nodes, 100)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> RotationHistory:
    folder = tmp_path_factory.mktemp("alone")
    finish([start([str(GPT), *SMALL, f"--output={folder}"], folder)], 100)
    return RotationHistory.load(folder / "layer_rotation.jsonl")


@pytest.mark.timeout(220)
@pytest.mark.parametrize(("strategy", "per_node"), [("ddp", 1), ("fsdp2", 2)])
def test_two_nodes_give_the_curves_of_one_process(
    alone: RotationHistory, tmp_path: Path, strategy: str, per_node: int
) -> None:
    first, second = on_two_nodes(tmp_path, strategy, per_node)
    history = RotationHistory.load(tmp_path / "0" / "layer_rotation.jsonl")
    assert (history.facts["devices"], history.layer_names) == (2 * per_node, alone.layer_names)
    assert history.steps == alone.steps == list(range(1, 13))
    for quantity in ("rotation", "angular_update", "norm_ratio"):
        assert (history.values(quantity) - alone.values(quantity)).abs().max() < 1e-7
    assert history.values("rotation")[-1].min() > 1e-5
    # The second node wrote nothing, and printed nothing.
    assert not (tmp_path / "1").exists()
    assert "Layer rotation after 12 steps" in first
    assert "Layer rotation" not in second
