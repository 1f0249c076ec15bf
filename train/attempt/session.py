"""One attempt at a run: take its folder, find where it stands, start the publisher, and leave all in order."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.base.credentials import without_credentials
from pipeline.base.launch import Launch
from pipeline.base.provenance import collect_provenance
from pipeline.config import Config
from pipeline.data.sources.datasets import Dataset
from pipeline.learning.evaluation import Predictions
from pipeline.parallel.rank import Rank
from pipeline.run.checkpoint import TrainingState
from pipeline.run.folder import RunError, RunFolder
from pipeline.run.journal import Journal, now_ms
from pipeline.run.published import Progress
from pipeline.run.resume import changes
from pipeline.run.sweep import of_folder
from train.attempt.claim import Claim, claim_run
from train.attempt.results import (
    describe_model,
    describe_opening,
    describe_sample,
    sync_command,
    write_results,
    write_slide_images,
)
from train.attempt.sidecars import PublisherProcess, SamplerProcess
from train.build import build_schedule
from train.output import NUM_SLIDE_IMAGES, FolderOutput, NullOutput, RunOutput
from train.trainer import Outcome, Trainer

PREEMPTED_TIMEOUT = 10.0
"""Seconds to wait for the publisher after a request to stop: who asked will not wait for tracking.close_timeout."""
DIGITS_NOTE = "this is the embedded digits data (1,797 real 8x8 images); data.dataset=mnist trains on MNIST"
logger = logging.getLogger("convoy")


@dataclass(frozen=True)
class Start:
    """Where this attempt begins, as rank 0 tells it to all."""

    run_id: str
    folder: Path
    checkpoint: TrainingState | None
    """Where to go on; None to begin."""
    is_finished: bool = False
    """There is nothing left to train."""


class Attempt:
    """Rank 0's side: everything that touches the run folder."""

    def __init__(self, config: Config, config_name: str, launch: Launch, rank: Rank, dataset: Dataset, root: Path):
        self.config = config
        self.config_name = config_name
        self.launch = launch
        self.rank = rank
        self.dataset = dataset
        self.root = root
        self.uri = tracking_uri(config)
        self.output: FolderOutput | None = None
        self.publisher: PublisherProcess | None = None
        self.last_lines: list[str] = []

    def begin(self, stack: ExitStack) -> Start:
        """Take the folder; `stack` holds its lock. Raises RunError if that is refused, before anything is written."""
        try:
            return self._begin(stack)
        except OSError as error:
            raise RunError(f"the run cannot be written: {error}; set run.dir to a folder that can be") from error

    def _begin(self, stack: ExitStack) -> Start:
        claim = claim_run(self.config, self.config_name, self.launch, self.dataset.digest, stack)
        folder = claim.folder
        if claim.is_finished:
            logger.info(
                "run %s is finished (%d epochs) and left as it is; raise train.epochs to go on, or choose another "
                "run.name",
                folder.name,
                folder.status()["epoch"],
            )
            if self.config.tracking.enabled and not Progress(folder, self.uri).is_complete():
                logger.info("MLflow has not everything of it; publish the rest with: %s", sync_command(folder))
            return Start("", folder.path, None, is_finished=True)
        journal = claim.open_journal()
        prefix = f"resume.{journal.num_attempts}." if journal.run_id else ""
        saved_step = claim.step if claim.state else None
        self.output = FolderOutput(folder, journal, claim.checkpoints, prefix, saved_step)
        write_slide_images(folder, self.dataset, NUM_SLIDE_IMAGES)
        run_id = self._record_beginning(claim, journal)
        if self.config.tracking.enabled:
            self._start_publisher(folder)
        return Start(run_id, folder.path, claim.state)

    def _start_publisher(self, folder: RunFolder) -> None:
        try:
            self.publisher = PublisherProcess(folder.path, self.uri)
        except OSError as error:
            logger.warning("nothing is published while it trains: %s", error)

    def _record_beginning(self, claim: Claim, journal: Journal) -> str:
        assert self.output is not None
        tags, folder, run_id = self._tags(), claim.folder, journal.run_id
        if run_id is None:
            run_id = claim.state.run_id if claim.state else uuid.uuid4().hex
            self._record_new_run(journal, run_id, tags)
            logger.info("run %s: %s", folder.name, os.path.relpath(folder.path))
        else:
            changed = changes(folder, self.config)
            values = tags | {key: now for key, _, now in changed}
            prefix = self.output.tag_prefix
            journal.append("tags", values={prefix + key: str(value) for key, value in values.items()})
            logger.info("run %s continues behind step %d: %s", folder.name, claim.step, os.path.relpath(folder.path))
            for key, before, now in changed:
                logger.info("  from here on with %s=%s, which was %s", key, now, before)
        temporary = folder.config.with_name(".writing-config.yaml")
        temporary.write_text(self.config.to_yaml())
        temporary.replace(folder.config)
        folder.update_status(
            run_id=run_id,
            launch_id=self.launch.run_id,
            tracking_uri=without_credentials(self.uri),
            fruitless_attempts=claim.num_fruitless,
            began_at_step=claim.step,
            epoch=claim.epoch,
            global_step=claim.step,
        )
        self.output.begin({"host": tags["host"], "ranks": tags["world_size"]})
        return run_id

    def _record_new_run(self, journal: Journal, run_id: str, tags: dict[str, str]) -> None:
        assert self.output is not None
        info = self.dataset.info
        steps = build_schedule(self.config, info).steps_per_epoch
        uri = without_credentials(self.uri)
        folder, experiment = self.output.folder, self.config.tracking.experiment
        params = self.config.flat() | {"tracking.uri": uri, "steps_per_epoch": steps}
        sweep = of_folder(folder.path.parent)
        sizes = {"num_train": info.train_size, "num_eval": info.eval_size}
        journal.append_all(
            [
                {"kind": "run", "run_id": run_id, "name": folder.name, "experiment": experiment, "tracking_uri": uri}
                | {"command": without_credentials(command_line()), "timestamp_ms": now_ms()}
                | ({"sweep": sweep} if sweep else {}),  # an element of it
                {"kind": "params", "values": params},
                {"kind": "tags", "values": tags},
                {"kind": "dataset", "name": info.name, "digest": self.dataset.digest, "source": info.source, **sizes},
            ]
        )

    def _tags(self) -> dict[str, str]:
        rank = self.rank
        return collect_provenance(os.environ, self.root) | {
            "world_size": str(rank.world_size),
            "backend": rank.backend,
            "device": rank.device.type,
            "threads_per_rank": str(rank.num_threads),
            "config": self.config_name,
        }

    def finish(self, trainer: Trainer, predictions: Predictions) -> None:
        assert self.output is not None
        assert trainer.last_evaluation is not None
        evaluation, step = trainer.last_evaluation, trainer.position.global_step
        weights = trainer.network.state_dict()
        best = trainer.best.global_step if trainer.best else step
        write_results(self.output, self.config, self.dataset, evaluation, predictions, weights, step, best)
        self.output.end("finished", "finished")
        self.last_lines = [
            f"finished: {evaluation.accuracy:.2%} of {evaluation.count:,} test images right (best at step {best:,})",
            describe_sample(self.dataset.info, predictions),
        ]

    def preempt(self, trainer: Trainer) -> None:
        assert self.output is not None
        reason = f"on {trainer.stop.reason}" if trainer.stop else "as another rank was asked to"
        step, name = trainer.position.global_step, self.output.folder.name
        if self.output.saved_step != step:
            raise RunError(
                f"stopped {reason} behind step {step}, which could not be saved; run.name={name} goes on "
                f"behind step {self.output.saved_step or 0}"
            )
        self.output.end("preempted", f"stopped {reason} behind step {step}")
        if of_folder(self.output.folder.path.parent):
            how = "; to continue, submit its sweep again"
        elif os.environ.get("CONVOY_STOP_FILE", "no file") in reason:  # the batch job that made it says what follows
            how = ""
        else:
            how = f"; to continue, the same command with run.name={name}"
        self.last_lines = [f"stopped {reason} behind step {step}, all saved{how}"]

    def fail(self, cause: BaseException) -> None:
        if self.output is None:
            return
        try:
            self.output.end("failed", f"{type(cause).__name__}: {cause}")
        except OSError as error:  # a full disk, say: must not hide what made the training fail
            logger.warning("the failure cannot be recorded in %s: %s", self.output.folder.path, error)
        logger.warning("failed; what MLflow does not get now is published by: %s", sync_command(self.output.folder))

    def close(self, outcome: Outcome | None) -> None:
        """After the process group is left: wait for the publisher, and say the last lines."""
        if self.output is None:
            return
        for line in self.last_lines:
            logger.info("%s", line)
        published = False
        if self.publisher is not None:
            logger.info("publishing to %s", without_credentials(self.uri))
            timeout = self.config.tracking.close_timeout
            if outcome == "preempted":
                timeout = min(timeout, PREEMPTED_TIMEOUT)
            published = self.publisher.wait(timeout)
            if not published and self.launch.launcher_is_gone:
                self.publisher.kill()  # nothing is to outlive it for long
        folder, progress = self.output.folder, Progress(self.output.folder, self.uri)
        if published and outcome == "finished":
            for line in describe_model(progress):
                logger.info("%s", line)
        if self.config.tracking.enabled:
            logger.info("%s", describe_opening(folder, progress, published=published))
        elif of_folder(folder.path.parent):
            logger.info("tracking is off; publish the sweep with: %s", sync_command(RunFolder(folder.path.parent)))
        else:
            logger.info("tracking is off; publish the run with: %s", sync_command(folder))
        if self.config.data.dataset == "digits":
            logger.info("%s", DIGITS_NOTE)


@dataclass
class Session:
    """This attempt as every rank sees it; only rank 0 has the `attempt` that writes."""

    start: Start
    attempt: Attempt | None
    sampler: SamplerProcess | None
    """Of the first rank of each node."""
    outcome: Outcome | None = None

    @property
    def output(self) -> RunOutput:
        return self.attempt.output if self.attempt and self.attempt.output else NullOutput()

    def end(self, outcome: Outcome, trainer: Trainer) -> None:
        """Collective: every rank must call. Write what the training leaves."""
        self.outcome = outcome
        if self.sampler is not None:
            self.sampler.close()
        trainer.rank.any(False)  # all samples are written before the run is said to have ended
        predictions = trainer.evaluator.predictions() if outcome == "finished" else None
        if self.attempt is None:
            return
        if predictions is None:
            self.attempt.preempt(trainer)
        else:
            self.attempt.finish(trainer, predictions)

    def fail(self, cause: BaseException) -> None:
        """Record that the attempt ended so."""
        if self.attempt is not None:
            self.attempt.fail(cause)

    def close(self) -> None:
        """After the process group is left: wait for the publisher, and say the last lines."""
        if self.attempt is not None:
            self.attempt.close(self.outcome)


@contextmanager
def open_session(
    config: Config, config_name: str, launch: Launch, rank: Rank, dataset: Dataset, root: Path
) -> Iterator[Session]:
    """Collective: every rank must call. A failure inside is recorded as the end of the run."""
    with ExitStack() as stack:
        attempt = Attempt(config, config_name, launch, rank, dataset, root) if rank.is_main else None
        start = rank.from_main(lambda: attempt.begin(stack) if attempt else None)
        assert start is not None
        sampler = None
        if rank.local_rank == 0 and config.tracking.system_every > 0 and not start.is_finished:
            sampler = SamplerProcess(start.folder, config.tracking.system_every)
            stack.callback(sampler.close)
        session = Session(start, attempt, sampler)
        try:
            yield session
        except BaseException as error:
            session.fail(error)
            raise


def command_line() -> str:
    """What starts this program again, as one would type it."""
    return shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def tracking_uri(config: Config) -> str:
    """tracking.uri, else MLFLOW_TRACKING_URI, else the SQLite file that a bare `mlflow server` opens here."""
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri
