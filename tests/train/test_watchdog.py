"""What a rank's watchdog sees from outside: a standstill, a launcher that is gone, files that ask for something."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import torch

from pipeline.base.signals import StopRequest
from pipeline.parallel.rank import Rank
from train.attempt.watchdog import PHASES, Launcher, StopFiles, Watchdog

ROOT = Path(__file__).parents[2]


def run_watched(body: str, timeout: float = 0.5, *, in_backward: bool = False) -> subprocess.CompletedProcess[str]:
    """A process with a watchdog that looks every 50 ms, and `body` for its training."""
    program = f"""
    import sys, time
    import torch
    from pipeline.parallel.rank import Rank
    from pipeline.learning.precision import Precision
    from train import watchdog
    from train.pulse import Pulse

    watchdog.LOOK_EVERY = 0.05
    rank, pulse = Rank(3, 3, 4, 4, torch.device("cpu"), "gloo", 1), Pulse()
    fail = lambda cause: print("recorded:", cause, flush=True)
    dog = watchdog.Watchdog(rank, lambda: pulse.num_beats, {timeout}, fail, waits_in_backward={in_backward})
    with watchdog.watching(dog.look):
    {textwrap.indent(textwrap.dedent(body), "        ")}
    print("ended by itself")
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, env=environment
    )


def test_a_training_that_gives_signs_of_life_is_left_alone() -> None:
    done = run_watched("for _ in range(30): pulse.beat(); time.sleep(0.05)")
    assert (done.returncode, done.stdout) == (0, "ended by itself\n")


def test_one_that_stands_still_is_ended_with_its_phase_and_its_stack() -> None:
    body = """
    class Stuck:
        def backward(self):
            while True: time.sleep(0.01)
        def item(self): pass
    precision = Precision("fp32", torch.device("cpu"))
    precision._scaler.scale = lambda loss: loss
    precision.backward(Stuck())
    """
    done = run_watched(body)
    assert done.returncode == 1
    assert "recorded: rank 3 stood still for 1 s in the backward pass" in done.stdout
    assert "in backward" in done.stderr  # faulthandler's
    assert "ended by itself" not in done.stdout


def test_every_phase_is_told_from_the_others() -> None:
    """A decorator's code is that of all functions that it is on."""
    dog = Watchdog(Rank(0, 0, 1, 1, torch.device("cpu"), "none", 1), lambda: 0, 1.0, lambda error: None)
    assert len(dog._phases) == len(PHASES)
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


def test_one_whose_last_words_stand_still_too_is_ended_all_the_same() -> None:
    done = run_watched(
        """
        watchdog.LAST_WORDS = 0.2
        dog._fail = lambda cause: time.sleep(20)
        time.sleep(20)
        """
    )
    assert done.returncode == 1


def test_the_files_stop_and_save_in_the_run_folder_ask_once(tmp_path: Path) -> None:
    request = StopRequest()
    (tmp_path / "stop").touch()  # left from before: no request to this training
    files = StopFiles(tmp_path, None, request)
    files.look()
    assert not request
    (tmp_path / "save").touch()
    files.look()
    assert request.wants_save
    assert not (tmp_path / "save").exists()
    assert not request
    (tmp_path / "stop").touch()
    files.look()
    assert request.reason == f"request by {tmp_path / 'stop'}"
    assert not (tmp_path / "stop").exists()


def test_the_file_that_the_environment_names_asks_too_and_is_left(tmp_path: Path) -> None:
    named = tmp_path / "elsewhere"
    request = StopRequest()
    files = StopFiles(tmp_path, str(named), request)
    files.look()
    assert not request
    named.touch()
    files.look()
    assert request
    assert named.exists()


def test_the_death_of_the_launcher_is_a_request_to_stop_and_then_the_end() -> None:
    request = StopRequest()
    Launcher(os.getppid(), request).look()
    assert not request
    Launcher(os.getppid() + 1, request).look()
    assert request.reason == "the death of the launcher"


def test_a_training_that_does_not_leave_after_its_launcher_is_ended() -> None:
    done = run_watched(
        """
        watchdog.GRACE = 0.2
        from pipeline.base.signals import StopRequest
        launcher = watchdog.Launcher(1_000_000_000, StopRequest())
        with watchdog.watching(launcher.look):
            time.sleep(20)
        """,
        timeout=100,
    )
    assert done.returncode == 1
    assert "ended by itself" not in done.stdout


def test_a_look_that_fails_is_said_and_stops_no_other() -> None:
    began = time.monotonic()
    done = run_watched(
        """
        def fail(): raise OSError("the folder is gone")
        with watchdog.watching(fail, dog.look):
            time.sleep(20)
        """
    )
    assert done.returncode == 1
    assert "the folder is gone" in done.stdout + done.stderr
    assert time.monotonic() - began < 15
