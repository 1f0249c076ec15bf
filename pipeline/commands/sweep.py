"""Show which runs of a sweep are finished, and train the others as a Slurm job array."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from pipeline.config import CommandLine, Config, ConfigError, load_config
from pipeline.run.folder import RunFolder, is_being_trained
from pipeline.run.resume import is_finished
from pipeline.run.sweep import (
    Sweep,
    SweepError,
    first_settings,
    number_runs,
    open_sweep_folder,
    queued_numbers,
    read_sweep,
)

ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="e.g. configs/sweeps/mnist_lr.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of all its runs")
    parser.add_argument("--submit", action="store_true", help="submit what is missing, and behind it its publication")
    parser.add_argument("--options", default="", help="of sbatch for the runs, e.g. --options='--gpus-per-node=4'")
    parser.add_argument("--sync-options", default="", help="of sbatch for the publication")
    parser.add_argument("--at-once", type=int, metavar="N", help="runs at the same time, at most")
    parser.add_argument("--element", type=int, help="print this one's arguments of train/main.py, a NUL behind each")


def run(arguments: argparse.Namespace) -> int:
    """Return 0; 1 if sbatch refused, 2 if the sweep is wrong."""
    try:
        sweep = read_sweep(arguments.file, arguments.settings)
        folder = Path(_check(sweep, next(iter(sweep.runs))).run.dir) / sweep.name
        arguments.settings = first_settings(folder, arguments.settings)
        sweep = read_sweep(arguments.file, arguments.settings)
        configs = {name: _check(sweep, name) for name in sweep.runs}
        if arguments.element is not None:
            return _print_arguments(sweep, folder, arguments.element, configs)
        return _show_and_submit(arguments, sweep, folder, configs)
    except SweepError as error:
        print(error, file=sys.stderr)
        return 2


def _check(sweep: Sweep, name: str) -> Config:
    from pipeline.checks import find_problems  # imports torch

    try:
        return load_config(CommandLine(sweep.config, sweep.runs[name], dry_run=False), [find_problems])
    except ConfigError as error:
        raise SweepError(f"{name}: {error}") from error


def _print_arguments(sweep: Sweep, folder: Path, index: int, configs: dict[str, Config]) -> int:
    numbered = dict(enumerate(open_sweep_folder(folder, sweep)))
    name = numbered.get(index)
    if name not in configs:
        known = ", ".join(str(number) for number, name in numbered.items() if name in configs)
        gone = f" ({name}) is not in its file any more" if name else " is none of the sweep"
        raise SweepError(f"element {index}{gone}; accepted: {known}")
    uri = configs[name].tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    # a file on a shared disk is no database for many writers: then slurm/sync.sbatch publishes all, alone
    journal_only = [] if uri.startswith(("http://", "https://")) else ["tracking.enabled=false"]
    given = ("--config", str(sweep.config), *journal_only, *sweep.runs[name], f"run.dir={folder}", f"run.name={name}")
    sys.stdout.write("".join(f"{argument}\0" for argument in given))
    return 0


def _show_and_submit(arguments: argparse.Namespace, sweep: Sweep, folder: Path, configs: dict[str, Config]) -> int:
    waiting, numbered, missing = queued_numbers(folder), number_runs(folder, sweep), []
    print(f"{sweep.name}: {len(configs)} runs in {folder}")
    for name, config in configs.items():
        index = numbered.index(name)
        state = _state(RunFolder(folder / name), config, is_queued=index in waiting)
        if state not in ("finished", "queued", "running"):
            missing.append(index)
        print(f"  {index:3}  {state:<10}  {name}")
    report = f"python -m pipeline report {shlex.quote(str(folder))}"
    if not missing:
        print(f"nothing is missing{' that is not queued' if waiting else ''}; to compare: {report}")
        return 0
    train = _train_command(arguments, missing)
    sync = ["sbatch", *shlex.split(arguments.sync_options), "--dependency=afterany:JOB_ID"]
    sync += [_script("sync.sbatch"), str(folder)]
    if not arguments.submit:
        print("to train what is missing, then to publish it, and to compare all (--submit does the first two):")
        print(f"  {shlex.join(train)}\n  {shlex.join(sync)}\n  {report}")
        return 0
    open_sweep_folder(folder, sweep)
    job = _sbatch(train)
    if job is None:
        return 1
    open_sweep_folder(folder, sweep, job)
    return 0 if _sbatch([word.replace("JOB_ID", job) for word in sync]) else 1


def _state(folder: RunFolder, config: Config, *, is_queued: bool) -> str:
    status = folder.status()
    state = str(status.get("state", "missing"))
    if state == "finished":
        return state if is_finished(status, config) else "unfinished"  # train.epochs grew
    if state == "running" and is_being_trained(folder):
        return state
    if is_queued:
        return "queued"
    return "killed" if state == "running" else state


def _train_command(arguments: argparse.Namespace, missing: list[int]) -> list[str]:
    options = shlex.split(arguments.options)
    if any(option.startswith(("--array", "-a")) for option in options):
        raise SweepError("--options has --array, which is what is missing; --at-once limits how many run at a time")
    at_once = f"%{arguments.at_once}" if arguments.at_once else ""
    array = f"--array={','.join(map(str, missing))}{at_once}"
    return ["sbatch", *options, array, _script("sweep.sbatch"), str(arguments.file), *arguments.settings]


def _script(name: str) -> str:
    """Return the path of a batch script as one would type it."""
    path = ROOT / "slurm" / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _sbatch(command: list[str]) -> str | None:
    """Submit a job; return its id, or None with the reason printed."""
    environment = {"CONVOY_ROOT": str(ROOT)} | os.environ
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *command[1:]], stdout=subprocess.PIPE, text=True, env=environment
        )
    except FileNotFoundError:
        print("there is no sbatch here: call this on the login node of a Slurm cluster", file=sys.stderr)
        return None
    if done.returncode != 0:
        return None
    job = done.stdout.strip().partition(";")[0]
    print(f"submitted as job {job}: {shlex.join(command)}")
    return job
