"""Run a function in several real processes that share a gloo group, and give back what each returned."""

import contextlib
import os
import random
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp


def launch(function: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 90.0) -> list[Any]:
    """``function(rank, *args)`` in ``world`` forked processes that look like torchelastic workers to Lightning.

    No strategy starts processes of its own then, so that a fit of two processes takes a second. Results must be plain
    Python values. Processes are daemons and are killed after ``timeout`` seconds: none outlives the test.
    """
    context = mp.get_context("fork")
    results = context.SimpleQueue()
    port = free_port()
    workers = [
        context.Process(target=_work, args=(rank, world, port, function, args, results), daemon=True)
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    answers: dict[int, Any] = {}
    end = time.monotonic() + timeout
    try:
        while len(answers) < world:
            if not results.empty():
                rank, error, answer = results.get()
                if error:
                    raise AssertionError(f"process {rank} of {world} failed:\n{error}")
                answers[rank] = answer
            elif time.monotonic() > end:
                raise AssertionError(f"only processes {sorted(answers)} of {world} finished within {timeout} s")
            else:
                time.sleep(0.01)
        for worker in workers:
            worker.join(max(0.0, end - time.monotonic()))
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()
    return [answers[rank] for rank in range(world)]


def exit_codes(function: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 60.0) -> list[int]:
    """Like :func:`launch`, where some may be killed: the exit code of each. What they have to say they must write."""
    context = mp.get_context("fork")
    results, port = context.SimpleQueue(), free_port()
    workers = [
        context.Process(target=_work, args=(rank, world, port, function, args, results), daemon=True)
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    end = time.monotonic() + timeout
    try:
        for worker in workers:
            worker.join(max(0.0, end - time.monotonic()))
        alive = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
        assert not alive, f"processes {alive} of {world} did not end within {timeout} s"
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()
    return [int(worker.exitcode or 0) for worker in workers]


def _work(rank: int, world: int, port: int, function: Callable[..., Any], args: Any, results: Any) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="test",
    )
    torch.set_num_threads(1)
    try:
        results.put((rank, "", function(rank, *args)))
        if torch.distributed.is_initialized():
            # One that is done early must not close the store on others that are still connecting.
            torch.distributed.barrier()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def free_port() -> int:
    """A port that nobody listens on, below those that systems give to outgoing connections.

    One of those could be taken between now and its use, seconds later, by any connection of any process.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
