"""What tracking, timers and checkpoints cost: the time of their own calls, as a share of the time of the training loop.

Within one training, so that no difference between two runs decides; on rank 0, which writes. Every tenth step is
recorded, as it is by default, and every hundredth is saved.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --rounds 5 --data mnist --root data --publish

Ends with 1 if a median is over its limit.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this may be started as a file

import torch

from benchmarks.harness import (
    RESULTS,
    BenchmarkError,
    Spread,
    clean_environment,
    describe_machine,
    format_machine,
    markdown_table,
    parse_result,
    run_command,
    torchrun,
    write_results,
)
from benchmarks.programs.convoy import convoy_settings
from benchmarks.programs.same_training import Training

EPOCHS = 2
"""The program does not count the first."""
MNIST_IMAGES = 60_000

Run = Mapping[str, Any]
"""loop_seconds, steps; `seconds` and `calls` by label."""


@dataclass(frozen=True)
class Cost:
    name: str
    labels: tuple[str, ...]
    """Of the timed calls that make it up."""
    limit: float | None = None
    """Share of the loop; a part of another cost has none."""


COSTS = (
    Cost("records and tracking", ("journal", "reduction", "arrival", "display", "records"), 0.02),
    Cost("- tracking: writing the journal", ("journal",)),
    Cost("- sending the sums of this rank", ("reduction",)),
    Cost("- waiting for those of all ranks", ("arrival",)),
    Cost("- showing it", ("display",)),
    Cost("- the rest of a record", ("records",)),
    Cost("deciding together to stop or to save", ("votes",), 0.01),
    Cost("timers", ("timers",), 0.01),
    Cost("checkpoints", ("save", "state"), 0.05),
    Cost("- writing it", ("save",)),
    Cost("- collecting the state, where the ranks meet", ("state",)),
)


@dataclass(frozen=True)
class Options:
    training: Training
    ranks: int
    rounds: int
    publish: bool
    log_every: int
    checkpoint_every: int
    timeout: float
    out: Path


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 if a cost is over its limit or the training failed."""
    options = read_options(argv)
    try:
        runs = [run_once(options, index) for index in range(options.rounds)]
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    write_report(options, runs)
    excesses = find_excesses(runs)
    for line in excesses:
        print(line, file=sys.stderr)
    return 1 if excesses else 0


def read_options(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, default=2)
    add("--rounds", type=int, default=3)
    add("--batch", type=int, default=32, help="samples per rank and step")
    add("--steps", type=int, default=300, help="of an epoch of the synthetic data; the second epoch counts")
    add("--data", choices=("synthetic", "mnist"), default="synthetic", help="mnist: all 60,000 images")
    add("--root", default="data", help="folder that holds MNIST/raw")
    add("--log-every", type=int, default=10, help="steps between two records")
    add("--checkpoint-every", type=int, default=100, help="steps between two checkpoints")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--publish", action="store_true", help="with the publisher beside it, into an SQLite file; needs mlflow")
    add("--timeout", type=float, default=900, help="seconds that one training may take")
    add("--out", type=Path, default=RESULTS / "overhead", help="results are written to OUT.json and OUT.md")
    given = parser.parse_args(argv)
    images = MNIST_IMAGES if given.data == "mnist" else given.steps * given.batch * given.ranks
    if images // (given.batch * given.ranks) < given.checkpoint_every:
        parser.error(f"--steps {given.steps}: no checkpoint is due in an epoch; at least {given.checkpoint_every}")
    if given.publish and importlib.util.find_spec("mlflow") is None:
        parser.error("--publish: needs mlflow, which is not installed")
    training = Training(
        data=given.data,
        root=str(Path(given.root).resolve()),
        images=images,
        epochs=EPOCHS,
        batch=given.batch,
        device=given.device,
        precision="bf16" if given.device == "cuda" else "fp32",
    )
    names = ("ranks", "rounds", "publish", "log_every", "checkpoint_every", "timeout", "out")
    return Options(training=training, **{name: getattr(given, name) for name in names})


def settings_of(options: Options, folder: str) -> list[str]:
    return [
        *convoy_settings(options.training, options.ranks),  # what follows wins over it
        f"train.log_every={options.log_every}",
        f"checkpoint.every_steps={options.checkpoint_every}",
        f"tracking.enabled={str(options.publish).lower()}",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        f"run.dir={folder}",
        "run.name=overhead",
    ]


def run_once(options: Options, round_index: int) -> Run:
    with tempfile.TemporaryDirectory(prefix="convoy-overhead-") as folder:
        command = torchrun(["-m", "benchmarks.programs.timed_convoy", *settings_of(options, folder)], options.ranks)
        done = run_command(command, environment=clean_environment(os.environ), timeout=options.timeout)
    run = parse_result(done.output)
    parts = ", ".join(f"{cost.name} {share_of(cost, run):.2%}" for cost in COSTS if cost.limit is not None)
    print(f"round {round_index + 1}/{options.rounds}  loop {run['loop_seconds']:.1f} s: {parts}", flush=True)
    return run


def share_of(cost: Cost, run: Run) -> float:
    """Of the loop's time."""
    return float(sum(run["seconds"][label] for label in cost.labels) / run["loop_seconds"])


def find_excesses(runs: Sequence[Run]) -> list[str]:
    """A line for each cost whose median is over its limit."""
    lines = []
    for cost in COSTS:
        spread = Spread.of([share_of(cost, run) for run in runs])
        if cost.limit is not None and spread.median > cost.limit:
            lines.append(f"too much: {cost.name} takes {spread.format('.2%')} of the loop, limit {cost.limit:.0%}")
    return lines


def tabulate(runs: Sequence[Run]) -> str:
    header = ["cost", "share of the loop", "limit", "us a step", "calls", "us a call"]
    return markdown_table(header, [tabulate_cost(cost, runs) for cost in COSTS])


def tabulate_cost(cost: Cost, runs: Sequence[Run]) -> list[str]:
    """Only of a single label calls can be counted: those of others lie inside each other."""
    shares = [share_of(cost, run) for run in runs]
    limit = "" if cost.limit is None else f"{cost.limit:.0%}"
    row = [cost.name, Spread.of(shares).format(".2%"), limit]
    microseconds = [1e6 * share * run["loop_seconds"] for share, run in zip(shares, runs, strict=True)]
    row.append(f"{Spread.of([of / run['steps'] for of, run in zip(microseconds, runs, strict=True)]).median:,.1f}")
    counts = [run["calls"][cost.labels[0]] for run in runs]
    if len(cost.labels) > 1 or 0 in counts:
        return [*row, "", ""]
    each = [of / count for of, count in zip(microseconds, counts, strict=True)]
    return [*row, f"{Spread.of(counts).median:,.0f}", f"{Spread.of(each).median:,.1f}"]


def write_report(options: Options, runs: Sequence[Run]) -> None:
    """Print it, and store it."""
    machine = describe_machine()
    training = {key: value for key, value in asdict(options.training).items() if key != "root"}
    described = ", ".join(f"{key} {value}" for key, value in training.items())
    loop = Spread.of([run["loop_seconds"] for run in runs]).format(".1f")
    markdown = "\n\n".join(
        [
            "Time of the calls themselves over the time of the loop in which they were made, on rank 0: median (lowest "
            f"to highest) of {options.rounds} trainings on {options.ranks} rank(s): {described}. A record every "
            f"{options.log_every} step(s), a checkpoint every {options.checkpoint_every}; the publisher "
            f"{'runs beside it' if options.publish else 'does not run'}. The loop of the second epoch counts: "
            f"{runs[0]['steps']} steps in {loop} s.",
            "Calls inside others count once, as the inner ones. The calls of the timers are counted in the loop, and "
            "repeated behind it on a timer of its own to time them.",
            format_machine(machine),
            tabulate(runs),
        ]
    )
    shares = {cost.name: {"limit": cost.limit, "shares": [share_of(cost, run) for run in runs]} for cost in COSTS}
    results = {"machine": machine, "training": training, "ranks": options.ranks, "publish": options.publish}
    results |= {"log_every": options.log_every, "checkpoint_every": options.checkpoint_every}
    paths = write_results(options.out, results | {"costs": shares, "runs": list(runs)}, markdown)
    print(f"\n{markdown}\n\nwritten to {paths[0]} and {paths[1].name}")


if __name__ == "__main__":
    sys.exit(main())
