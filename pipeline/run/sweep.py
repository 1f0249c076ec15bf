"""The folder of a sweep: `sweep.json` beside the run folders of its elements."""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.base.files import locked
from pipeline.run.sweep_file import Sweep, SweepError

FOLDER_FILE = "sweep.json"


def open_folder(folder: Path, sweep: Sweep, job: str | None = None) -> list[str]:
    """Make it the folder of the sweep, if it is not yet, and remember `job`, an array that trains it.

    Returns the names of its runs by number: one that has a number keeps it, whatever becomes of the file, so that
    tasks of an array that wait remain what they were. Raises SweepError if that cannot be.
    """
    if (folder / "journal.jsonl").exists():
        raise SweepError(f"{folder} is the folder of a run: rename the file of the sweep, whose name the folder has")
    try:
        with locked(folder / ".sweep.lock"):
            known = of_folder(folder) or {"run_id": uuid.uuid4().hex, "timestamp_ms": time.time_ns() // 1_000_000}
            names, numbered = [element.name for element in sweep.elements], number(folder, sweep)
            jobs = [*known.get("jobs", []), *([job] if job else [])]
            known |= {"settings": list(sweep.settings)}
            content = {"name": sweep.name, "names": names, "numbered": numbered, "jobs": jobs, "text": sweep.text}
            temporary = folder / ".writing-sweep.json"
            temporary.write_text(json.dumps(known | content, indent=1) + "\n")
            temporary.replace(folder / FOLDER_FILE)
    except OSError as error:
        raise SweepError(f"{folder} cannot be the folder of the sweep: {error}") from error
    return numbered


def settle_settings(folder: Path, given: Sequence[str]) -> list[str]:
    """Those that it was submitted with, if none are given; its runs are to be alike. Raises SweepError for others."""
    known: list[str] = (of_folder(folder) or {}).get("settings", list(given))
    if given and sorted(given) != sorted(known):
        raise SweepError(
            f"{folder} was trained with {' '.join(known) or 'no settings besides its file'}, not with "
            f"{' '.join(given)}: leave them out to go on as before, or copy the file of the sweep to another name"
        )
    return known


def number(folder: Path, sweep: Sweep) -> list[str]:
    """The names of all runs the sweep ever had, those of its file among them, by number."""
    numbered: list[str] = (of_folder(folder) or {}).get("numbered", [])
    return [*numbered, *(element.name for element in sweep.elements if element.name not in numbered)]


def queued(folder: Path) -> set[int]:
    """Numbers of the runs that wait or train in arrays that were submitted from here; none where there is no Slurm."""
    jobs = (of_folder(folder) or {}).get("jobs", [])
    if not jobs:
        return set()
    command = ["squeue", "--me", "--noheader", "--array", "--format=%F %K"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return set()
    pairs = (line.split() for line in done.stdout.splitlines())
    return {int(task) for job, task in pairs if job in jobs and task.isdecimal()}


def of_folder(folder: Path) -> dict[str, Any] | None:
    """What makes it the folder of a sweep: run_id, name, timestamp_ms, text of the file, settings besides, names of its
    runs, numbered (names of all it ever had), jobs. None if it is none."""
    try:
        loaded: dict[str, Any] = json.loads((folder / FOLDER_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return loaded


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run folders; for that of a sweep, those of its runs."""
    return [run for path in paths for run in (_runs_of(path) if of_folder(path) else [path])]


def find_all_runs(folder: Path) -> list[Path]:
    """In a folder of run folders and sweeps."""
    sweeps = [path.parent for path in folder.glob(f"*/{FOLDER_FILE}")]
    return sorted(_runs_of(folder) + find_runs(sweeps))


def _runs_of(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/journal.jsonl"))
