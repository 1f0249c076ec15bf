"""The questions to a GPU run on a CPU too, where their answers mean nothing."""

from __future__ import annotations

import os
import sys

import pytest

from benchmarks.harness import clean_environment, run_command

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(
    ("question", "answer"), [("sync", "adadelta  streamed   EagerStep    0 waits []"), ("teardown", "2 of 2 ranks")]
)
def test_a_question_is_answered(question: str, answer: str) -> None:
    command = [sys.executable, "benchmarks/probe.py", question]
    done = run_command(command, environment=clean_environment(os.environ) | NO_GPU, timeout=200)
    assert answer in done.output
