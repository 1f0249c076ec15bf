"""After an error nothing of a training is left, whatever its children do, and the first cause is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.inject import Fault
from tests.faults.trainings import ROOT, environment_of, settings_of, train_under_torchrun

WORKERS = ("data.placement=workers", "data.workers=2")
LIMIT = 45.0
"""Seconds from the command to the end of the last process: 30 from the fault on, and the start before it."""


@pytest.mark.parametrize(
    ("what", "where", "words"),
    [
        ("raise", "step", "ArithmeticError: the fault"),
        ("raise", "save", "ArithmeticError: the fault"),
        ("kill worker", "step", "is killed by signal: Killed"),
        pytest.param("raise", "evaluation", "ArithmeticError: the fault", marks=pytest.mark.faults),
        pytest.param("kill worker", "evaluation", "is killed by signal: Killed", marks=pytest.mark.faults),
        pytest.param("exit", "step", "", marks=pytest.mark.faults),
        pytest.param("kill", "step", "", marks=pytest.mark.faults),
    ],
)
def test_an_error_beside_loader_workers_ends_all(tmp_path: Path, what: str, where: str, words: str) -> None:
    end = train_under_torchrun(tmp_path, 2, *WORKERS, fault=Fault(what, where, 3, (1,)))
    assert end.failure is not None and end.failure.startswith("exit code")
    assert end.seconds < LIMIT
    assert words in end.output


def test_it_ends_so_without_a_launcher_too(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/faults/program.py"), *settings_of(tmp_path, *WORKERS)]
    fault = Fault("kill worker", "step", 3, (0,))
    done = subprocess.run(command, env=environment_of(fault), capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 1
    assert "is killed by signal: Killed" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small /dev/shm")
def test_a_node_without_shared_memory_for_the_workers_is_told_so_at_once(tmp_path: Path) -> None:
    small = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    command = [sys.executable, str(ROOT / "train/main.py"), *settings_of(tmp_path, *WORKERS)]
    command += ["data.arguments.image_size=128", "data.global_batch_size=64"]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", small, "sh", *command], capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 1
    assert re.search(r"/dev/shm has no room for the batches of the loader.s workers: .*data\.workers=0", done.stdout)
