"""Trainings whose publisher, first rank or all processes are killed by SIGKILL at random moments, and run again.

    python -m tests.tracking.kill_campaign --runs 4
    python -m tests.tracking.kill_campaign --runs 4 --ranks 2

Each run is killed five times: four times while it trains and once while its figures and its model are published; then
`sync` is killed too, and called again. Prints what came of each, and ends with 1 if something is missing in MLflow, or
there twice.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from mlflow import MlflowClient

from pipeline.run.folder import RunFolder
from tests.servers import server_environment
from tests.tracking.history import differences, find_runs, recorded_history, stored_history
from tests.tracking.recording import ROOT, publisher_pid

EPOCHS, STEPS_PER_EPOCH, BATCH = 4, 60, 64
NUM_STEPS = EPOCHS * STEPS_PER_EPOCH
PUBLISHING_SECONDS = 4.0
"""About as long as figures and model take."""
SYNC_SECONDS = 8.0
"""And `sync` with its imports."""
PATIENCE = 150.0
MAX_ATTEMPTS = 12
"""To train, and to sync, before it is given up."""
SETTINGS = (
    "data.dataset=synthetic",
    f"data.arguments.train_size={STEPS_PER_EPOCH * BATCH}",
    "data.arguments.validation_size=200",
    f"data.global_batch_size={BATCH}",
    f"train.epochs={EPOCHS}",
    "train.log_every=1",
    "train.threads=1",
    "checkpoint.every_steps=25",
    "tracking.close_timeout=100",
)

Victim = Literal["publisher", "rank 0", "all"]
VICTIMS: tuple[Victim, ...] = ("publisher", "rank 0", "all")


@dataclass(frozen=True)
class Kill:
    victim: Victim
    step: int
    """Behind which it happens."""
    seconds: float
    """Later than the record of this step, or than the end of the training if there is no such step."""

    def __str__(self) -> str:
        return (
            f"{self.victim} at {self.step}" if self.step <= NUM_STEPS else f"{self.victim} {self.seconds:.1f} s after"
        )


def draw_kills(seed: int) -> list[Kill]:
    """Each victim at least once in the training, in any order; one of them while the end is published."""
    generator = random.Random(seed)
    victims = [*VICTIMS, generator.choice(VICTIMS)]
    generator.shuffle(victims)
    steps = sorted(generator.sample(range(1, NUM_STEPS), len(victims)))
    kills = [Kill(victim, step, generator.uniform(0, 0.02)) for victim, step in zip(victims, steps, strict=True)]
    return [*kills, Kill(generator.choice(VICTIMS), NUM_STEPS + 1, generator.uniform(0, PUBLISHING_SECONDS))]


class Training:
    """The program with one command, started as often as it takes: by itself, or by torchrun if there are more ranks."""

    def __init__(self, folder: Path, name: str, ranks: int = 1):
        self.run = folder / "runs" / name
        self.attempts = 0
        self._ranks = ranks
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        launcher = [*torchrun, f"--nproc_per_node={ranks}"] if ranks > 1 else []
        self._command = [sys.executable, *launcher, str(ROOT / "train" / "main.py"), *SETTINGS, f"run.name={name}"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Unless it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        assert self.attempts < MAX_ATTEMPTS, f"not finished after {self.attempts} attempts"
        self.attempts += 1
        folder = self.run.parents[1]
        with (folder / f"{self.run.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=folder, env=server_environment(), stdout=log, stderr=log
            )
        while self._process.poll() is None and len(self._rank_pids()) < self._ranks:
            time.sleep(0.01)  # torchrun is still to start those that are to be killed

    def wait_for(self, kill: Kill) -> None:
        """Returns early if the training ends."""
        assert self._process is not None
        deadline = time.monotonic() + PATIENCE
        while self._process.poll() is None and not self._has_come_to(kill.step):
            assert time.monotonic() < deadline, f"{self.run.name} does not come to step {kill.step}"
            time.sleep(0.01)
        time.sleep(kill.seconds)

    def kill(self, victim: Victim) -> None:
        """Whoever of them is alive. Of more ranks, torchrun ends the others when rank 0 is dead."""
        assert self._process is not None
        publisher, ranks = publisher_pid(self.run), self._rank_pids()
        pids = {"publisher": [publisher], "rank 0": [ranks.get(0)], "all": [publisher, *ranks.values()]}[victim]
        if victim == "all" and self._process.poll() is None:
            pids.append(self._process.pid)
        for pid in filter(None, pids):
            with suppress(ProcessLookupError):  # it has ended in between
                os.kill(pid, signal.SIGKILL)
        if victim != "publisher":
            self._process.wait(PATIENCE)

    def _rank_pids(self) -> dict[int, int]:
        """Of those that are alive, by rank."""
        assert self._process is not None
        if self._process.poll() is not None:
            return {}
        if self._ranks == 1:
            return {0: self._process.pid}
        ranks: dict[int, int] = {}
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children():
                with suppress(psutil.Error, KeyError):
                    ranks[int(child.environ()["RANK"])] = child.pid
        return ranks

    def finish(self) -> None:
        """Run it until it has ended by itself with all trained."""
        self.start()
        assert self._process is not None
        self._process.wait(PATIENCE)
        if not self.is_finished():
            self.finish()

    def is_finished(self) -> bool:
        return RunFolder(self.run).status().get("state") == "finished"

    def close(self) -> None:
        if self._process is not None:
            self.kill("all")

    def _has_come_to(self, step: int) -> bool:
        if step > NUM_STEPS:
            return self.is_finished()
        journal = self.run / "journal.jsonl"
        if not journal.exists():
            return False
        with journal.open("rb") as file:
            file.seek(max(0, journal.stat().st_size - 4000))
            steps = re.findall(rb'"train/loss".*"step":(\d+)', file.read())
        return bool(steps) and int(steps[-1]) >= step


@dataclass(frozen=True)
class Verdict:
    kills: list[Kill]
    attempts: int
    num_points: int
    faults: list[str]


def kill_and_resume(folder: Path, seed: int, ranks: int = 1) -> Verdict:
    """One run named by its seed in `folder`, killed, finished and synced."""
    kills = draw_kills(seed)
    training = Training(folder, f"seed-{seed}", ranks)
    try:
        for kill in kills:
            training.start()
            training.wait_for(kill)
            training.kill(kill.victim)
        training.finish()
        exit_code = sync_with_a_kill(training.run, random.Random(seed).uniform(0, SYNC_SECONDS))
    finally:
        training.close()
    num_points = sum(map(len, recorded_history(training.run).values()))
    if exit_code:
        return Verdict(kills, training.attempts, num_points, [f"sync ended with {exit_code}"])
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return Verdict(kills, training.attempts, num_points, find_faults(client, training.run))


def sync_with_a_kill(run: Path, seconds: float) -> int:
    """Kill `sync` so long after its start, and call it again. The exit code of the second."""
    command = [sys.executable, "-m", "pipeline", "sync", str(run)]
    with (run.parents[1] / f"{run.name}.log").open("ab") as log:

        def sync(timeout: float) -> int:
            environment = server_environment()
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=timeout)
            return done.returncode

        try:
            sync(seconds)
        except subprocess.TimeoutExpired:  # which kills it
            log.write(b"sync was killed\n")
        return sync(PATIENCE)


def find_faults(client: MlflowClient, run: Path) -> list[str]:
    """A line for each thing that MLflow has not as it must."""
    recorded, found = recorded_history(run), find_runs(client, run)
    faults = []
    for key, points in recorded.items():
        twice = [step for step, count in Counter(step for step, _, _ in points).items() if count > 1]
        faults += [f"{key} was recorded twice at the steps {twice[:5]}"] if twice else []
    if [step for step, _, _ in recorded["train/loss"]] != list(range(1, NUM_STEPS + 1)):
        faults.append(f"train/loss was recorded at {len(recorded['train/loss'])} of {NUM_STEPS} steps")
    if len(found) != 1:
        return [*faults, f"{len(found)} runs in MLflow"]
    (mlflow_run,) = found
    faults += differences(recorded, stored_history(client, mlflow_run.info.run_id))
    if mlflow_run.info.status != "FINISHED":
        faults.append(f"status {mlflow_run.info.status}")
    models = client.search_logged_models([mlflow_run.info.experiment_id])
    ours = [model.status.name for model in models if model.source_run_id == mlflow_run.info.run_id]
    if ours != ["READY"]:
        faults.append(f"models: {ours}")
    if not list(client.list_artifacts(mlflow_run.info.run_id, "figures")):
        faults.append("no figures")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4, help="how many, each killed five times")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where they are kept; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="convoy-kills-") as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        folder.mkdir(exist_ok=True)
        num_wrong = 0
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.runs):
            verdict = kill_and_resume(folder, seed, arguments.ranks)
            killed = ", ".join(map(str, verdict.kills))
            outcome = "; ".join(verdict.faults) or "one run, all there, once"
            print(f"| {seed} | {killed} | {verdict.attempts} | {verdict.num_points:,} | {outcome} |", flush=True)
            num_wrong += bool(verdict.faults)
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
