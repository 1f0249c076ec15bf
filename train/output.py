"""Where a run is written: rank 0 has the run folder, the other ranks have a null object, and the loop asks nobody."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.checkpoint import Checkpoints, TrainingState, save_atomically
from pipeline.run_folder import RunFolder, State
from pipeline.tracking.journal import Journal, now_ms

logger = logging.getLogger("convoy")


class RunOutput(Protocol):
    """What a training gives away."""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def save_checkpoint(self, state: TrainingState, value: float | None) -> None: ...
    def save_best(self, model: Mapping[str, Any]) -> None: ...
    def save_trace(self, write: Callable[[str], object]) -> None: ...
    def choices(self, values: Mapping[str, str]) -> None: ...


class NullOutput:
    """Of all ranks but the first."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        pass

    def save_checkpoint(self, state: TrainingState, value: float | None) -> None:
        pass

    def save_best(self, model: Mapping[str, Any]) -> None:
        pass

    def save_trace(self, write: Callable[[str], object]) -> None:
        pass

    def choices(self, values: Mapping[str, str]) -> None:
        pass


@dataclass(frozen=True)
class FolderOutput:
    """Of rank 0: the journal, the checkpoints and the status of one run folder."""

    folder: RunFolder
    journal: Journal
    checkpoints: Checkpoints
    tag_prefix: str = ""
    """Of what this attempt records as tags."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.journal.metrics(values, step)

    def save_checkpoint(self, state: TrainingState, value: float | None) -> None:
        self.journal.sync()  # first: points before a checkpoint are not recorded again
        self.checkpoints.save(state, value)
        self.folder.update_status(epoch=state.position.epoch, global_step=state.position.global_step)

    def save_best(self, model: Mapping[str, Any]) -> None:
        save_atomically(self.folder.model / "best.pt", dict(model))

    def save_trace(self, write: Callable[[str], object]) -> None:
        """`write(path)` makes the file, compressed."""
        path = self.folder.path / "profile" / f"trace-{time.strftime('%Y%m%d-%H%M%S')}.json.gz"
        path.parent.mkdir(exist_ok=True)
        write(str(path))
        self.journal.append("artifact", path=str(path.relative_to(self.folder.path)))
        logger.info("trace of the steps: %s", os.path.relpath(path))

    def choices(self, values: Mapping[str, str]) -> None:
        """How the training is executed, as it was chosen and not set."""
        self.journal.append("tags", values={self.tag_prefix + key: value for key, value in values.items()})
        logger.info("%s", ", ".join(f"{key}: {value}" for key, value in values.items()))

    def save_final(self, model: Mapping[str, Any]) -> dict[str, str]:
        """Write model/final.pt; its path in the run folder and its SHA-256."""
        path = self.folder.model / "final.pt"
        save_atomically(path, dict(model))
        return {"path": "model/final.pt", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    def set_state(self, state: State) -> None:
        """In status.json for people and scripts, in the journal for MLflow."""
        self.folder.update_status(state=state)
        self.journal.append("status", state=state, timestamp_ms=now_ms())
        self.journal.sync()
