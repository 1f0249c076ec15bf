"""What tracking, timers, checkpoints and Python's garbage collection cost, as a share of the time of the training loop.

On the CPU it is the time of their own calls within one training, so that no difference between two runs decides; on
rank 0, which writes. On a GPU a call that waits for the device is not a cost, as the device computes meanwhile: there
it is the difference to a training without records, and to one without checkpoints. Every tenth step is recorded, as it
is by default, and every hundredth is saved. The garbage collection is measured with and without the `gc.freeze()`
behind the first step.

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
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this may be started as a file

import torch

from benchmarks.harness import (
    RESULTS,
    BenchmarkError,
    Spread,
    alternate,
    clean_environment,
    describe_machine,
    format_machine,
    markdown_table,
    pairwise_ratios,
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

USUAL = "as it is"
UNFROZEN = "without gc.freeze()"

Run = Mapping[str, Any]
"""loop_seconds, steps; `seconds` and `calls` by label."""
Runs = Mapping[str, Sequence[Run]]
"""USUAL, UNFROZEN, or the name of a cost that is switched off -> the runs, in the order of the rounds."""


@dataclass(frozen=True)
class Cost:
    name: str
    labels: tuple[str, ...]
    """Of the timed calls that make it up."""
    limit: float | None = None
    """Share of the loop; a part of another cost has none."""
    off: tuple[str, ...] = ()
    """Settings with which a training has no such cost, for the difference to one without them."""


COSTS = (
    Cost(
        "records and tracking",
        ("journal", "reduction", "arrival", "display", "records"),
        limit=0.02,
        off=("train.log_every=1000000000",),
    ),
    Cost("- tracking: writing the journal", ("journal",)),
    Cost("- sending the sums of this rank", ("reduction",)),
    Cost("- waiting for those of all ranks", ("arrival",)),
    Cost("- showing it", ("display",)),
    Cost("- the rest of a record", ("records",)),
    Cost("deciding together to stop or to save", ("votes",), limit=0.01),
    Cost("timers", ("timers",), limit=0.01),
    Cost("checkpoints", ("save", "state"), limit=0.05, off=("checkpoint.every_steps=null",)),
    Cost("- writing it", ("save",)),
    Cost("- collecting the state, where the ranks meet", ("state",)),
)


@dataclass(frozen=True)
class Options:
    training: Training
    ranks: int
    rounds: int
    publish: bool
    by: str
    """`calls` or `difference`."""
    log_every: int
    checkpoint_every: int
    timeout: float
    out: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 1 if a cost is over its limit or a training failed."""
    options = read_options(argv)
    ways = [USUAL, UNFROZEN, *(cost.name for cost in COSTS if cost.off and options.by == "difference")]
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    try:
        for index in range(options.rounds):
            for way in alternate(ways, index):
                runs[way].append(run_once(options, way))
                print(
                    f"round {index + 1}/{options.rounds}  loop {runs[way][-1]['loop_seconds']:.2f} s, {way}", flush=True
                )
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    shares = find_shares(options.by, runs)
    write_report(options, runs, shares)
    excesses = find_excesses(shares)
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
    add("--by", choices=("calls", "difference"), help="how to measure (on the CPU calls, on a GPU difference)")
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
    by = given.by or ("difference" if given.device == "cuda" else "calls")
    return Options(training=training, by=by, **{name: getattr(given, name) for name in names})


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


def run_once(options: Options, way: str) -> Run:
    off = next((cost.off for cost in COSTS if cost.name == way), ())
    flags = ["--without-freeze"] if way == UNFROZEN else []
    with tempfile.TemporaryDirectory(prefix="convoy-overhead-") as folder:
        arguments = [*flags, *settings_of(options, folder), *off]
        command = torchrun(["-m", "benchmarks.programs.timed_convoy", *arguments], options.ranks)
        done = run_command(command, environment=clean_environment(os.environ), timeout=options.timeout)
    return parse_result(done.output)


def find_shares(by: str, runs: Runs) -> dict[Cost, list[float]]:
    """Return what each cost takes of the loop, round by round."""
    if by == "calls":
        return {cost: [share_of(cost.labels, run) for run in runs[USUAL]] for cost in COSTS}
    seconds = {way: [run["loop_seconds"] for run in of] for way, of in runs.items()}
    return {
        cost: [1 - ratio for ratio in pairwise_ratios(seconds[cost.name], seconds[USUAL])] for cost in COSTS if cost.off
    }


def share_of(labels: Sequence[str], run: Run) -> float:
    """Return what the calls take of the loop's time."""
    return float(sum(run["seconds"][label] for label in labels) / run["loop_seconds"])


def find_excesses(shares: Mapping[Cost, Sequence[float]]) -> list[str]:
    """Return a line for each cost whose median is over its limit."""
    return [
        f"too much: {cost.name} takes {Spread.of(of).format('.2%')} of the loop, limit {cost.limit:.0%}"
        for cost, of in shares.items()
        if cost.limit is not None and Spread.of(of).median > cost.limit
    ]


def tabulate(by: str, runs: Runs, shares: Mapping[Cost, Sequence[float]]) -> str:
    """Return a row for each cost. Calls are counted of a single label: those of others lie inside each other."""
    header = ["cost", "share of the loop", "limit", "us a step", "calls", "us a call"]
    rows = []
    for cost, of in shares.items():
        limit = "" if cost.limit is None else f"{cost.limit:.0%}"
        figures = tabulate_calls(cost.labels[0], of, runs[USUAL])
        if len(cost.labels) > 1 or by != "calls":
            figures = [figures[0], "", ""]
        rows.append([cost.name, Spread.of(of).format(".2%"), limit, *figures])
    return markdown_table(header, rows)


def tabulate_calls(label: str, shares: Sequence[float], runs: Sequence[Run]) -> list[str]:
    """Return the microseconds a step, the number of calls with this label, and the microseconds a call."""
    microseconds = [1e6 * share * run["loop_seconds"] for share, run in zip(shares, runs, strict=True)]
    per_step = median(of / run["steps"] for of, run in zip(microseconds, runs, strict=True))
    counts = [run["calls"][label] for run in runs]
    if 0 in counts:
        return [f"{per_step:,.1f}", "", ""]
    per_call = median(of / count for of, count in zip(microseconds, counts, strict=True))
    return [f"{per_step:,.1f}", f"{median(counts):,.0f}", f"{per_call:,.1f}"]


def tabulate_collections(runs: Runs) -> str:
    """Return a row for the trainings as they are, and one for those without `gc.freeze()`."""
    rows = []
    for way in (USUAL, UNFROZEN):
        shares = [share_of(["collection"], run) for run in runs[way]]
        rows.append([way, Spread.of(shares).format(".3%"), *tabulate_calls("collection", shares, runs[way])])
    return markdown_table(["garbage collection", "share of the loop", "us a step", "collections", "us each"], rows)


def write_report(options: Options, runs: Runs, shares: Mapping[Cost, Sequence[float]]) -> None:
    """Print it, and store it."""
    machine = describe_machine()
    training = {key: value for key, value in asdict(options.training).items() if key != "root"}
    described = ", ".join(f"{key} {value}" for key, value in training.items())
    loop = Spread.of([run["loop_seconds"] for run in runs[USUAL]]).format(".2f")
    how = {
        "calls": "Time of the calls themselves over the time of the loop in which they were made, on rank 0",
        "difference": "By how much the loop is shorter without, as a share of it, on rank 0, round by round",
    }
    markdown = "\n\n".join(
        [
            f"{how[options.by]}: median (lowest to highest) of {options.rounds} round(s) on {options.ranks} rank(s): "
            f"{described}. A record every {options.log_every} step(s), a checkpoint every {options.checkpoint_every}; "
            f"the publisher {'runs beside it' if options.publish else 'does not run'}. The loop of the second epoch "
            f"counts: {runs[USUAL][0]['steps']} steps in {loop} s.",
            "Calls inside others count once, as the inner ones, and so do garbage collections. The calls of the timers "
            "are counted in the loop, and repeated behind it on a timer of its own to time them.",
            format_machine(machine),
            tabulate(options.by, runs, shares),
            tabulate_collections(runs),
        ]
    )
    results = {"machine": machine, "training": training, "ranks": options.ranks, "publish": options.publish}
    results |= {"by": options.by, "log_every": options.log_every, "checkpoint_every": options.checkpoint_every}
    results["costs"] = {cost.name: {"limit": cost.limit, "shares": list(of)} for cost, of in shares.items()}
    paths = write_results(options.out, results | {"runs": {way: list(of) for way, of in runs.items()}}, markdown)
    print(f"\n{markdown}\n\nwritten to {paths[0]} and {paths[1].name}")


if __name__ == "__main__":
    sys.exit(main())
