"""The claim of a run folder for one attempt: which folder it is, where its training stands, what forbids to go on."""

import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.base.launch import Launch
from pipeline.base.logs import logger
from pipeline.config import Config
from pipeline.run.checkpoint import Checkpoints, Position, TrainingState
from pipeline.run.folder import RunError, RunFolder, choose_run, training_lock
from pipeline.run.journal import Journal
from pipeline.run.resume import check_format, check_resumable, is_finished


@dataclass(frozen=True)
class Invocation:
    """How this training was started."""

    config: Config
    config_name: str
    """Stem of the config file."""
    launch: Launch
    root: Path
    """The folder of the program, whose commit is recorded."""


@dataclass(frozen=True)
class Claim:
    """A run folder that this attempt holds."""

    folder: RunFolder
    state: TrainingState | None
    """The latest usable checkpoint."""
    num_fruitless_attempts: int
    """Attempts in a row before this one that failed or were killed, without a new checkpoint."""
    is_finished: bool
    """Whether nothing is left to train."""
    is_new: bool
    """Whether the folder was made for this attempt."""
    is_first: bool
    """Whether run.dir was made for this attempt, too."""

    @property
    def position(self) -> Position:
        """The position behind which this attempt begins."""
        return self.state.position if self.state else Position()

    def open_journal(self) -> Journal:
        """Open the journal, or make it; return it. Raises RunError if it is of another run than the checkpoint."""
        journal = Journal(self.folder.journal)
        known = self.state.identity.run_id if self.state else None
        if known is not None and journal.run_id is None:
            step = self.position.global_step
            logger.warning("the journal of %s is lost: its curves up to step %d are gone", self.folder.name, step)
        if known is not None and journal.run_id not in (None, known):
            raise RunError(
                f"the checkpoints in {self.folder.checkpoints} are of run {known}, the journal beside them is of "
                f"{journal.run_id}: move away what does not belong to {self.folder.name}"
            )
        return journal

    def give_up(self) -> None:
        """Remove the folder if it was made for this attempt and nothing was recorded in it."""
        if self.is_new:
            _remove_unused(self.folder, with_parent=self.is_first)


def claim_run(call: Invocation, stack: ExitStack) -> Claim:
    """Take the run folder; `stack` holds its lock. Raises RunError where that is refused, with the folder as it was.

    The lock comes before anything is read: of two trainings that start at once, one is refused.
    """
    config, launch = call.config, call.launch
    is_first = not Path(config.run.dir).exists()
    folder = choose_run(config, call.config_name, os.environ, launch)
    # cut off from the others, its ranks end after train.hang_timeout; the other ranks of this one wait as long
    stack.enter_context(training_lock(folder, patience=config.train.hang_timeout if launch.may_be_early else 0.0))
    is_new = list(folder.path.iterdir()) == [folder.lock]
    try:
        state = load_state(call, folder)
        num_fruitless = _count_fruitless_attempts(folder, state)
        if num_fruitless >= config.run.max_attempts:
            raise RunError(
                f"run {folder.name} has ended {num_fruitless} times in a row without a new checkpoint: look at its log "
                f"for the reason; run.max_attempts={num_fruitless + 1} or more tries again"
            )
    except RunError:
        if is_new:
            _remove_unused(folder, with_parent=is_first)
        raise
    return Claim(folder, state, num_fruitless, is_finished(folder.status(), config), is_new, is_first)


def _remove_unused(folder: RunFolder, *, with_parent: bool) -> None:
    """Remove a folder that holds nothing but its lock, which this process holds."""
    with suppress(OSError):
        if list(folder.path.iterdir()) == [folder.lock]:
            folder.lock.unlink()
            folder.path.rmdir()
            if with_parent:
                folder.path.parent.rmdir()


def load_state(call: Invocation, folder: RunFolder) -> TrainingState | None:
    """Return the latest usable checkpoint. Raises RunError where this invocation may not go on in the folder."""
    check_format(folder)
    state = Checkpoints(call.config.checkpoint, folder).load_latest()
    check_resumable(folder, call.config, call.launch, has_checkpoint=state is not None)
    return state


def _count_fruitless_attempts(folder: RunFolder, state: TrainingState | None) -> int:
    status = folder.status()
    if status.get("state") not in ("running", "failed"):
        return 0
    has_progress = status.get("began_at_step") != (state.position.global_step if state else 0)
    return 0 if has_progress else int(status.get("fruitless_attempts", 0)) + 1
