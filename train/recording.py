"""Records: of the steps since the last one, summed on the device and read a step later; and of evaluations."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from pipeline.base.timing import PhaseTimer
from pipeline.config.schema import TrainConfig
from pipeline.learning.evaluation import Evaluator
from pipeline.learning.metrics import Evaluation, find_straggler, mean_times
from pipeline.learning.update import NonFiniteError, Update
from pipeline.parallel.rank import PendingSum, Rank, RemoteError
from pipeline.run.checkpoint import Position
from train.display import Display
from train.output import RunOutput

NUM_SNAPSHOTS = 32
"""Evaluations of a training at which predictions are recorded, at most, evenly over it."""


class Recording:
    """Sums the results of steps, and makes a record of them. Adding does not wait for the device."""

    def __init__(
        self, config: TrainConfig, rank: Rank, timer: PhaseTimer, update: Update, output: RunOutput, display: Display
    ):
        self._config = config
        self._rank = rank
        self._timer = timer
        self._update = update
        self._output = output
        self._display = display
        self._sums = torch.zeros(2, dtype=torch.float64, device=rank.device)
        self._num_samples = 0
        self._timed_samples = 0
        """The samples since the last record of this attempt, which `images/s` is about."""
        self._pending: Callable[[], None] | None = None
        """Writes the record whose sum over the ranks is on its way."""

    def add(self, sums: Tensor, num_samples: int) -> None:
        """Add a step. `sums`, float64 [loss, correct], is this rank's; `num_samples` counts those of all ranks."""
        self._sums += sums
        self._num_samples += num_samples
        self._timed_samples += num_samples

    def begin(self, step: int) -> None:
        """Collective. Begin to sum the steps since the last record over the ranks.

        The sum is read behind the next step, when it has arrived: neither the device nor this rank waits for it. The
        skipped steps, the same on all ranks, and the phase times of each rank ride along.
        """
        self._timer.lap("other")
        times = self._timer.read()
        rate = self._timed_samples / times.seconds if times.seconds > 0 else 0.0
        milliseconds = torch.zeros(self._rank.world_size, len(times.milliseconds), dtype=torch.float64)
        milliseconds[self._rank.rank] = torch.tensor(times.milliseconds, dtype=torch.float64)
        on_device = milliseconds.flatten().to(self._sums.device, non_blocking=True)
        skipped = self._update.pop_skipped() * self._rank.is_main
        pending = self._rank.reduce_sum_later(torch.cat((self._sums, skipped, on_device)))
        others = {"train/lr": self._update.lr, "perf/images_per_second": rate}
        self._pending = partial(self._write, step, pending, self._num_samples, others)
        self._sums.zero_()
        self._num_samples = self._timed_samples = 0

    def finish(self) -> None:
        """Collective. Write the record that was begun, if any was.

        Raises NonFiniteError on rank 0, RemoteError on the others, after too many skipped steps in a row.
        """
        if self._pending is not None:
            write, self._pending = self._pending, None
            write()

    def _write(self, step: int, pending: PendingSum, num_samples: int, others: Mapping[str, float]) -> None:
        self._timer.lap("other")
        loss, correct, num_skipped, longest_run, *flat = pending.values()
        self._timer.lap("communication")
        times = np.array(flat).reshape(self._rank.world_size, -1)  # torch takes ten times as long for so little
        straggler = find_straggler(times)
        metrics = {"train/loss": loss / max(1, num_samples), "train/accuracy": correct / max(1, num_samples), **others}
        metrics |= mean_times(times) | (straggler.metrics if straggler else {})
        metrics |= {"train/skipped_steps": num_skipped} if num_skipped else {}
        self._output.metrics(metrics, step)
        self._display.record(step, metrics, straggler)
        if longest_run >= self._config.max_nonfinite:
            limit, steps = self._config.max_nonfinite, f"{longest_run:.0f} steps in a row, up to step {step:,}"
            self._fail(f"the gradients of {steps}, were not finite (train.max_nonfinite = {limit})")

    def check_some_steps(self, num_steps: int) -> None:
        """Raise NonFiniteError on rank 0, RemoteError on the others, if none of so many steps changed the weights."""
        if 0 < num_steps == self._update.num_skipped:
            self._fail(f"the gradients of all {num_steps:,} steps were not finite")

    def _fail(self, problem: str) -> NoReturn:
        ways_out = "Lower optim.lr, set train.clip_norm, or look for what is wrong in the data"
        reason = f"{problem}; none of them changed the weights. {ways_out}"
        raise NonFiniteError(reason) if self._rank.is_main else RemoteError(reason)

    def evaluated(self, position: Position, evaluator: Evaluator, evaluation: Evaluation, seconds: float) -> None:
        """Record the evaluation at the end of an epoch, and at some of them a snapshot of predictions."""
        step, number, num_epochs = position.global_step, position.epoch + 1, self._config.epochs
        self._output.metrics(evaluation.metrics | {"time/evaluation_seconds": seconds}, step)
        if number == num_epochs or number % -(-num_epochs // NUM_SNAPSHOTS) == 0:
            self._output.predictions(evaluator, step)
        self._display.evaluated(position.epoch, evaluation, seconds)

    def state(self) -> dict[str, Any]:
        """Collective. Return what a checkpoint keeps of a record that is not complete yet.

        The sums of each rank apart: added up in another order they would differ in the last bit.
        """
        return {"sums": self._rank.gather(self._sums.tolist()), "count": self._num_samples}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue the record of a checkpoint. On another number of ranks the first takes the sum of all."""
        sums = torch.tensor(state["sums"], dtype=torch.float64).view(-1, 2)
        if len(sums) == self._rank.world_size:
            self._sums.copy_(sums[self._rank.rank])
        else:
            self._sums.copy_(sums.sum(0) if self._rank.is_main else torch.zeros(2, dtype=torch.float64))
        self._num_samples = int(state["count"])
