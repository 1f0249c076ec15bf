"""When the training is saved: at steps, by the clock and on request; and how long that took."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.base.signals import StopRequest
from pipeline.config.schema import CheckpointConfig
from pipeline.parallel.rank import Rank
from pipeline.run.checkpoint import TrainingState
from train.display import Display
from train.output import RunOutput


@dataclass
class Saving:
    """Decides on checkpoints and times them."""

    config: CheckpointConfig
    rank: Rank
    output: RunOutput
    display: Display
    stop: StopRequest
    _saved_at: float = field(default_factory=time.monotonic)

    def is_due(self, step: int) -> bool:
        """Return whether all ranks save at this optimizer step of the whole training, wherever it was resumed."""
        every = self.config.every_steps
        return every is not None and step % every == 0

    def is_wanted(self) -> bool:
        """Return whether rank 0 wants a checkpoint, by its clock or on request; it counts in the next vote."""
        minutes = self.config.every_minutes
        is_time = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return self.rank.is_main and (is_time or self.stop.wants_save)

    def save(self, collect: Callable[[], TrainingState], value: float | None) -> None:
        """Collective. Save what `collect` returns. `value` is the evaluation at this step, if there was one."""
        started = time.perf_counter()
        self.stop.wants_save = False  # a request from here on asks for another one
        state = collect()
        self.output.save_checkpoint(state, value)
        seconds = time.perf_counter() - started
        self._saved_at = time.monotonic()
        self.output.metrics({"time/save_seconds": seconds}, state.position.global_step)
        self.display.saved(state.position.global_step, seconds)
