"""How long a recipe trains, and how accurate it becomes: the real program, once per seed.

The seconds of training are the sum of perf/epoch_seconds in the run's journal, which leaves out start-up, evaluation
and saves; those are in the time from command to exit. The accuracy is that of the last epoch, not of the best.

    python benchmarks/time_to_accuracy.py
    python benchmarks/time_to_accuracy.py --ranks 1 --seeds 3 data.root=/datasets train.precision=fp32
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this may be started as a file

import torch

from benchmarks.harness import (
    RESULTS,
    ROOT,
    BenchmarkError,
    clean_environment,
    describe_machine,
    format_machine,
    markdown_table,
    run_command,
    torchrun,
    write_results,
)
from pipeline.run.journal import read_journal

RESERVED = ("run.dir", "run.name", "run.seed", "tracking.enabled")
"""Keys that are set here for each seed."""


@dataclass(frozen=True)
class SeedRun:
    """One finished training."""

    seed: int
    accuracy: float
    """On the validation images after the last epoch, 0 to 1."""
    training_seconds: float
    wall_seconds: float
    """From command to exit."""
    cpu_by_others: float
    """Share of all cores that others used meanwhile."""


@dataclass(frozen=True)
class Summary:
    """One figure over the seeds."""

    mean: float
    std: float | None
    """Of the sample; None of a single seed."""
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.mean(values), std, min(values), max(values))


@dataclass(frozen=True)
class Options:
    config: Path
    ranks: int
    seeds: range
    target: float
    timeout: float
    """Seconds that one training may take, from command to exit."""
    out: Path
    settings: tuple[str, ...]
    """key=value, for train/main.py."""


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 1 if a training failed or the mean accuracy is below the target."""
    options = read_options(argv)
    try:
        runs = list(train_seeds(options))
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    write_report(options, runs)
    return 0 if reaches_target(runs, options.target) else 1


def read_options(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, default=ROOT / "configs" / "mnist_fast.yaml", help="recipe (configs/mnist_fast.yaml)")
    add("--ranks", type=int, help="processes; on GPUs one GPU each (default: 1 where torch sees a GPU, else 2)")
    add("--seeds", type=int, default=10, help="trainings, with run.seed counted up")
    add("--first-seed", type=int, default=0)
    add("--target", type=float, default=0.99, help="what the mean accuracy has to reach, 0 to 1")
    add("--timeout", type=float, default=1800, help="seconds that one training may take")
    add("--out", type=Path, help="results are written to OUT.json and OUT.md (benchmarks/results/time_to_accuracy)")
    add("settings", nargs="*", metavar="key=value", help="passed on to train/main.py")
    given = parser.parse_intermixed_args(argv)
    if problem := find_problem(given):
        parser.error(problem)
    return Options(
        config=given.config.resolve(),
        ranks=given.ranks or (1 if torch.cuda.is_available() else 2),
        seeds=range(given.first_seed, given.first_seed + given.seeds),
        target=given.target,
        timeout=given.timeout,
        out=given.out or RESULTS / "time_to_accuracy",
        settings=tuple(given.settings),
    )


def find_problem(given: argparse.Namespace) -> str | None:
    """Return what is wrong with the options, if anything."""
    if given.seeds < 1 or given.first_seed < 0 or (given.ranks is not None and given.ranks < 1):
        return "accepted: --seeds and --ranks from 1, --first-seed from 0"
    if not 0 < given.target <= 1:
        return f"--target {given.target:g}: accepted: above 0, up to 1"
    for setting in given.settings:
        key, separator, _ = setting.partition("=")
        if not separator:
            return f"{setting}: accepted: key=value"
        if key in RESERVED:
            return f"{setting}: {key} is set here for each seed"
    return None


def train_seeds(options: Options) -> Iterator[SeedRun]:
    """Yield one training after the other. Raises BenchmarkError for one that fails or is not whole."""
    for seed in options.seeds:
        run = train_seed(options, seed)
        print(
            f"seed {seed}: {run.accuracy:.2%}, {run.training_seconds:.3g} s of training, "
            f"{run.wall_seconds:.1f} s from command to exit",
            flush=True,
        )
        yield run


def train_seed(options: Options, seed: int) -> SeedRun:
    """Train in the current folder, so that relative paths among the settings mean what they do there."""
    with tempfile.TemporaryDirectory(prefix="convoy-time-") as folder:
        done = run_command(
            training_command(options, seed, Path(folder)),
            environment=clean_environment(os.environ),
            timeout=options.timeout,
            folder=Path.cwd(),
        )
        records, _ = read_journal(Path(folder) / run_name(seed) / "journal.jsonl")
    return read_run(records, seed, done.wall_seconds, done.cpu_by_others)


def training_command(options: Options, seed: int, folder: Path) -> list[str]:
    """Return the command that a user would give; a single rank needs no launcher."""
    arguments = [
        str(ROOT / "train" / "main.py"),
        "--config",
        str(options.config),
        *options.settings,
        f"run.seed={seed}",
        f"run.dir={folder}",
        f"run.name={run_name(seed)}",
        "tracking.enabled=false",
        "tracking.system_every=0",
    ]
    return [sys.executable, *arguments] if options.ranks == 1 else torchrun(arguments, options.ranks)


def run_name(seed: int) -> str:
    return f"seed-{seed}"


def read_run(records: Iterable[Mapping[str, Any]], seed: int, wall_seconds: float, cpu_by_others: float) -> SeedRun:
    """Return what a journal says. Raises BenchmarkError unless each epoch has its time and its accuracy."""
    records = list(records)
    epochs = int(next(record["values"]["train.epochs"] for record in records if record["kind"] == "params"))
    seconds = _values(records, "perf/epoch_seconds")
    accuracies = _values(records, "eval/accuracy")
    if len(seconds) != epochs or len(accuracies) != epochs:
        raise BenchmarkError(
            f"seed {seed}: of {epochs} epochs, {len(seconds)} have perf/epoch_seconds and {len(accuracies)} have "
            "eval/accuracy in the journal"
        )
    return SeedRun(seed, accuracies[-1], sum(seconds), wall_seconds, cpu_by_others)


def _values(records: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    return [record["value"] for record in records if record["kind"] == "metric" and record["key"] == key]


def reaches_target(runs: Sequence[SeedRun], target: float) -> bool:
    return Summary.of([run.accuracy for run in runs]).mean >= target


def write_report(options: Options, runs: Sequence[SeedRun]) -> None:
    """Print it, and store it."""
    machine = describe_machine()
    lines = [
        f"{options.config.name} with {' '.join(options.settings) or 'its own settings'} on {options.ranks} rank(s).",
        format_machine(machine),
        table(runs),
        verdict(runs, options.target),
    ]
    results = {
        "machine": machine,
        "config": options.config.name,
        "settings": list(options.settings),
        "ranks": options.ranks,
        "target": options.target,
        "reached": reaches_target(runs, options.target),
        **{name: asdict(Summary.of(values)) for name, values in _figures(runs).items()},
        "runs": [asdict(run) for run in runs],
    }
    markdown = "\n\n".join(lines)
    paths = write_results(options.out, results, markdown)
    print(f"\n{markdown}\n\nwritten to {paths[0]} and {paths[1].name}")


def _figures(runs: Sequence[SeedRun]) -> dict[str, list[float]]:
    return {
        "accuracy": [run.accuracy for run in runs],
        "training_seconds": [run.training_seconds for run in runs],
        "wall_seconds": [run.wall_seconds for run in runs],
        "cpu_by_others": [run.cpu_by_others for run in runs],
    }


def table(runs: Sequence[SeedRun]) -> str:
    """Return a row per seed, then what they amount to."""
    header = ["seed", "accuracy", "training, s", "command to exit, s", "cores used by others"]
    rows = [
        [str(run.seed), *_cells(run.accuracy, run.training_seconds, run.wall_seconds, run.cpu_by_others)]
        for run in runs
    ]
    summaries = [Summary.of(values) for values in _figures(runs).values()]
    select: dict[str, Callable[[Summary], float | None]] = {
        "mean": lambda summary: summary.mean,
        "standard deviation": lambda summary: summary.std,
        "lowest": lambda summary: summary.minimum,
        "highest": lambda summary: summary.maximum,
    }
    totals = [[name, *_cells(*(figure(summary) for summary in summaries))] for name, figure in select.items()]
    return markdown_table(header, rows + totals)


def _cells(
    accuracy: float | None, training: float | None, wall: float | None, cpu_by_others: float | None
) -> list[str]:
    """Return the figures as text; accuracy with a digit more than 10,000 images have, or a mean just below a target
    would read like it."""
    forms = ((accuracy, ".3%"), (training, ".3f"), (wall, ".1f"), (cpu_by_others, ".0%"))
    return ["" if value is None else f"{value:{form}}" for value, form in forms]


def verdict(runs: Sequence[SeedRun], target: float) -> str:
    mean = Summary.of([run.accuracy for run in runs]).mean
    reached = "reaches" if reaches_target(runs, target) else "misses"
    return f"The mean accuracy over {len(runs)} seed(s), {mean:.3%}, {reached} {target:.2%}."


if __name__ == "__main__":
    sys.exit(main())
