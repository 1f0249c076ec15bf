"""Real ranks for tests: forked processes, one thread each, a file to meet at, and an end to waiting."""

from __future__ import annotations

import functools
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from pipeline.base.launch import Launch
from pipeline.config.schema import TrainConfig
from pipeline.parallel.start import start_rank

TIMEOUT = 120.0
"""Seconds for all ranks together; the suite shares two cores with whatever else runs."""
GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL for the ranks that are left when one has failed, as under a launcher."""


class RankFailed(Exception):
    """A rank raised, or did not come back in time; the message holds its traceback."""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    num_local: int | None = None,
    timeout: float = TIMEOUT,
) -> list[Any]:
    """`function(rank, *arguments)` on so many real ranks over gloo; what each returned, in order of rank.

    Forked, since starting an interpreter with torch takes seconds. That is safe while the parent uses one thread and no
    autograd, so references are computed in a world of one: `run_ranks(1, ...)`.
    """
    _import_early()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(
                target=_run,
                args=(Launch(i, i, world_size, num_local or world_size), folder, pipes[i][1], function, arguments),
            )
            for i in range(world_size)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            return _collect([receiver for receiver, _ in pipes], time.monotonic() + timeout)
        except RankFailed:
            for process in processes:
                process.terminate()
            deadline = time.monotonic() + GRACE
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            raise
        finally:
            for process in processes:
                process.kill()
                process.join()


@functools.cache
def _import_early() -> None:
    """What every rank would import by itself at its first optimizer, DDP and dataset: 4 s apiece."""
    import sklearn.datasets
    import sklearn.model_selection  # noqa: F401

    torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)


def _collect(receivers: list[Connection], deadline: float) -> list[Any]:
    results: list[Any] = [None] * len(receivers)
    waiting = dict(enumerate(receivers))
    while waiting:
        if time.monotonic() > deadline:
            raise RankFailed(f"ranks {sorted(waiting)} did not come back")
        for rank, receiver in list(waiting.items()):
            if receiver.poll(0.01):
                try:
                    succeeded, results[rank] = pickle.loads(receiver.recv_bytes())
                except EOFError:
                    raise RankFailed(f"rank {rank} died without a word") from None
                if not succeeded:
                    raise RankFailed(f"rank {rank}:\n{results[rank]}")
                del waiting[rank]
    return results


def _run(
    launch: Launch, folder: str, sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    def send(succeeded: bool, result: Any) -> None:
        # pickled by value: multiprocessing would pass tensors by handles that die with this process
        sender.send_bytes(pickle.dumps((succeeded, result)))

    try:
        config = TrainConfig(device="cpu", threads=1, hang_timeout=TIMEOUT)
        with start_rank(launch, config, rendezvous=f"file://{folder}/rendezvous") as rank:
            send(True, function(rank, *arguments))
    except BaseException:
        send(False, traceback.format_exc())
