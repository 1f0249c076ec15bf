"""`sweep FILE`: what there is of a sweep and what is missing, and the jobs that train that."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from pipeline.config import CommandLine, Config, ConfigError, load_config
from pipeline.run_folder import RunFolder, is_being_trained
from pipeline.sweep import Element, Sweep, SweepError, open_folder, read_sweep, states

HELP = "show which runs of a sweep are finished, and train the others as a Slurm job array"
JOB = "JOB_ID"
SLURM = Path(__file__).resolve().parents[2] / "slurm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="e.g. configs/sweeps/mnist_lr.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of all its runs")
    parser.add_argument("--submit", action="store_true", help="submit what is missing, and behind it its publication")
    parser.add_argument("--options", default="", help="of sbatch for the runs, e.g. --options='--gpus-per-node=4'")
    parser.add_argument("--sync-options", default="", help="of sbatch for the publication")
    parser.add_argument(
        "--element", type=int, help="print the arguments of train/main.py for this one, NUL behind each"
    )


def run(arguments: argparse.Namespace) -> int:
    """0; 2: the sweep is wrong; 1: sbatch refused."""
    try:
        sweep = read_sweep(arguments.file)
        configs = [_check(sweep, element, arguments.settings) for element in sweep.elements]
        folder = Path(configs[0].run.dir) / sweep.name
        if arguments.element is not None:
            return _print_element(sweep, arguments.element, configs, folder, arguments.settings)
        missing = _show(sweep, folder)
        if not missing:
            print(f"nothing is missing; to compare: python -m pipeline report {folder}")
            return 0
        commands = _commands(arguments, folder, missing)
        if arguments.submit:
            open_folder(folder, sweep)
            return _submit(*commands)
    except SweepError as error:
        print(error, file=sys.stderr)
        return 2
    print("to train what is missing, and then to publish and to compare all:")
    for command in (*commands, ["python", "-m", "pipeline", "report", str(folder)]):
        print(f"  {shlex.join(command)}")
    return 0


def _check(sweep: Sweep, element: Element, settings: list[str]) -> Config:
    try:
        return load_config(CommandLine(sweep.config, (*element.settings, *settings), dry_run=False))
    except ConfigError as error:
        raise SweepError(f"{element.name}: {error}") from error


def _print_element(sweep: Sweep, index: int, configs: list[Config], folder: Path, settings: list[str]) -> int:
    if not 0 <= index < len(sweep.elements):
        raise SweepError(f"element {index}: accepted: 0 to {len(sweep.elements) - 1}")
    open_folder(folder, sweep)
    element, tracking = sweep.elements[index], configs[index].tracking
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or ""
    # a file on a shared disk is no database for many writers: then slurm/sync.sbatch publishes all, alone
    journal_only = [] if uri.startswith(("http://", "https://")) else ["tracking.enabled=false"]
    given = ("--config", str(sweep.config), *journal_only, *element.settings, *settings)
    own = (f"run.dir={folder}", f"run.name={element.name}")
    sys.stdout.write("".join(f"{argument}\0" for argument in (*given, *own)))
    return 0


def _show(sweep: Sweep, folder: Path) -> list[int]:
    """Print a table; the indices of what is neither finished nor being trained here."""
    names = [element.name for element in sweep.elements]
    missing = []
    print(f"{sweep.name}: {len(names)} runs in {folder}")
    for index, (name, state) in enumerate(zip(names, states(folder, names), strict=True)):
        busy = state == "running" and is_being_trained(RunFolder(folder / name))
        if state != "finished" and not busy:
            missing.append(index)
        print(f"  {index:3}  {'killed' if state == 'running' and not busy else state:<9}  {name}")
    return missing


def _commands(arguments: argparse.Namespace, folder: Path, missing: list[int]) -> tuple[list[str], list[str]]:
    """Of sbatch: for the runs, and for their publication when they have ended."""
    array = f"--array={','.join(map(str, missing))}"
    train = [str(_shown(SLURM / "sweep.sbatch")), str(arguments.file), *arguments.settings]
    sync = [f"--dependency=afterany:{JOB}", str(_shown(SLURM / "sync.sbatch")), str(folder)]
    options, sync_options = shlex.split(arguments.options), shlex.split(arguments.sync_options)
    return ["sbatch", *options, array, *train], ["sbatch", *sync_options, *sync]


def _shown(path: Path) -> Path:
    """As one would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _submit(train: list[str], sync: list[str]) -> int:
    job = ""
    for command in (train, sync):
        command = [argument.replace(JOB, job) for argument in command]
        try:
            done = subprocess.run([command[0], "--parsable", *command[1:]], stdout=subprocess.PIPE, text=True)
        except FileNotFoundError:
            print("there is no sbatch here: call this on the login node of a Slurm cluster", file=sys.stderr)
            return 1
        if done.returncode != 0:
            return 1
        job = done.stdout.strip().partition(";")[0]
        print(f"submitted as job {job}: {shlex.join(command)}")
    return 0
