"""A training as tracking sees it, without the training: a run folder that is written at every step, and its publisher.

python -m tests.tracking.recorder RUN_DIR URI CLOSE_TIMEOUT

Records a step every few ms until its standard input ends, then finishes the run and waits for its publisher for
CLOSE_TIMEOUT seconds. Ends with 0 if all was published, with 3 if not.
"""

from __future__ import annotations

import math
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from pipeline.run.folder import RunFolder, training_lock
from pipeline.run.journal import Journal
from tests.records import run_record
from train.attempt.sidecars import start_publisher

STEP_SECONDS = 0.04
NOT_ALL_PUBLISHED = 3


def main(run_dir: str, uri: str, close_timeout: str) -> int:
    folder = RunFolder(Path(run_dir))
    folder.path.mkdir(parents=True)
    with training_lock(folder):
        journal = Journal(folder.journal)
        record_beginning(folder, journal, uri)
        publisher = start_publisher(folder.path, uri)
        step = 0
        while not select.select([sys.stdin], [], [], STEP_SECONDS)[0]:
            step += 1
            journal.metrics({"train/loss": 1 / step, "train/accuracy": math.tanh(step / 100), "train/lr": 0.1}, step)
        record_end(folder, journal)
        all_published = False
        with suppress(subprocess.TimeoutExpired):
            all_published = publisher.wait(float(close_timeout)) == 0
    return 0 if all_published else NOT_ALL_PUBLISHED


def record_beginning(folder: RunFolder, journal: Journal, uri: str) -> None:
    folder.config.write_text("run: {}\n")
    journal.append(run_record(folder.name, experiment="convoy", uri=uri))
    journal.append({"kind": "params", "values": {"optim.lr": 0.1, "steps_per_epoch": 100}})
    journal.append({"kind": "tags", "values": {"host": "here"}})
    journal.status("running")


def record_end(folder: RunFolder, journal: Journal) -> None:
    result = folder.path / "results" / "result.txt"
    result.parent.mkdir()
    result.write_text(f"of {folder.name}\n")
    journal.append({"kind": "artifact", "path": "results/result.txt"})
    journal.status("finished")
    journal.sync()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
