"""What tracking costs a training that records at every step, whatever its server does; and what arrives there.

    python benchmarks/tracking.py
    python benchmarks/tracking.py --rounds 1 --conditions healthy killed --postgres

Trains with the publisher beside it and a real `mlflow server`, on this machine too, which is killed and started again,
or stands behind a proxy that fails: from when the run is in MLflow, or from the start, until behind the last step, or
until the training and its publisher are gone. What counts are the calls in which rank 0 records something: their sum as
a share of the loop, and the longest. Then the run is synced, and what the server has is compared with the journal.

Ends with 1 if the median share is over its limit, or the longest call of any training is, or a point is missing or
there twice.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this may be started as a file

from mlflow import MlflowClient

from benchmarks.harness import (
    RESULTS,
    BenchmarkError,
    Finished,
    alternate,
    clean_environment,
    describe_machine,
    format_machine,
    parse_result,
    run_command,
    torchrun,
    write_results,
)
from benchmarks.programs.convoy import convoy_settings
from benchmarks.programs.same_training import Training
from benchmarks.tracking_runs import (
    CALL_LIMIT,
    CONDITIONS,
    NUM_KILLS,
    SHARE_LIMIT,
    Run,
    describe,
    find_excesses,
    tabulate,
)
from pipeline.run.folder import RunFolder
from tests.servers import Fault, FaultyProxy, MlflowServer, PostgresServer
from tests.tracking.history import differences, find_runs, recorded_history, stored_history
from tests.tracking.recording import publisher_pid

FAULTS: dict[str, Fault] = {"silent": "silent", "500": "500", "slow": "slow"}
"""Of the proxy; the others that have one refuse."""
CLOSE_TIMEOUT_WHEN_DEAD = 3
"""Seconds that the training waits for a publisher that cannot succeed any more."""
PUBLISHER_TIMEOUT = 60.0
"""Seconds until it must be gone then; it goes on for 30."""
WORKS_AGAIN = "tracking works again"


@dataclass(frozen=True)
class Options:
    ranks: int
    rounds: int
    conditions: list[str]
    steps: int
    steps_when_killed: int
    batch: int
    checkpoint_every: int
    postgres: bool
    timeout: float
    out: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 1 if a limit is passed, something is not in MLflow, or a training failed."""
    options = read_options(argv)
    runs: list[Run] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="convoy-tracking-")))
        server = start_server(options, folder, stack)
        for index in range(options.rounds):
            for condition in alternate(options.conditions, index):
                try:
                    runs.append(run_once(options, condition, server, folder / f"{condition}-{index}"))
                except BenchmarkError as error:
                    print(error, file=sys.stderr)
                    return 1
                print(f"round {index + 1}/{options.rounds}  {describe(runs[-1])}", flush=True)
    write_report(options, runs)
    excesses = find_excesses(runs)
    for line in excesses:
        print(line, file=sys.stderr)
    return 1 if excesses else 0


def read_options(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=1)
    add("--rounds", type=int, default=3)
    add(
        "--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS), metavar="NAME", help=str([*CONDITIONS])
    )
    add("--steps", type=int, default=1200)
    add("--steps-when-killed", type=int, default=5000, help="the server takes its time to start again")
    add("--batch", type=int, default=32, help="samples per rank and step")
    add("--checkpoint-every", type=int, default=500, help="steps between two checkpoints")
    add("--postgres", action="store_true", help="behind the server, instead of SQLite; Debian's package and psycopg2")
    add("--timeout", type=float, default=600, help="seconds that one training may take")
    add("--out", type=Path, default=RESULTS / "tracking", help="results are written to OUT.json and OUT.md")
    return Options(**vars(parser.parse_args(argv)))


def start_server(options: Options, folder: Path, stack: ExitStack) -> MlflowServer:
    store = folder / "store"
    store.mkdir()
    arguments: list[str] = []
    if options.postgres:
        postgres = PostgresServer()
        stack.callback(postgres.close)
        postgres.start()
        arguments = ["--backend-store-uri", postgres.uri, "--artifacts-destination", str(store / "files")]
    server = MlflowServer(store, *arguments)
    stack.callback(server.close)
    server.start()
    return server


def run_once(options: Options, condition: str, server: MlflowServer, folder: Path) -> Run:
    """Train under `condition`, end it, sync, and compare."""
    folder.mkdir()
    proxy = FaultyProxy(server, "refused" if condition == "down" else "none")
    uri = server.url if condition == "killed" else proxy.url
    run = folder / "tracking"
    with ThreadPoolExecutor(1) as executor:
        training = executor.submit(train, options, condition, uri, folder)
        try:
            impose(condition, server, proxy, run, training)
            proxy.set_fault("none")
            result = parse_result(training.result().output)
        finally:
            proxy.set_fault("none")  # or the training would wait for its publisher
    sync = [sys.executable, "-m", "pipeline", "sync", str(run)]
    run_command(sync, environment=clean_environment(os.environ), timeout=options.timeout)
    proxy.close()
    return {"condition": condition, **result, **compare(run, server)}


def train(options: Options, condition: str, uri: str, folder: Path) -> Finished:
    steps = options.steps_when_killed if condition == "killed" else options.steps
    training = Training(images=steps * options.batch * options.ranks, eval_images=200, epochs=1, batch=options.batch)
    settings = [
        *convoy_settings(training, options.ranks),  # what follows wins over it
        "train.log_every=1",
        f"checkpoint.every_steps={options.checkpoint_every}",
        "train.threads=1",
        "tracking.enabled=true",
        f"tracking.uri={uri}",
        f"run.dir={folder}",
        "run.name=tracking",
    ]
    if condition == "dead":
        settings.append(f"tracking.close_timeout={CLOSE_TIMEOUT_WHEN_DEAD}")
    command = torchrun(["-m", "benchmarks.programs.timed_tracking", *settings], options.ranks)
    return run_command(command, environment=clean_environment(os.environ), timeout=options.timeout)


def impose(condition: str, server: MlflowServer, proxy: FaultyProxy, run: Path, training: Future[Finished]) -> None:
    """Impose the condition until the last step is done, or until nobody is left who could publish."""
    folder = RunFolder(run)

    def wait_for(what: Callable[[], bool]) -> None:
        while not what():
            if training.done() and not what():
                training.result()  # raises what it failed of
                raise BenchmarkError(f"{condition}: the training was over too soon; give it more --steps")
            time.sleep(0.1)

    if condition != "down":
        wait_for(lambda: "mlflow_run_id" in folder.status())
    if condition == "dead":
        wait_for(lambda: "train/loss" in mlflow_run(server, folder).data.metrics)
    if condition == "killed":
        for number in range(NUM_KILLS):
            server.kill()
            server.start()
            wait_for(lambda: count_recoveries(run) > number)  # noqa: B023 (called before the next number)
        if folder.status().get("state") != "running":
            raise BenchmarkError(f"{NUM_KILLS} kills took longer than the training; give it more --steps-when-killed")
    elif condition not in ("healthy", "down"):
        proxy.set_fault(FAULTS.get(condition, "refused"))
    wait_for(lambda: folder.status().get("state") == "finished")
    if condition == "dead":
        training.result()
        wait_for_publisher(run)
        if mlflow_run(server, folder).info.status == "FINISHED":
            raise BenchmarkError("dead: all was published, though nobody could")


def mlflow_run(server: MlflowServer, folder: RunFolder) -> Any:
    """Return what the server has of the run, past the proxy."""
    return MlflowClient(server.url).get_run(folder.status()["mlflow_run_id"])


def wait_for_publisher(run: Path) -> None:
    """Wait until the publisher has given up. Raises BenchmarkError if it does not."""
    deadline = time.monotonic() + PUBLISHER_TIMEOUT
    while publisher_pid(run) is not None:
        if time.monotonic() > deadline:
            raise BenchmarkError(f"the publisher goes on {PUBLISHER_TIMEOUT:.0f} s after its training")
        time.sleep(0.5)


def count_recoveries(run: Path) -> int:
    return (run / "publisher.log").read_text().count(WORKS_AGAIN)


def compare(run: Path, server: MlflowServer) -> dict[str, Any]:
    """Return the number of points recorded, and in what MLflow differs from them."""
    client = MlflowClient(server.url)
    recorded, found = recorded_history(run), find_runs(client, run)
    lines = [f"{len(found)} runs in MLflow"] if len(found) != 1 else []
    for found_run in found[:1]:
        lines += differences(recorded, stored_history(client, found_run.info.run_id))
        if found_run.info.status != "FINISHED":
            lines.append(f"status {found_run.info.status}")
    return {"points": sum(map(len, recorded.values())), "differences": lines}


def write_report(options: Options, runs: Sequence[Run]) -> None:
    """Print it, and store it."""
    machine = describe_machine()
    markdown = "\n\n".join(
        [
            "What rank 0 spends in calls that record something, with a record at every step, by what the MLflow server "
            f"({'PostgreSQL' if options.postgres else 'SQLite'}, on the same machine) does: median (lowest to highest) "
            f"of {options.rounds} training(s) on {options.ranks} rank(s), {options.batch} samples per rank and step, a "
            f"checkpoint every {options.checkpoint_every} steps, whose forced write of the journal is in the share and "
            f"in a column of its own. Limits: {SHARE_LIMIT:.0%} of the loop for the median, {1000 * CALL_LIMIT:.0f} ms "
            "for the longest other call of every training.",
            "The last column compares MLflow after `sync` with the journal: step, value and time of each point.",
            format_machine(machine),
            tabulate(runs),
        ]
    )
    settings = {"ranks": options.ranks, "steps": options.steps, "batch": options.batch, "postgres": options.postgres}
    paths = write_results(options.out, {"machine": machine, **settings, "runs": list(runs)}, markdown)
    print(f"\n{markdown}\n\nwritten to {paths[0]} and {paths[1].name}")


if __name__ == "__main__":
    sys.exit(main())
