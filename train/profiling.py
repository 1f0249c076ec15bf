"""`train.profile`: a trace of some steps, as torch's profiler sees them, for chrome://tracing or Perfetto."""

from typing import Any

import torch

from pipeline.base.logs import logger
from train.output import RunOutput

NUM_SKIPPED = 5
"""Steps before the trace begins, in which caches fill and kernels are chosen."""


class Profiler:
    """Traces `num_steps` consecutive steps of this rank, none if 0, and gives the trace to the run."""

    def __init__(self, num_steps: int):
        self._num_steps = num_steps
        self._steps_seen = 0
        self._profile: Any = None

    def after_step(self, output: RunOutput) -> bool:
        """Return whether time was spent on writing a trace."""
        self._steps_seen += 1
        if self._num_steps > 0 and self._steps_seen == NUM_SKIPPED:
            self._profile = torch.profiler.profile(record_shapes=True)
            self._profile.start()
        elif self._profile is not None and self._steps_seen == NUM_SKIPPED + self._num_steps:
            self.close(output)
            return True
        return False

    def close(self, output: RunOutput) -> None:
        """Write what there is of a trace that is not complete."""
        if self._profile is not None:
            self._profile.stop()
            output.save_trace(self._profile.export_chrome_trace)
            self._profile = None
        elif self._num_steps > 0 and self._steps_seen < NUM_SKIPPED:
            logger.warning("no trace: the training ended before step %d, behind which it begins", NUM_SKIPPED)
