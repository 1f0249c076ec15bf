"""Where a training writes: rank 0 into the run folder, the other ranks nowhere, and the loop need not know."""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pipeline.base.credentials import without_credentials
from pipeline.base.logs import logger
from pipeline.learning.evaluation import Evaluator
from pipeline.models.bundle import Bundle
from pipeline.run.checkpoint import Checkpoints, TrainingState
from pipeline.run.folder import RunFolder
from pipeline.run.journal import KILLED, Journal
from pipeline.run.records import State

Outcome = Literal["finished", "preempted"]
NUM_SNAPSHOT_IMAGES = 16
"""Validation images whose predictions are recorded at each evaluation."""
REASON_LENGTH = 500


class RunOutput:
    """The output of a training. This one writes nothing: all ranks but the first have it."""

    run_id = ""
    """MLflow finds the run by it; rank 0 alone knows it."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record values at an optimizer step."""

    def save_checkpoint(self, state: TrainingState, value: float | None) -> None:
        """Save all that a resume needs. `value` is the evaluation at this step, if there was one."""

    def save_best(self, weights: Mapping[str, Tensor], step: int) -> bool:
        """Save the weights of the best evaluation so far; return False if they could not be written."""
        return True

    def predictions(self, evaluator: Evaluator, step: int) -> None:
        """Record some predictions of the last evaluation."""

    def save_trace(self, write: Callable[[str], object]) -> None:
        """Save the profiler's trace, which `write(path)` writes."""

    def execution(self, reasons: Mapping[str, str]) -> None:
        """Record what was chosen by rule, and why."""


@dataclass
class FolderOutput(RunOutput):
    """Writes into one run folder: the journal, the checkpoints, the model and the status."""

    folder: RunFolder
    journal: Journal
    checkpoints: Checkpoints
    bundle: Bundle
    run_id: str = ""
    tag_prefix: str = ""
    """Prefix of the tags of this attempt: none for the first."""
    saved_step: int | None = None
    """Step of the latest checkpoint."""
    num_failed_saves: int = 0

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.journal.metrics(values, step)

    def tags(self, values: Mapping[str, object]) -> None:
        """Record what this attempt found or did."""
        self.journal.append(
            {"kind": "tags", "values": {self.tag_prefix + key: str(value) for key, value in values.items()}}
        )

    def save_checkpoint(self, state: TrainingState, value: float | None) -> None:
        """Write a checkpoint. Where that fails, say so: the training goes on with the checkpoints there are."""
        position = state.position
        try:
            self.journal.sync()  # first: points before a checkpoint are not recorded again
            self.checkpoints.save(state, value)
        except OSError as error:
            left = "there is none yet" if self.saved_step is None else f"the last one is of step {self.saved_step:,}"
            self._report_failed_save(f"CHECKPOINT COULD BE WRITTEN at step {position.global_step:,}", error, left)
            return
        self.saved_step = position.global_step
        with suppress(OSError):  # the disk may be full by now; the checkpoint counts
            self.folder.update_status(epoch=position.epoch, global_step=position.global_step)

    def save_best(self, weights: Mapping[str, Tensor], step: int) -> bool:
        """Write the best weights; return whether that worked."""
        try:
            self.bundle.save("best", weights, step)
        except OSError as error:
            name = f"model/{self.bundle.path('best').name}"
            self._report_failed_save(f"{name} COULD BE WRITTEN", error, "with the best weights of before")
            return False
        return True

    def _report_failed_save(self, what: str, error: OSError, left: str) -> None:
        """Log what could not be written and what is there, count it, and record the count; the training goes on."""
        self.num_failed_saves += 1
        logger.error("NO %s: %s; the training goes on, %s", what, error, left)
        self.tags({"failed_saves": f"{self.num_failed_saves}, the last: NO {what}: {error}"})

    def predictions(self, evaluator: Evaluator, step: int) -> None:
        """Record the predictions for the first validation images, a snapshot of the training."""
        first = evaluator.first_predictions(NUM_SNAPSHOT_IMAGES)
        confidence = [round(value, 4) if value == value else 0.0 for value in first.confidence.tolist()]
        predicted = first.predicted.tolist()
        self.journal.append({"kind": "predictions", "step": step, "predicted": predicted, "confidence": confidence})

    def save_trace(self, write: Callable[[str], object]) -> None:
        """Have `write(path)` make the file of a profiler trace, compressed, and record it."""
        path = self.folder.path / "profile" / f"trace-{time.strftime('%Y%m%d-%H%M%S')}.json.gz"
        try:
            path.parent.mkdir(exist_ok=True)
            write(str(path))
        except (OSError, RuntimeError) as error:  # torch's profiler raises either on a full disk
            logger.error("the trace of the steps could not be written: %s", error)
            return
        self.journal.append({"kind": "artifact", "path": str(path.relative_to(self.folder.path))})
        logger.info("trace of the steps: %s", os.path.relpath(path))

    def execution(self, reasons: Mapping[str, str]) -> None:
        """Record how the training is executed where that was chosen and not set."""
        self.tags(reasons)
        logger.info("%s", ", ".join(f"{key}: {value}" for key, value in reasons.items()))

    def begin(self, tags: Mapping[str, str]) -> None:
        """Record the begin of an attempt; the one before was killed if it did not record its end."""
        ended = self.journal.state != "running"
        before = {} if ended else {f"attempt.{self.journal.num_attempts}.end": KILLED}
        number = self.journal.num_attempts + 1
        values = before | {f"attempt.{number}.{key}": value for key, value in tags.items()}
        self.journal.append({"kind": "tags", "values": values})
        self._set_state("running")

    def end(self, state: State, reason: str) -> None:
        """Record the end of this attempt and its reason."""
        reason = without_credentials(reason)[:REASON_LENGTH]
        self.journal.append({"kind": "tags", "values": {f"attempt.{self.journal.num_attempts}.end": reason}})
        self._set_state(state)

    def _set_state(self, state: State) -> None:
        """Write the state into the journal for MLflow, and into status.json for people and scripts."""
        self.journal.status(state)
        self.journal.sync()
        self.folder.update_status(state=state)  # last: a run that is finished here is not looked at again
