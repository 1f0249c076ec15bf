"""Train an image classifier on one process, or on every rank that torchrun starts.

torchrun --nproc_per_node=4 train/main.py [--config PATH] [--dry-run] [key=value ...]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    # Started as a file: Python put train/ on the path, where its modules would shadow others of the same name.
    sys.path[0] = str(ROOT)

from torch.distributed.elastic.multiprocessing.errors import record

from pipeline.base.launch import Launch
from pipeline.base.logs import start_logging
from pipeline.base.signals import StopRequest, listen_for_stop
from pipeline.base.startup import StartupTimer
from pipeline.config import CommandLine, Config, ConfigError, Problem, load_config, parse_command_line
from pipeline.data.sources.datasets import DataError
from pipeline.learning.precision import NonFiniteError
from pipeline.parallel.rank import Rank, RemoteError, is_lost_connection
from pipeline.run.folder import RunError
from train import build
from train.attempt.plan import describe_plan
from train.attempt.session import DIGITS_NOTE, Session, open_session
from train.attempt.watchdog import build_looks, watching, watching_launcher
from train.checks import find_contradictions


@record
def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 finished or stopped with its state saved, 2 wrong config. Other failures raise or give 1."""
    startup = StartupTimer()
    try:
        launch = Launch.from_environment(os.environ)
    except ValueError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    logger = start_logging(launch.rank)
    try:
        command, config = read_config(argv, launch)
    except ConfigError as error:
        if launch.local_rank == 0:
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        else:
            launch.await_end(seconds=60)  # local rank 0 may be slow to start
        return 2
    if command.dry_run:
        return show_plan(config, command, launch)
    if config.data.dataset == "digits":
        logger.info("%s", DIGITS_NOTE)
    stop = StopRequest()
    try:
        run(config, command, launch, stop, startup)
    except (DataError, NonFiniteError, RunError) as error:
        logger.error("%s", error)
        return 1
    except Exception as error:
        if not (isinstance(error, RemoteError) or is_lost_connection(error)):
            raise
        # Most likely a consequence. The rank with the cause shows it and ends, then the launcher ends this one.
        if not stop:
            launch.await_end(seconds=5)
            if not isinstance(error, RemoteError):
                raise  # nobody else ended: the cause may be here
        logger.warning("ended because another rank did: %s", error)
        return 1
    return 0


def show_plan(config: Config, command: CommandLine, launch: Launch) -> int:
    """Of the first rank; 1 if a training could not start here."""
    if launch.rank > 0:
        return 0
    try:
        print(describe_plan(config, launch, command.config_path.stem))
    except (DataError, RunError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def read_config(argv: Sequence[str] | None, launch: Launch) -> tuple[CommandLine, Config]:
    command = parse_command_line(sys.argv[1:] if argv is None else argv, ROOT / "configs" / "default.yaml")

    def check(config: Config) -> list[Problem]:
        return list(find_contradictions(config, launch))

    return command, load_config(command, [check])


def run(config: Config, command: CommandLine, launch: Launch, stop: StopRequest, startup: StartupTimer) -> None:
    """Collective: every rank must call. Start the rank, train, leave the group, close."""
    startup.lap("config")
    with listen_for_stop(stop), watching_launcher(launch, stop):
        with build.join(config, launch) as rank:
            startup.lap("ranks")
            session = train(config, command, launch, rank, stop, startup)
        session.close()


def train(
    config: Config, command: CommandLine, launch: Launch, rank: Rank, stop: StopRequest, startup: StartupTimer
) -> Session:
    """Collective: every rank must call."""
    dataset = build.build_data(config, rank)
    startup.lap("data")
    with open_session(config, command.config_path.stem, launch, rank, dataset, ROOT) as session:
        if not session.start.is_finished:
            startup.lap("run_folder")
            trainer = build.build_trainer(config, rank, dataset, session.output, stop, startup, session.start.run_id)
            startup.lap("build")
            if session.start.checkpoint is not None:
                trainer.load_state(session.start.checkpoint)
            with watching(*build_looks(config, session, trainer)):
                outcome = trainer.fit()
            session.end(outcome, trainer)
    return session


if __name__ == "__main__":
    sys.exit(main())
