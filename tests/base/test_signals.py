"""Signals ask the training to stop; a second one ends it; handlers do not outlive the training."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader

from pipeline.base import signals as preemption
from pipeline.base.signals import SAME_REQUEST, SIGNALS, kill_children, listen_for_stop
from tests.ranks import run_ranks


@pytest.fixture(autouse=True)
def _not_under_nohup() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_becomes_a_request(number: signal.Signals) -> None:
    with listen_for_stop() as stop:
        assert not stop
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop
        assert stop.reason == number.name


def test_slurm_torchrun_and_people_are_listened_to() -> None:
    assert set(SIGNALS) == {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}


def test_under_nohup_the_end_of_the_terminal_is_no_request() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with listen_for_stop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"


def test_the_handlers_of_before_are_restored() -> None:
    def mine(number: int, frame: object) -> None:
        pass

    original = signal.signal(signal.SIGUSR1, mine)
    try:
        before = handlers()
        with listen_for_stop():
            assert all(now != then for now, then in zip(handlers(), before, strict=True))
        assert handlers() == before
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, original)


def test_the_handlers_are_restored_after_a_request_and_a_failure() -> None:
    before = handlers()

    def train() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), listen_for_stop():
        train()
    assert handlers() == before


def end_of_child(*numbers: signal.Signals, apart: float = 2 * SAME_REQUEST) -> tuple[int, int]:
    """(exit code, signal it died of) of a child that listens and sends itself these signals, so many seconds apart."""
    child = os.fork()
    if child == 0:
        now = [1000.0]
        preemption.time = SimpleNamespace(monotonic=lambda: now[0])  # type: ignore[assignment,attr-defined]
        try:
            with listen_for_stop() as stop:
                for number in numbers:
                    os.kill(os.getpid(), number)
                    now[0] += apart
                os._exit(0 if stop.reason == numbers[0].name else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    return (os.WEXITSTATUS(status), 0) if os.WIFEXITED(status) else (0, os.WTERMSIG(status))


@pytest.mark.parametrize("number", SIGNALS)
def test_one_signal_does_not_end_the_process(number: signal.Signals) -> None:
    assert end_of_child(number) == (0, 0)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(number: signal.Signals) -> None:
    assert end_of_child(number, number) == (0, number)


def test_a_signal_passed_on_by_the_launcher_besides_is_the_same_request() -> None:
    assert end_of_child(signal.SIGTERM, signal.SIGTERM, apart=0.5 * SAME_REQUEST) == (0, 0)
    assert end_of_child(signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, apart=0.7 * SAME_REQUEST) == (0, signal.SIGTERM)


def test_a_second_signal_of_another_kind_ends_the_process_by_itself() -> None:
    assert end_of_child(signal.SIGUSR1, signal.SIGTERM) == (0, signal.SIGTERM)
    assert end_of_child(signal.SIGTERM, signal.SIGINT) == (0, signal.SIGINT)


def _kill_workers(rank: object) -> list[int | None]:
    # sets torch's handler, which raises when a worker is killed
    left = iter(DataLoader([0, 1], num_workers=2))  # type: ignore[arg-type]
    workers = multiprocessing.active_children()
    kill_children()
    for worker in workers:
        worker.join(10)
    del left
    return [worker.exitcode for worker in workers]


def test_the_workers_that_are_left_are_killed_without_an_error() -> None:
    assert run_ranks(1, _kill_workers) == [[-signal.SIGKILL] * 2]
