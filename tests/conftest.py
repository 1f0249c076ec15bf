"""What all tests share: one thread, no launcher's environment, and no silent skips where everything must run."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Forked ranks with more threads hang if their parent ever used more than one.
torch.set_num_threads(1)


def _refuse_autograd_where_ranks_are_forked() -> None:
    """Once a process ran a backward pass, the ranks it forks cannot: tests fail that are not to blame."""
    run_backward, forks_ranks = torch.autograd.graph._engine_run_backward, os.getpid()

    @functools.wraps(run_backward)
    def in_a_process_of_its_own(*arguments: Any, **named: Any) -> Any:
        assert os.getpid() != forks_ranks, "a backward pass in the tests' own process; use `run_ranks(1, ...)`"
        return run_backward(*arguments, **named)

    torch.autograd._engine_run_backward = in_a_process_of_its_own  # type: ignore[attr-defined]
    torch.autograd.graph._engine_run_backward = in_a_process_of_its_own


_refuse_autograd_where_ranks_are_forked()

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where nothing was set up; a test that wants more sets it."""
    before = set(os.environ)
    for name in list(os.environ):
        if name in LAUNCHER_VARIABLES or name.startswith(("SLURM_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    yield
    for name in set(os.environ) - before:
        if name.startswith("MLFLOW_"):  # mlflow.set_tracking_uri sets it for processes that are started later, too
            del os.environ[name]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2`: file by file, since files share what takes long to make, and in their order, slow ones not last."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """A folder with MNIST/raw, from CONVOY_MNIST_ROOT."""
    root = os.environ.get("CONVOY_MNIST_ROOT")
    if not root:
        pytest.skip("CONVOY_MNIST_ROOT is not set to a folder that holds MNIST/raw")
    return Path(root)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With CONVOY_REQUIRE_ALL a skipped test is a failure: only what needs a GPU may be missing. `without-mnist` lets
    tests be skipped that need MNIST, `0` any."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    was_run = hasattr(report, "wasxfail")  # and failed as it is known to
    required, reason = os.environ.get("CONVOY_REQUIRE_ALL", "0"), str(call.excinfo and call.excinfo.value)
    may_miss = required == "0" or (required == "without-mnist" and "CONVOY_MNIST_ROOT" in reason)
    if report.skipped and not was_run and not may_miss and item.get_closest_marker("gpu") is None:
        report.outcome = "failed"
        report.longrepr = f"skipped where every test must run: {reason}"
