"""What holds a captured graph must be gone before the process group is left: NCCL waits for it there, for ever."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.harness import ROOT, clean_environment, run_command, torchrun
from tests.gpu_emulation.held_at_the_end import PREFIX

SETTINGS = (
    "data.dataset=synthetic",
    "data.arguments.train_size=64",
    "data.arguments.validation_size=32",
    "train.epochs=2",
    "train.backend=gloo",  # so that there is DDP
    "train.log_every=1",
    "tracking.enabled=false",
    "tracking.system_every=0",
)


@pytest.mark.parametrize(
    "module", ["train.main", "benchmarks.programs.timed_convoy", "benchmarks.programs.timed_tracking"]
)
def test_nothing_holds_the_training_when_the_process_group_is_left(module: str, tmp_path: Path) -> None:
    arguments = ["-m", "tests.gpu_emulation.held_at_the_end", module, *SETTINGS, f"run.dir={tmp_path}"]
    done = run_command(torchrun(arguments, 2), environment=clean_environment(os.environ), timeout=200, folder=ROOT)
    said = [json.loads(line.removeprefix(PREFIX)) for line in done.output.splitlines() if line.startswith(PREFIX)]
    assert said == [{"watched": ["trainer", "step", "DDP"], "held": []}] * 2
