"""The training: epochs of steps, evaluated, recorded and saved. Every rank runs the same prose."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from pipeline.base.signals import StopRequest
from pipeline.base.startup import StartupTimer
from pipeline.base.timing import PhaseTimer
from pipeline.config import Config
from pipeline.data.inputs import Loader
from pipeline.learning.evaluation import Evaluator, Interrupted
from pipeline.learning.metrics import Evaluation, PendingRecord, TrainMeter
from pipeline.learning.optim import Schedule
from pipeline.learning.precision import NonFiniteError, Precision
from pipeline.learning.stragglers import find_straggler, mean_times
from pipeline.parallel.rank import Rank, RemoteError
from pipeline.run.checkpoint import Best, Position, TrainingState
from train.agreement import Ballot
from train.display import Display
from train.output import RunOutput
from train.profiling import Profiler
from train.pulse import Pulse
from train.steps.eager import Step

NUM_SLIDES = 32
"""Of predictions over a training, at most."""
Outcome = Literal["finished", "preempted"]


@dataclass(frozen=True)
class RecordUnderWay:
    """What a record will hold when the sums over the ranks have arrived."""

    sums: PendingRecord
    step: int
    lr: float
    images_per_second: float


@dataclass
class Trainer:
    """All parts are built outside and given in."""

    config: Config
    rank: Rank
    network: nn.Module
    """Unwrapped: what is evaluated and saved."""
    step: Step
    """Trains the same network, wrapped as it needs."""
    optimizer: Optimizer
    schedule: Schedule
    precision: Precision
    train_loader: Loader
    evaluator: Evaluator
    output: RunOutput
    display: Display
    stop: StopRequest
    timer: PhaseTimer
    startup: StartupTimer
    profiler: Profiler
    run_id: str
    dataset_digest: str
    waits_in_backward: bool = False
    """For the gradients of other ranks."""
    pulse: Pulse = field(default_factory=Pulse)
    position: Position = field(default_factory=Position)
    best: Best | None = None
    last_evaluation: Evaluation | None = None
    meter: TrainMeter = field(init=False)
    ballot: Ballot = field(init=False)
    _stopping: bool = False
    _saved_at: float = field(default_factory=time.monotonic)
    _pending: RecordUnderWay | None = None
    _num_samples: int = 0
    """Trained since the last record."""

    def __post_init__(self) -> None:
        self.meter = TrainMeter(self.rank.device)
        self.ballot = Ballot(self.rank)

    def fit(self) -> Outcome:
        """Collective: every rank must call. Train from `position` to the last epoch, or until asked to stop."""
        self.step.prepare()
        self.timer.read()  # forgets what the preparation took
        outcome = self._train_epochs()
        self.profiler.close(self.output)
        if outcome == "finished" and self.last_evaluation is None:  # resumed behind the last epoch
            self.last_evaluation = self.evaluator.evaluate(self._beat)
        return outcome

    def _train_epochs(self) -> Outcome:
        while self.position.epoch < self.config.train.epochs:
            if not self.train_epoch() or not self.evaluate():
                self.save()
                return "preempted"
            if self.position.epoch < self.config.train.epochs and self.rank.any(bool(self.stop)):
                return "preempted"
        return "finished"

    def train_epoch(self) -> bool:
        """Train what remains of the epoch; False if it was interrupted by a request to stop."""
        epoch, samples_seen = self.position.epoch, self.position.samples_seen
        started = time.perf_counter()
        self.train_loader.sampler.set_position(epoch, samples_seen)
        self.network.train()
        self.display.begin_epoch(epoch, samples_seen)
        self._stopping = False
        self.ballot.begin()
        self.timer.start()
        for batch in self.train_loader:
            self.timer.begin_step()
            self.timer.lap("data")
            lr = self.schedule.lr(self.position.global_step)
            sums = self.step(batch, lr=lr, global_step=self.position.global_step)
            self.position = Position(epoch, batch.end, self.position.global_step + 1)
            self.meter.add(sums, batch.global_count)
            self._num_samples += batch.global_count
            self.display.advance(batch.global_count)
            self._after_step(lr)
            self.pulse.beat()
            self.timer.lap("other")
            if self._stopping:
                break
        self.finish_record()
        self.rank.wait_for_device()  # or the seconds of its last steps would be counted elsewhere
        self.timer.lap("other")
        self.display.end_epoch()
        if samples_seen == 0 and not self._stopping:
            self.output.metrics({"perf/epoch_seconds": time.perf_counter() - started}, self.position.global_step)
        return not self._stopping

    def _after_step(self, lr: float) -> None:
        """Collective: every rank must call. Whatever is due at this step."""
        self.startup.after_step(self.output, self.position.global_step)
        if self.profiler.after_step(self.output):
            self.timer.start()  # writing the trace belongs to no step
        self.finish_record()
        if self._is_due(self.config.train.log_every) or self.position.global_step == self.schedule.total_steps:
            self.begin_record(lr)
        decision = self.ballot.after_step(stop=bool(self.stop), save=self._wants_to_save())
        self._stopping = decision.stop
        if (decision.save or self._is_due(self.config.checkpoint.every_steps)) and not self._stopping:
            self.save()

    def _wants_to_save(self) -> bool:
        """Of this rank, by its clock or on request; it counts in the next vote."""
        minutes = self.config.checkpoint.every_minutes
        is_time = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return self.rank.is_main and (is_time or self.stop.wants_save)

    def begin_record(self, lr: float) -> None:
        """Collective: every rank must call. Send the sums of the steps since the last record on their way.

        They are read behind the next step, when they have arrived: neither the device nor this rank waits for them.
        """
        self.timer.lap("other")
        times = self.timer.read()
        rate = self._num_samples / times.seconds if times.seconds > 0 else 0.0
        self._num_samples = 0
        record = self.meter.reduce(self.rank, times.milliseconds, self.precision.take_skipped())
        self._pending = RecordUnderWay(record, self.position.global_step, lr, rate)

    def finish_record(self) -> None:
        """Collective: every rank must call. Record what is under way, if anything is."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self.timer.lap("other")
        record = pending.sums.result()
        self.timer.lap("communication")
        num_skipped, longest_row = record.common
        straggler = find_straggler(record.rows)
        metrics = record.metrics | {"train/lr": pending.lr, "perf/images_per_second": pending.images_per_second}
        metrics |= mean_times(record.rows) | (straggler.metrics if straggler else {})
        metrics |= {"train/skipped_steps": num_skipped} if num_skipped else {}
        self.output.metrics(metrics, pending.step)
        self.display.record(pending.step, metrics, straggler)
        if longest_row >= self.config.train.max_nonfinite:
            self._give_up(int(longest_row))

    def _give_up(self, num_steps: int) -> None:
        reason = (
            f"the gradients of {num_steps} steps in a row, up to step {self.position.global_step:,}, were not finite "
            f"(train.max_nonfinite = {self.config.train.max_nonfinite}); none of them changed the weights. Lower "
            "optim.lr, set train.clip_norm, or look for what is wrong in the data"
        )
        raise NonFiniteError(reason) if self.rank.is_main else RemoteError(reason)

    def evaluate(self) -> bool:
        """Collective: every rank must call. Ends the epoch: evaluate, record, remember the best, save.

        False if it was interrupted by a request to stop: then it is done when the training is resumed.
        """
        started = time.perf_counter()
        self.ballot.begin()
        try:
            evaluation = self.evaluator.evaluate(self._after_evaluation_step)
        except Interrupted:
            return False
        seconds = time.perf_counter() - started
        self.timer.start()  # it belongs to no step
        self.last_evaluation = evaluation
        values = {"eval/loss": evaluation.loss, "eval/accuracy": evaluation.accuracy}
        self.output.metrics(values | {"time/evaluation_seconds": seconds}, self.position.global_step)
        if self._is_slide_due():
            self.output.predictions(self.evaluator, self.position.global_step)
        self.display.evaluated(self.position.epoch, evaluation, seconds)
        value = values[self.config.checkpoint.metric]
        is_best = self.best is None or is_better(self.config.checkpoint.metric, value, self.best.value)
        if is_best and self.output.save_best(self.network.state_dict()):  # else the best before it stays
            self.best = Best(value, self.position.global_step)
        self.position = replace(self.position, epoch=self.position.epoch + 1, samples_seen=0)
        self.save(value)
        return True

    def _beat(self) -> bool:
        """Not interrupted."""
        self.pulse.beat()
        return False

    def _after_evaluation_step(self) -> bool:
        """Collective: every rank must call. Whether all are to stop."""
        self.pulse.beat()
        return self.ballot.after_step(stop=bool(self.stop)).stop

    def save(self, value: float | None = None) -> None:
        """Collective: every rank must call. `value` is the evaluation at this step, if there was one."""
        self.finish_record()  # what is recorded up to a checkpoint stands before it
        self.timer.lap("other")
        started = time.perf_counter()
        self.stop.wants_save = False  # from here on it would be another one
        self.output.save_checkpoint(self.state(), value)
        seconds = time.perf_counter() - started
        self._saved_at = time.monotonic()
        self.pulse.beat()
        self.output.metrics({"time/save_seconds": seconds}, self.position.global_step)
        self.display.saved(self.position.global_step, seconds)
        self.timer.start()

    def state(self) -> TrainingState:
        """Collective: every rank must call. All that `load_state` needs."""
        return TrainingState(
            position=self.position,
            best=self.best,
            run_id=self.run_id,
            model=self.network.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.precision.state_dict(),
            meter=self.meter.state(self.rank),
            config=self.config.flat(),
            dataset_digest=self.dataset_digest,
        )

    def load_state(self, state: TrainingState) -> None:
        """Go on where `state` was taken, with the settings of now (say, another weight decay)."""
        self.network.load_state_dict(state.model)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state.optimizer["state"], "param_groups": groups})
        self.precision.load_state_dict(state.scaler)
        self.meter.load_state(state.meter, self.rank)
        self.position, self.best = state.position, state.best

    def _is_slide_due(self) -> bool:
        """At evaluations evenly over the training, and at its last."""
        epochs, number = self.config.train.epochs, self.position.epoch + 1
        return number == epochs or number % -(-epochs // NUM_SLIDES) == 0

    def _is_due(self, every: int | None) -> bool:
        """Every so many optimizer steps of the whole training, wherever it was resumed."""
        return every is not None and self.position.global_step % every == 0


def is_better(metric: str, value: float, than: float) -> bool:
    """NaN is better than nothing, and nothing is worse than NaN."""
    if than != than:
        return value == value
    return value < than if metric == "eval/loss" else value > than
