"""One attempt at a run: claim its folder, begin, train, finish or fail, close. Rank 0 writes, all ranks take part."""

import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.base.files import sqlite_uri
from pipeline.base.launch import Launch
from pipeline.base.logs import logger
from pipeline.base.signals import StopRequest
from pipeline.config import Config
from pipeline.data.samples import DataError, Dataset
from pipeline.learning.update import NonFiniteError
from pipeline.models.bundle import TRUST_VARIABLE
from pipeline.parallel.rank import Rank, RemoteError, is_lost_connection
from pipeline.run.checkpoint import TrainingState
from pipeline.run.folder import RunError
from pipeline.run.published import Progress
from pipeline.run.sweep import read_sweep_folder
from train.attempt.begin import begin_attempt, restore_best, tracking_uri
from train.attempt.claim import Claim, Invocation, claim_run
from train.attempt.finish import evaluate_test_split, record_stop, write_results
from train.attempt.sidecars import MonitorProcess, start_publisher
from train.output import FolderOutput, Outcome, RunOutput
from train.trainer import Trainer

PREEMPTED_TIMEOUT = 10.0
"""Seconds to wait for the publisher after a request to stop: who asked will not wait for tracking.close_timeout."""


@dataclass
class Attempt:
    """One attempt at a run as every rank sees it; only rank 0 has a claim, a folder to write into, and a publisher."""

    call: Invocation
    rank: Rank
    folder: Path
    is_finished: bool
    """Whether nothing is left to train."""
    claim: Claim | None
    output: RunOutput = field(default_factory=RunOutput)
    state: TrainingState | None = None
    """The checkpoint to continue from, on rank 0."""
    outcome: Outcome | None = None
    dataset: Dataset | None = None
    publisher: subprocess.Popen[bytes] | None = None
    monitor: MonitorProcess | None = None
    """On the first rank of each node."""
    last_lines: tuple[str, ...] = ()

    @property
    def uri(self) -> str:
        return tracking_uri(self.call.config)

    def begin(self, dataset: Dataset) -> TrainingState | None:
        """Collective. Record the beginning, and return the checkpoint to continue from.

        Starts what runs beside the training. Raises RunError where the run is refused, before anything is written.
        """
        self.dataset = dataset
        self._say_note()
        self.rank.run_on_main(self._begin)
        tracking = self.call.config.tracking
        if self.rank.local_rank == 0 and tracking.system_every > 0:
            self.monitor = MonitorProcess(self.folder, tracking.system_every)
        # tensor by tensor: one pickle of all would go through the memory of every GPU
        state = self.rank.broadcast_state(vars(self.state) if self.state else None)
        return TrainingState(**state) if state else None

    def _begin(self) -> None:
        assert self.claim is not None and self.dataset is not None
        try:
            self.output = output = begin_attempt(self.call, self.claim, self.rank, self.dataset)
            self.state = self.claim.state and restore_best(output, self.claim.state)
        except OSError as error:
            raise _cannot_write(error) from error
        if self.call.config.tracking.enabled:
            try:
                self.publisher = start_publisher(self.folder, self.uri)
            except OSError as error:
                logger.warning("nothing is published while it trains: %s", error)

    def end(self, outcome: Outcome, trainer: Trainer) -> None:
        """Collective. Write what the training leaves."""
        self.close_monitor()
        self.rank.barrier()  # the metrics of all nodes are written before the run is said to have ended
        output = self.output if isinstance(self.output, FolderOutput) else None
        lines, test_lines = list[str](), None
        if outcome == "finished":
            predictions = trainer.evaluator.predictions()
            if output:
                assert self.dataset is not None
                lines = write_results(output, self.call.config, self.dataset, trainer, predictions)
            test_lines = evaluate_test_split(output, trainer)
        self.outcome = "preempted" if test_lines is None else "finished"
        if output and test_lines is None:
            lines = record_stop(output, trainer)
        elif output:
            output.end("finished", "finished")
        self.last_lines = (*lines, *(test_lines or ()))

    def fail(self, cause: BaseException) -> None:
        """Record on rank 0 that the attempt failed."""
        if not isinstance(self.output, FolderOutput):
            return
        try:
            self.output.end("failed", f"{type(cause).__name__}: {cause}")
        except OSError as error:  # a full disk, say: must not hide what made the training fail
            logger.warning("the failure cannot be recorded in %s: %s", self.folder, error)
        logger.warning(
            "failed; what MLflow does not get now is published by: %s", sync_command(self.folder, self.call.config)
        )

    def close_monitor(self) -> None:
        if self.monitor is not None:
            self.monitor.close()

    def close(self) -> None:
        """Wait on rank 0 for the publisher, and say the last lines, after the process group is left."""
        if not isinstance(self.output, FolderOutput):
            return
        for line in self.last_lines:
            logger.info("%s", line)
        progress, published = Progress(self.output.folder, self.uri), False
        if self.publisher is not None:
            logger.info("publishing to %s", progress.store_uri)
            limit = PREEMPTED_TIMEOUT if self.outcome == "preempted" else float("inf")
            with suppress(subprocess.TimeoutExpired):  # what is not published remains in the journal
                published = self.publisher.wait(min(self.call.config.tracking.close_timeout, limit)) == 0
            if not published and self.call.launch.launcher_is_gone:
                self.publisher.kill()  # nothing is to outlive it for long
            progress = Progress(self.output.folder, self.uri)
        if published and self.outcome == "finished" and (model_id := progress.get("model_id")):
            registered = progress.get("model_outcome")
            logger.info("the model in MLflow: models:/%s%s", model_id, f", {registered}" if registered else "")
        if self.call.config.tracking.enabled:
            logger.info("%s", describe_opening(self.folder, self.call.config, progress, published=published))
        else:
            sweep = read_sweep_folder(self.folder.parent)
            what, folder = ("sweep", self.folder.parent) if sweep else ("run", self.folder)
            logger.info("tracking is off; publish the %s with: %s", what, sync_command(folder, self.call.config))
        self._say_note()

    def _say_note(self) -> None:
        if self.dataset is not None and self.dataset.note:
            logger.info("%s", self.dataset.note)


@contextmanager
def open_attempt(call: Invocation, rank: Rank) -> Iterator[Attempt]:
    """Collective. Claim the run folder, before any data are read. A failure inside is recorded as the run's end."""
    claims: list[Claim] = []
    with ExitStack() as stack:

        def claim() -> tuple[Path, bool]:
            try:
                claims.append(claim_run(call, stack))
            except OSError as error:
                raise _cannot_write(error) from error
            return claims[0].folder.path, claims[0].is_finished

        folder, is_finished = rank.run_on_main(claim)
        attempt = Attempt(call, rank, folder, is_finished, claims[0] if claims else None)
        if is_finished and attempt.claim:
            advice = "raise train.epochs to go on, or choose another run.name"
            epochs = attempt.claim.folder.status().get("epoch", 0)
            logger.info("run %s is finished (%d epochs) and left as it is; %s", folder.name, epochs, advice)
            if call.config.tracking.enabled and not Progress(attempt.claim.folder, attempt.uri).is_complete():
                logger.info(
                    "MLflow has not everything of it; publish the rest with: %s", sync_command(folder, call.config)
                )
        stack.callback(attempt.close_monitor)
        try:
            yield attempt
        except BaseException as error:
            attempt.fail(error)
            if attempt.claim and not isinstance(attempt.output, FolderOutput):
                attempt.claim.give_up()
            raise


def _cannot_write(error: OSError) -> RunError:
    return RunError(f"the run cannot be written: {error}; set run.dir to a folder that can be")


def sync_command(folder: Path, config: Config) -> str:
    """Return the command that publishes a run or a sweep; a model of one's own has to be allowed."""
    allowed = f"{TRUST_VARIABLE}=1 " if ":" in config.model.name else ""
    return f"{allowed}python -m pipeline sync {shlex.quote(os.path.relpath(folder))}"


def describe_opening(folder: Path, config: Config, progress: Progress, *, published: bool) -> str:
    """Return how to look at the run, or how to publish what is missing."""
    uri, ids = progress.store_uri, (progress.get("mlflow_experiment_id"), progress.get("mlflow_run_id"))
    if not published:
        rest, why = sync_command(folder, config), find_trouble(folder / "publisher.log")
        return f"MLflow at {uri} has not everything yet{why}; nothing is lost, publish the rest with: {rest}"
    page = f"#/experiments/{ids[0]}/runs/{ids[1]}?workflowType=machine_learning"
    if uri.startswith("http"):
        return f"look at the run: {uri.rstrip('/')}/{page}"
    is_default = uri == sqlite_uri(Path("mlflow.db"))  # what a bare `mlflow server` opens
    store = "" if is_default else f" --backend-store-uri {shlex.quote(uri)}"
    return f"look at the run: mlflow server{store}, then open http://127.0.0.1:5000/{page}"


def find_trouble(log: Path) -> str:
    """Return the last reason in a publisher's log why something is not published, in brackets; empty if it has none."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    marks = ("will be tried again: ", "is not published: ")
    found = [line.partition(mark)[2] for line in lines for mark in marks if mark in line]
    return f" ({found[-1]})" if found else ""


def report_failure(error: Exception, launch: Launch, stop: StopRequest) -> int:
    """Log why the training failed, and return exit code 1. Raises `error` again if its traceback is the explanation.

    Only the cause is to be read first: a rank that fails because another one did waits to be ended by the launcher.
    """
    if isinstance(error, DataError | NonFiniteError | RunError):
        logger.error("%s", error)
        return 1
    if not (isinstance(error, RemoteError) or is_lost_connection(error)):
        raise error
    if not stop:
        launch.await_end(seconds=5)
        if not isinstance(error, RemoteError):
            raise error  # nobody else ended: the cause may be here
    logger.warning("ended because another rank did: %s", error)
    return 1
