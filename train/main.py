"""Train an image classifier on one process, or on every rank that torchrun starts.

torchrun --nproc_per_node=4 train/main.py [--config PATH] [--dry-run] [key=value ...]
"""

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
from pipeline.base.logs import start_rank_logging
from pipeline.base.signals import StopRequest, kill_children, listen_for_stop
from pipeline.base.timing import StartupTimer
from pipeline.checks import find_problems
from pipeline.config import ConfigError, load_config, parse_command_line
from pipeline.data.build import list_dataset, load_dataset
from pipeline.parallel.rank import Rank
from pipeline.parallel.start import start_rank
from train.attempt.alike import check_alike
from train.attempt.attempt import Attempt, open_attempt, report_failure
from train.attempt.claim import Invocation
from train.attempt.plan import show_plan
from train.attempt.watchdog import watching_launcher, watching_training
from train.build import build_trainer


@record
def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 finished, or stopped with its state saved; 2 wrong config; 1 (or an exception) others."""
    startup = StartupTimer()
    try:
        launch = Launch.from_environment(os.environ)
    except ValueError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    start_rank_logging(launch.rank)
    try:
        command = parse_command_line(sys.argv[1:] if argv is None else argv)
        config = load_config(command, [lambda config: find_problems(config, launch)])
    except ConfigError as error:
        if launch.local_rank == 0:
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        else:
            launch.await_end(seconds=60)  # local rank 0 may be slow to start
        return 2
    call = Invocation(config, command.config_path.stem, launch, ROOT)
    if command.dry_run:
        return show_plan(call)
    stop = StopRequest()
    try:
        run(call, stop, startup)
    except Exception as error:
        return report_failure(error, launch, stop)
    finally:
        kill_children()
    return 0


def run(call: Invocation, stop: StopRequest, startup: StartupTimer) -> None:
    """Collective. Join the ranks, train, leave the process group, close."""
    startup.lap("config")
    with listen_for_stop(stop), watching_launcher(call.launch, stop):
        with start_rank(call.launch, call.config.train) as rank:
            startup.lap("ranks")
            attempt = train(call, rank, stop, startup)
        attempt.close()


def train(call: Invocation, rank: Rank, stop: StopRequest, startup: StartupTimer) -> Attempt:
    """Collective. Claim the run folder, train what is left of the run, and return the attempt."""
    check_alike(rank, call.config)
    with open_attempt(call, rank) as attempt:
        startup.lap("claim")
        if not attempt.is_finished:
            # together: a source that fails on one rank must not leave the others waiting
            listed = rank.run_on_all(lambda: list_dataset(call.config.data, call.config.run.seed))
            dataset = load_dataset(call.config.data, listed, rank)
            startup.lap("data")
            state = attempt.begin(dataset)
            startup.lap("run_folder")
            trainer = build_trainer(call.config, rank, dataset, attempt.output, stop, startup)
            startup.lap("build")
            if state is not None:
                trainer.load_state(state)
            with watching_training(attempt, trainer):
                attempt.end(trainer.fit(), trainer)
    return attempt


if __name__ == "__main__":
    sys.exit(main())
