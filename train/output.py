"""Where a run is written: rank 0 has the run folder, the other ranks have a null object, and the loop asks nobody."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.base.credentials import without_credentials
from pipeline.learning.evaluation import Evaluator
from pipeline.run.checkpoint import Checkpoints, TrainingState, save_atomically
from pipeline.run.folder import RunFolder, State
from pipeline.run.journal import KILLED, Journal

NUM_SLIDE_IMAGES = 16
REASON_LENGTH = 500
logger = logging.getLogger("convoy")


class RunOutput(Protocol):
    """What a training gives away."""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def save_checkpoint(self, state: TrainingState, value: float | None) -> None: ...
    def save_best(self, model: Mapping[str, Any]) -> bool: ...
    def predictions(self, evaluator: Evaluator, step: int) -> None: ...
    def save_trace(self, write: Callable[[str], object]) -> None: ...
    def choices(self, values: Mapping[str, str]) -> None: ...


class NullOutput:
    """Of all ranks but the first."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        pass

    def save_checkpoint(self, state: TrainingState, value: float | None) -> None:
        pass

    def save_best(self, model: Mapping[str, Any]) -> bool:
        return True

    def predictions(self, evaluator: Evaluator, step: int) -> None:
        pass

    def save_trace(self, write: Callable[[str], object]) -> None:
        pass

    def choices(self, values: Mapping[str, str]) -> None:
        pass


@dataclass
class FolderOutput:
    """Of rank 0: the journal, the checkpoints and the status of one run folder."""

    folder: RunFolder
    journal: Journal
    checkpoints: Checkpoints
    tag_prefix: str = ""
    """Of what this attempt records as tags."""
    saved_step: int | None = None
    """Of the latest checkpoint."""
    num_failed_saves: int = 0

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.journal.metrics(values, step)

    def save_checkpoint(self, state: TrainingState, value: float | None) -> None:
        """Where it cannot be written, the training goes on with the checkpoints there are, and says so."""
        position = state.position
        try:
            self.journal.sync()  # first: points before a checkpoint are not recorded again
            self.checkpoints.save(state, value)
        except OSError as error:
            self._tell_failed_save("CHECKPOINT", position.global_step, error)
            return
        self.saved_step = position.global_step
        with suppress(OSError):  # the disk may be full by now; the checkpoint counts
            self.folder.update_status(epoch=position.epoch, global_step=position.global_step)

    def save_best(self, model: Mapping[str, Any]) -> bool:
        """Whether it could be written."""
        try:
            save_atomically(self.folder.model / "best.pt", dict(model))
        except OSError as error:
            self._tell_failed_save("model/best.pt", None, error)
            return False
        return True

    def _tell_failed_save(self, what: str, step: int | None, error: OSError) -> None:
        self.num_failed_saves += 1
        where = f" at step {step:,}" if step is not None else ""
        last = f"the last one is of step {self.saved_step:,}" if self.saved_step is not None else "there is none yet"
        logger.error("NO %s COULD BE WRITTEN%s: %s; the training goes on, %s", what, where, error, last)
        name = f"{self.tag_prefix}failed_saves"
        self.journal.append("tags", values={name: f"{self.num_failed_saves}, the last{where}: {error}"})

    def predictions(self, evaluator: Evaluator, step: int) -> None:
        """Of the first test images, to be seen as slides over the training."""
        first = evaluator.first_predictions(NUM_SLIDE_IMAGES)
        confidence = [round(value, 4) if value == value else 0.0 for value in first.confidence.tolist()]
        self.journal.append("predictions", step=step, predicted=first.predicted.tolist(), confidence=confidence)

    def save_trace(self, write: Callable[[str], object]) -> None:
        """`write(path)` makes the file, compressed."""
        path = self.folder.path / "profile" / f"trace-{time.strftime('%Y%m%d-%H%M%S')}.json.gz"
        try:
            path.parent.mkdir(exist_ok=True)
            write(str(path))
        except (OSError, RuntimeError) as error:  # torch's profiler raises either on a full disk
            logger.error("the trace of the steps could not be written: %s", error)
            return
        self.journal.append("artifact", path=str(path.relative_to(self.folder.path)))
        logger.info("trace of the steps: %s", os.path.relpath(path))

    def choices(self, values: Mapping[str, str]) -> None:
        """How the training is executed, as it was chosen and not set."""
        self.journal.append("tags", values={self.tag_prefix + key: value for key, value in values.items()})
        logger.info("%s", ", ".join(f"{key}: {value}" for key, value in values.items()))

    def save_final(self, model: Mapping[str, Any]) -> None:
        save_atomically(self.folder.model / "final.pt", dict(model))

    def weights_to_log(self, best_step: int, last_step: int) -> dict[str, Any]:
        """The best there are: their path in the run folder, SHA-256 and step."""
        name, step = ("best.pt", best_step) if (self.folder.model / "best.pt").is_file() else ("final.pt", last_step)
        path = self.folder.model / name
        return {"path": f"model/{name}", "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "step": step}

    def begin(self, tags: Mapping[str, str]) -> None:
        """Of this attempt, under `attempt.<number>.`; the one before was killed if it did not end itself."""
        ended = self.journal.state != "running"
        before = {} if ended else {f"attempt.{self.journal.num_attempts}.end": KILLED}
        number = self.journal.num_attempts + 1
        self.journal.append("tags", values=before | {f"attempt.{number}.{key}": value for key, value in tags.items()})
        self._set_state("running")

    def end(self, state: State, reason: str) -> None:
        """`reason` tells why this attempt ended."""
        reason = without_credentials(reason)[:REASON_LENGTH]
        self.journal.append("tags", values={f"attempt.{self.journal.num_attempts}.end": reason})
        self._set_state(state)

    def _set_state(self, state: State) -> None:
        """In the journal for MLflow, in status.json for people and scripts."""
        self.journal.status(state)
        self.journal.sync()
        self.folder.update_status(state=state)  # last: a run that is finished here is not looked at again
