"""Small trainings to be disturbed, on forked ranks or under torchrun, and what they must end with."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.base.launch import Launch
from pipeline.base.signals import listen_for_stop
from pipeline.base.timing import StartupTimer
from pipeline.models.bundle import Bundle
from pipeline.parallel.rank import Rank
from tests.faults.inject import Fault, inject
from tests.ranks import RankFailed, run_ranks
from tests.train.helpers import DEFAULT, config_of
from train import agreement
from train.attempt.claim import Invocation
from train.main import train
from train.trainer import Trainer

ROOT = Path(__file__).parents[2]
STEPS_PER_EPOCH, NUM_SAMPLES = 13, 203
SMALL = (
    "data.dataset=synthetic",
    "data.arguments.image_size=12",
    f"data.arguments.train_size={NUM_SAMPLES}",
    "data.arguments.validation_size=50",
    "data.global_batch_size=16",  # 13 steps an epoch, the last of 11 samples
    "train.epochs=2",
    "train.threads=1",  # as the forked ranks have: other numbers give other bits
    "train.log_every=4",
    "checkpoint.every_steps=3",
    "optim.name=adam",
    "optim.lr=0.01",
    "tracking.enabled=false",
    "tracking.system_every=0",
    "run.max_attempts=1000",
)
PATIENCE = 120.0
"""Seconds for one attempt."""


@dataclass(frozen=True)
class End:
    """Of one attempt."""

    failure: str | None
    """None if every rank came to its end."""
    seconds: float
    output: str = ""
    weights: tuple[str, ...] = ()
    """SHA-256 of the weights of each rank at its end."""


def settings_of(folder: Path, *settings: str) -> tuple[str, ...]:
    return (*SMALL, f"run.dir={folder}", "run.name=run", *settings)


def train_forked(folder: Path, world_size: int, *settings: str, fault: Fault | None = None) -> End:
    began = time.monotonic()
    try:
        weights = run_ranks(world_size, _train, settings_of(folder, *settings), fault, timeout=PATIENCE)
    except RankFailed as error:
        return End(str(error), time.monotonic() - began)
    return End(None, time.monotonic() - began, weights=tuple(weights))


def _train(rank: Rank, settings: tuple[str, ...], fault: Fault | None) -> str:
    """SHA-256 of the weights of this rank at its end."""
    weights: list[dict[str, torch.Tensor]] = []
    fit = Trainer.fit

    def fit_and_show(self: Trainer) -> Any:
        outcome = fit(self)
        weights.append(self.model.state_dict())
        return outcome

    Trainer.fit = fit_and_show  # type: ignore[method-assign]
    if fault is not None:
        inject(fault, rank.rank)
    train_as_rank(rank, settings)
    return digest_of(weights[-1]) if weights else ""


def train_as_rank(rank: Rank, settings: tuple[str, ...]) -> None:
    agreement.VOTE_EVERY = 0.0  # steps are so short that the training would be over before it is asked
    launch = Launch(rank.rank, rank.local_rank, rank.world_size, rank.local_world_size)
    with listen_for_stop() as stop:
        call = Invocation(config_of(*settings), DEFAULT.stem, launch, ROOT)
        attempt = train(call, rank, stop, StartupTimer())
    attempt.close()


def torchrun_command(folder: Path, world_size: int, *settings: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    return [*launcher, str(Path(__file__).with_name("program.py")), *settings_of(folder, *settings)]


def environment_of(fault: Fault | None) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "CONVOY_FAULT": json.dumps(fault and asdict(fault))}


def train_under_torchrun(folder: Path, world_size: int, *settings: str, fault: Fault | None = None) -> End:
    """Waits until all processes have closed their output, so that whoever outlives the launcher is waited for too."""
    began = time.monotonic()
    command = torchrun_command(folder, world_size, *settings)
    with subprocess.Popen(
        command,
        env=environment_of(fault),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return End(f"not over after {PATIENCE:.0f} s", time.monotonic() - began, output)
    failure = None if process.returncode == 0 else f"exit code {process.returncode}"
    return End(failure, time.monotonic() - began, output)


def digest(folder: Path, which: str = "final") -> str:
    """SHA-256 of the weights, by name and shape; empty if there are none."""
    model = folder / "run" / "model"
    if not (model / f"{which}.safetensors").exists():
        return ""
    return digest_of(Bundle.open(model).load_weights(which))


def digest_of(weights: Mapping[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for key, value in sorted(weights.items()):
        sha.update(f"{key} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    return sha.hexdigest()


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "journal.jsonl").read_text().splitlines()]


def history(folder: Path) -> list[tuple[str, int, float]]:
    """All train/* and eval/* points, the learning rate among them, in the order in which they were recorded."""
    points = [(r["key"], r["step"], r["value"]) for r in records(folder) if r["kind"] == "metric"]
    return [point for point in points if point[0].startswith(("train/", "eval/"))]


def state(folder: Path) -> dict[str, Any]:
    path = folder / "run" / "status.json"
    loaded: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return loaded


def differences(folder: Path, reference: Path) -> list[str]:
    """In what a training that was disturbed differs from one that was not."""
    found = [f"weights of {name}" for name in ("final", "best") if digest(folder, name) != digest(reference, name)]
    if history(folder) != history(reference):
        found.append("history")
    if state(folder).get("state") != "finished":
        found.append(f"state {state(folder).get('state')}")
    return found
