"""The training: epochs of steps, evaluated, recorded and saved. Every rank runs the same code."""

import gc
import time
from dataclasses import dataclass, field, replace

from torch import nn

from pipeline.base.signals import StopRequest
from pipeline.base.timing import PhaseTimer, StartupTimer
from pipeline.config.schema import TrainConfig
from pipeline.data.loaders import Loader
from pipeline.learning.evaluation import Evaluator
from pipeline.learning.metrics import Evaluation
from pipeline.learning.update import Update
from pipeline.parallel.rank import Rank
from pipeline.run.checkpoint import Best, Position, RunIdentity, TrainingState, is_better
from train.agreement import Agreement
from train.display import Display
from train.output import Outcome, RunOutput
from train.profiling import Profiler
from train.recording import Recording
from train.saving import Saving
from train.steps.parts import Step


@dataclass
class Trainer:
    """Trains a model. All parts are built outside and given in."""

    config: TrainConfig
    saving: Saving
    rank: Rank
    model: nn.Module
    """Unwrapped: evaluated and saved. `step` trains the same model, wrapped as it needs."""
    step: Step
    update: Update
    train_loader: Loader
    evaluator: Evaluator
    recording: Recording
    output: RunOutput
    display: Display
    stop: StopRequest
    agreement: Agreement
    timer: PhaseTimer
    startup: StartupTimer
    profiler: Profiler
    identity: RunIdentity
    test_evaluator: Evaluator | None = None
    position: Position = field(default_factory=Position)
    best: Best | None = None
    last_evaluation: Evaluation | None = None
    _stopping: bool = False

    def fit(self) -> Outcome:
        """Collective. Train from `position` to the last epoch, or until asked to stop."""
        self.step.prepare()
        self.timer.read()  # forgets what the preparation took
        is_finished = self._train_epochs()
        gc.unfreeze()
        self.profiler.close(self.output)
        if is_finished:
            self.recording.check_some_steps(self.position.global_step)
        if is_finished and self.last_evaluation is None:  # resumed behind the last epoch
            self.last_evaluation = self.run_evaluation(self.evaluator)
        return "finished" if is_finished and self.last_evaluation else "preempted"

    def _train_epochs(self) -> bool:
        while self.position.epoch < self.config.epochs:
            if not self.train_epoch() or not self.evaluate():
                self.save()
                return False
            if self.position.epoch < self.config.epochs and self.rank.any(bool(self.stop)):
                return False
        return True

    def train_epoch(self) -> bool:
        """Collective. Train what remains of the epoch; return False if a request to stop interrupted it."""
        epoch, samples_seen = self.position.epoch, self.position.samples_seen
        started = time.perf_counter()
        self.model.train()
        self.display.begin_epoch(epoch, samples_seen)
        self.agreement.restart()
        self.timer.start()
        for batch in self.train_loader.batches(epoch, samples_seen):
            self.timer.begin_step()
            self.timer.lap("data")
            sums = self.step(batch, self.position.global_step)
            self.position = Position(epoch, batch.end, self.position.global_step + 1)
            self.recording.add(sums, batch.global_count)
            self.display.advance(batch.global_count)
            self._after_step()
            self.timer.lap("other")
            if self._stopping:
                break
        self.recording.finish()
        self.rank.wait_for_device()  # or the seconds of its last steps would be counted elsewhere
        self.timer.lap("other")
        self.display.end_epoch()
        if samples_seen == 0 and not self._stopping:
            self.output.metrics({"perf/epoch_seconds": time.perf_counter() - started}, self.position.global_step)
        return not self._stopping

    def _after_step(self) -> None:
        """Collective. Do whatever is due at this step."""
        if self.startup.after_step(self.output.metrics, self.position.global_step):
            gc.freeze()  # else each full collection would visit all modules and the whole model again
        if self.profiler.after_step(self.output):
            self.timer.start()  # writing the trace belongs to no step
        self.recording.finish()
        step = self.position.global_step
        if step % self.config.log_every == 0 or step == self.update.schedule.total_steps:
            self.recording.begin(step)
        decision = self.agreement.after_step(stop=bool(self.stop), save=self.saving.is_wanted())
        self._stopping = decision.stop
        if (decision.save or self.saving.is_due(step)) and not self._stopping:
            self.save()

    def evaluate(self) -> bool:
        """Collective. End the epoch: evaluate, record, remember the best, save.

        Returns False if a request to stop interrupted it: then it is done when the training is resumed.
        """
        started = time.perf_counter()
        evaluation = self.last_evaluation = self.run_evaluation(self.evaluator)
        if evaluation is None:
            return False
        self.recording.evaluated(self.position, self.evaluator, evaluation, time.perf_counter() - started)
        value, before, step = evaluation.metrics[self.saving.config.metric], self.best, self.position.global_step
        if before is None or is_better(self.saving.config.metric, value, before.value):
            self.best = Best(value, step)
        self.position = replace(self.position, epoch=self.position.epoch + 1, samples_seen=0)
        self.save(value)  # first: from this checkpoint a resume can write the best weights, should they not get there
        if self.best is not before and not self.output.save_best(self.model.state_dict(), step):
            self.best = before
        return True

    def run_evaluation(self, evaluator: Evaluator) -> Evaluation | None:
        """Collective. Return None if a request to stop interrupted it."""
        self.agreement.restart()
        return evaluator.evaluate(self._after_evaluation_batch)

    def _after_evaluation_batch(self) -> bool:
        """Collective. Return whether all are to stop."""
        self.timer.start()  # an evaluation belongs to no step, and the watchdog sees that it advances
        return self.agreement.after_step(stop=bool(self.stop)).stop

    def save(self, value: float | None = None) -> None:
        """Collective. Save a checkpoint. `value` is the evaluation at this step, if there was one."""
        self.recording.finish()  # what is recorded up to a checkpoint stands before it
        self.timer.lap("other")
        self.saving.save(self.state, value)
        self.timer.start()

    def state(self) -> TrainingState:
        """Collective. Return all that `load_state` needs."""
        return TrainingState(
            position=self.position,
            best=self.best,
            identity=self.identity,
            model=self.model.state_dict(),
            update=self.update.state_dict(),
            recording=self.recording.state(),
        )

    def load_state(self, state: TrainingState) -> None:
        """Continue where `state` was taken, with the settings of now (say, another weight decay)."""
        self.model.load_state_dict(state.model)
        self.update.load_state_dict(state.update)
        self.recording.load_state(state.recording)
        self.position, self.best = state.position, state.best
