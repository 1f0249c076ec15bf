"""What a rank's watchdog sees from outside: a hang, a launcher that is gone, files that ask for something."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pipeline.base.launch import Launch
from pipeline.base.signals import StopRequest
from train.attempt.watchdog import PHASES, Launcher, StopFiles, find_phases

ROOT = Path(__file__).parents[2]


def run_watched(body: str, timeout: float = 0.5, *, in_backward: bool = False) -> subprocess.CompletedProcess[str]:
    """A process with a watchdog that checks every 50 ms, and `body` for its training."""
    program = f"""
    import sys, time
    import torch
    from pipeline.parallel.rank import Rank
    from pipeline.learning.update import Precision
    from train.attempt import watchdog

    watchdog.CHECK_EVERY = 0.05
    rank, heartbeats = Rank(3, 3, 4, 4, torch.device("cpu"), "gloo", 1), []
    fail = lambda cause: print("recorded:", cause, flush=True)
    phases = watchdog.find_phases(waits_in_backward={in_backward})
    dog = watchdog.Watchdog(rank, lambda: len(heartbeats), {timeout}, fail, phases)
    with watchdog.watching(dog.check):
    {textwrap.indent(textwrap.dedent(body), "        ")}
    print("ended by itself")
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, env=environment
    )


def test_a_training_that_sends_heartbeats_is_left_alone() -> None:
    done = run_watched("for _ in range(30): heartbeats.append(1); time.sleep(0.05)")
    assert (done.returncode, done.stdout) == (0, "ended by itself\n")


def test_one_that_hangs_is_ended_with_its_phase_and_its_stack() -> None:
    body = """
    class Stuck:
        def backward(self):
            while True: time.sleep(0.01)
        def item(self): pass
    precision = Precision("fp32", torch.device("cpu"))
    precision.scaler.scale = lambda loss: loss
    precision.backward(Stuck())
    """
    done = run_watched(body)
    assert done.returncode == 1
    assert "recorded: rank 3 hung for 1 s in the backward pass" in done.stdout
    assert "in backward" in done.stderr  # faulthandler's
    assert "ended by itself" not in done.stdout


def test_every_phase_is_told_from_the_others() -> None:
    """A decorator's code is that of all functions that it is on."""
    assert len(find_phases(waits_in_backward=True)) == len(PHASES) + 2
    assert all(inspect.unwrap(function).__code__.co_name == function.__name__ for function in PHASES)


def test_one_that_waits_for_others_lets_them_speak_first() -> None:
    body = """
    from pipeline.parallel.rank import PendingSum
    class Late:
        def wait(self): time.sleep(1.5)
    PendingSum(torch.zeros(1), Late(), waits_on_device=False).values()
    """
    assert run_watched(body).stdout == "ended by itself\n"


def test_one_that_waits_for_others_within_backward_does_so_too() -> None:
    body = """
    class Late(torch.autograd.Function):
        forward = staticmethod(lambda context, x: x.clone())
        @staticmethod
        def backward(context, gradient):
            time.sleep(1.5)
            return gradient
    Precision("fp32", torch.device("cpu")).backward(Late.apply(torch.ones(1, requires_grad=True)))
    """
    assert "ended by itself" in run_watched(body, in_backward=True).stdout
    assert "in the backward pass" in run_watched(body).stdout


def test_one_whose_last_words_hang_too_is_ended_all_the_same() -> None:
    done = run_watched(
        """
        watchdog.LAST_WORDS = 0.2
        dog.fail = lambda cause: time.sleep(20)
        time.sleep(20)
        """
    )
    assert done.returncode == 1


def test_the_files_stop_and_save_in_the_run_folder_ask_once(tmp_path: Path) -> None:
    request = StopRequest()
    (tmp_path / "stop").touch()  # left from before: no request to this training
    files = StopFiles(tmp_path, None, request)
    files.check()
    assert not request
    (tmp_path / "save").touch()
    files.check()
    assert request.wants_save
    assert not (tmp_path / "save").exists()
    assert not request
    (tmp_path / "stop").touch()
    files.check()
    assert request.reason == f"request by {tmp_path / 'stop'}"
    assert not (tmp_path / "stop").exists()


def test_the_file_that_the_environment_names_asks_too_and_is_left(tmp_path: Path) -> None:
    named = tmp_path / "elsewhere"
    request = StopRequest()
    files = StopFiles(tmp_path, str(named), request)
    files.check()
    assert not request
    named.touch()
    files.check()
    assert request
    assert named.exists()


def test_the_death_of_the_launcher_is_a_request_to_stop_and_then_the_end() -> None:
    request = StopRequest()
    Launcher(Launch(launcher_pid=os.getppid()), request).check()
    assert not request
    Launcher(Launch(launcher_pid=os.getppid() + 1), request).check()
    assert request.reason == "the death of the launcher"


def test_a_training_that_does_not_leave_after_its_launcher_is_ended() -> None:
    done = run_watched(
        """
        watchdog.GRACE = 0.2
        from pipeline.base.launch import Launch
        from pipeline.base.signals import StopRequest
        launcher = watchdog.Launcher(Launch(launcher_pid=1_000_000_000), StopRequest())
        with watchdog.watching(launcher.check):
            time.sleep(20)
        """,
        timeout=100,
    )
    assert done.returncode == 1
    assert "ended by itself" not in done.stdout


def test_a_check_that_fails_is_said_and_stops_no_other() -> None:
    began = time.monotonic()
    done = run_watched(
        """
        def fail(): raise OSError("the folder is gone")
        with watchdog.watching(fail, dog.check):
            time.sleep(20)
        """
    )
    assert done.returncode == 1
    assert "the folder is gone" in done.stdout + done.stderr
    assert time.monotonic() - began < 15


def test_private_names_of_torch_that_are_gone_cost_a_word_and_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.nn.parallel.DistributedDataParallel._pre_forward")
    monkeypatch.delattr("torch.autograd.graph._engine_run_backward")
    assert len(find_phases(waits_in_backward=True)) == len(PHASES)
