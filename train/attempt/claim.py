"""A run folder taken for one attempt: which it is, where its training stands, and what forbids to go on in it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass

from pipeline.base.launch import Launch
from pipeline.config import Config
from pipeline.run.checkpoint import CheckpointError, Checkpoints, TrainingState
from pipeline.run.folder import RunError, RunFolder, choose_run
from pipeline.run.journal import Journal
from pipeline.run.locks import training_lock
from pipeline.run.resume import check_resumable, check_same_training, is_finished
from train.build import build_checkpoints


@dataclass(frozen=True)
class Claim:
    folder: RunFolder
    checkpoints: Checkpoints
    state: TrainingState | None
    """Of the latest usable checkpoint."""
    num_fruitless: int
    """Attempts in a row before this one that failed or were killed, without a new checkpoint."""
    is_finished: bool
    """There is nothing left to train."""

    @property
    def step(self) -> int:
        """Behind which this attempt begins."""
        return self.state.position.global_step if self.state else 0

    @property
    def epoch(self) -> int:
        return self.state.position.epoch if self.state else 0

    def open_journal(self) -> Journal:
        """Raises RunError if it is of another run than the checkpoints."""
        journal = Journal(self.folder.journal)
        if self.state is not None and journal.run_id not in (None, self.state.run_id):
            raise RunError(
                f"the checkpoints in {self.folder.checkpoints} are of run {self.state.run_id}, the journal beside them "
                f"is of {journal.run_id}: move away what does not belong to {self.folder.name}"
            )
        return journal


def claim_run(config: Config, config_name: str, launch: Launch, dataset_digest: str, stack: ExitStack) -> Claim:
    """`stack` holds the lock of the folder. Raises RunError if that is refused, before anything is written."""
    folder = choose_run(config, config_name, os.environ, launch.run_id, is_restart=launch.is_restart)
    checkpoints = build_checkpoints(config, folder)
    if folder.path.exists():
        # cut off from the others, its ranks end after train.hang_timeout; the other ranks of this one wait as long
        patience = config.train.hang_timeout if launch.may_be_early else 0.0
        stack.enter_context(training_lock(folder, patience=patience))
    try:
        state = checkpoints.load_latest()
    except CheckpointError as error:
        raise RunError(str(error)) from error
    check_resumable(
        folder, config, has_checkpoint=state is not None, launch_id=launch.run_id, is_requeued=launch.is_requeued
    )
    if state is not None:
        check_same_training(folder, config, state.config, state.dataset_digest, dataset_digest)
    if not folder.path.exists():
        folder.path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(training_lock(folder))
    num_fruitless = _count_fruitless(folder, state)
    if num_fruitless >= config.run.max_attempts:
        raise RunError(
            f"run {folder.name} has ended {num_fruitless} times in a row without a new checkpoint: look at its log for "
            f"the reason; run.max_attempts={num_fruitless + 1} or more tries again"
        )
    return Claim(folder, checkpoints, state, num_fruitless, is_finished(folder.status(), config))


def _count_fruitless(folder: RunFolder, state: TrainingState | None) -> int:
    status = folder.status()
    if status.get("state") not in ("running", "failed"):
        return 0
    has_progress = status.get("began_at_step") != (state.position.global_step if state else 0)
    return 0 if has_progress else int(status.get("fruitless_attempts", 0)) + 1
