"""What grows with the size of the dataset, the number of ranks and the number of steps, and what must not.

    python benchmarks/growth.py
    python benchmarks/growth.py --parts memory --images 10000 60000 240000 --ranks 1 2 4

memory      of all ranks of a node, and the time to load, by dataset and ranks; shared, and as each rank's own copy
evaluation  its time, epoch after epoch
journal     a call of Journal.metrics, and opening, by the lines there are already
publisher   points per second into an SQLite store, by the points in the journal; needs mlflow
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this may be started as a file

from benchmarks.harness import (
    RESULTS,
    BenchmarkError,
    alternate,
    clean_environment,
    describe_machine,
    format_machine,
    markdown_table,
    parse_result,
    run_command,
    torchrun,
    write_results,
)
from benchmarks.records import measure_journal, measure_publisher
from pipeline.run.journal import read_journal

MIB = 2**20
TIMEOUT = 600.0
"""Seconds that one command may take."""

Row = dict[str, Any]
HOLDING = ("shared", "apart")


def main(argv: Sequence[str] | None = None) -> int:
    given = parse_arguments(argv)
    parts: dict[str, Callable[[argparse.Namespace], tuple[list[Row], str]]] = {
        "memory": report_memory,
        "evaluation": report_evaluation,
        "journal": report_journal,
        "publisher": report_publisher,
    }
    machine = describe_machine()
    results: dict[str, Any] = {"machine": machine}
    texts = [format_machine(machine)]
    try:
        for name in given.parts:
            results[name], text = parts[name](given)
            texts.append(f"## {name}\n\n{text}")
            print(f"{texts[-1]}\n", flush=True)
            paths = write_results(given.out, results, "\n\n".join(texts))
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"written to {paths[0]} and {paths[1].name}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = ("memory", "evaluation", "journal", "publisher")
    add("--parts", nargs="+", choices=names, default=names)
    add("--images", type=int, nargs="+", default=[10_000, 60_000, 240_000], help="28x28, synthetic, for training")
    add("--ranks", type=int, nargs="+", default=[1, 2, 4])
    add("--rounds", type=int, default=3, help="of memory; the median counts")
    add("--epochs", type=int, default=12, help="of evaluation")
    add("--lines", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="of journal")
    add("--points", type=int, nargs="+", default=[1_000, 10_000], help="of publisher")
    add("--out", type=Path, default=RESULTS / "growth", help="results are written to OUT.json and OUT.md")
    return parser.parse_args(argv)


def report_memory(given: argparse.Namespace) -> tuple[list[Row], str]:
    rows = measure_memory(given)
    shared, apart = ({(r["images"], r["ranks"]): r for r in rows if r["how"] == how} for how in HOLDING)
    header = ["images x ranks", "dataset", "its file, in all ranks", "added by it", "all", "time to load, s"]
    header += ["own copies: added", "all", "time to load, s"]
    keys = ("dataset_bytes", "mapped_bytes", "added_bytes", "all_bytes")
    lines = []
    for case, row in shared.items():
        left = [f"{row[key] / MIB:,.0f}" for key in keys]
        right = [f"{apart[case][key] / MIB:,.0f}" for key in keys[2:]]
        times = [f"{of['seconds']:.2f}" for of in (row, apart[case])]
        lines.append([f"{case[0]:,} x {case[1]}", *left, times[0], *right, times[1]])
    text = (
        "MiB over all ranks of a node, each page counted once however many ranks map it (sum of PSS), with the whole "
        "dataset read; the time is that of the slowest rank. On the right the same where each rank has its own copy. "
        f"Median of {given.rounds} interleaved rounds."
    )
    return rows, f"{text}\n\n{markdown_table(header, lines)}"


def measure_memory(given: argparse.Namespace) -> list[Row]:
    """Return one row for each dataset, number of ranks and way to hold it."""
    cases = {
        f"{images} {ranks} {how}": (images, ranks, how)
        for images in given.images
        for ranks in given.ranks
        for how in HOLDING
    }
    runs: dict[str, list[list[Row]]] = {label: [] for label in cases}
    for round_index in range(given.rounds):
        for label in alternate(list(cases), round_index):
            runs[label].append(hold_dataset(*cases[label]))
    keys = ("images", "ranks", "how")
    return [dict(zip(keys, cases[label], strict=True)) | summarize_holding(of) for label, of in runs.items()]


def hold_dataset(images: int, ranks: int, how: str) -> list[Row]:
    """Return the figures of each rank."""
    arguments = ["-m", "benchmarks.programs.hold_dataset", f"--images={images}"]
    if how == "apart":
        arguments.append("--apart")
    done = run_command(torchrun(arguments, ranks), environment=clean_environment(os.environ), timeout=TIMEOUT)
    figures: list[Row] = parse_result(done.output)["ranks"]
    return figures


def summarize_holding(runs: Sequence[Sequence[Row]]) -> Row:
    """Return medians over the rounds: memory is added up over the ranks, the slowest gives the time."""
    summed = ("mapped_bytes", "added_bytes", "all_bytes")
    return {
        "dataset_bytes": runs[0][0]["dataset_bytes"],
        **{key: median(sum(rank[key] for rank in ranks) for ranks in runs) for key in summed},
        "seconds": median(max(rank["seconds"] for rank in ranks) for ranks in runs),
    }


def report_evaluation(given: argparse.Namespace) -> tuple[list[Row], str]:
    rows = evaluate_each_epoch(given.epochs)
    third = max(1, len(rows) // 3)
    early, late = (median(row["seconds"] for row in part) for part in (rows[:third], rows[-third:]))
    table = markdown_table(["behind step", "s"], [[f"{row['step']:,}", f"{row['seconds']:.3f}"] for row in rows])
    text = (
        "Of 2,000 synthetic images 28x28 on one rank, by the times in the journal. The median of the last third is "
        f"{late / early:.2f} times that of the first."
    )
    return rows, f"{text}\n\n{table}"


def evaluate_each_epoch(epochs: int) -> list[Row]:
    """Return what the run itself measured, by the step behind which each evaluation stands."""
    with tempfile.TemporaryDirectory(prefix="convoy-growth-") as folder:
        data = ["data.dataset=synthetic", "data.arguments.train_size=640", "data.arguments.validation_size=2000"]
        training = [
            f"train.epochs={epochs}",
            "data.global_batch_size=32",
            "tracking.enabled=false",
            "tracking.system_every=0",
        ]
        command = [sys.executable, "train/main.py", *data, *training, f"run.dir={folder}", "run.name=growth"]
        run_command(command, environment=clean_environment(os.environ), timeout=TIMEOUT)
        records, _ = read_journal(Path(folder) / "growth" / "journal.jsonl")
    return [
        {"step": record["step"], "seconds": record["value"]}
        for record in records
        if record["kind"] == "metric" and record["key"] == "time/evaluation_seconds"
    ]


def report_journal(given: argparse.Namespace) -> tuple[list[Row], str]:
    rows = [measure_journal(lines) for lines in given.lines]
    header = ["lines before", "MB", "a call of metrics, us", "99% of calls, us", "opening, s", "memory of opening, MiB"]
    table = markdown_table(
        header,
        [
            [
                f"{row['lines']:,}",
                f"{row['bytes'] / 1e6:.1f}",
                f"{1e6 * row['call_seconds']:.0f}",
                f"{1e6 * row['slow_call_seconds']:.0f}",
                f"{row['open_seconds']:.3f}",
                f"{row['open_bytes'] / MIB:.0f}",
            ]
            for row in rows
        ],
    )
    return rows, f"A call records four metrics of a step; the median call of 1,000.\n\n{table}"


def report_publisher(given: argparse.Namespace) -> tuple[list[Row], str]:
    if importlib.util.find_spec("mlflow") is None:
        return [], "Not measured: mlflow is not installed."
    rows = [measure_publisher(points) for points in given.points]
    header = ["points", "s", "points/s", "100 more behind them, s"]
    lines = [
        [f"{r['points']:,}", f"{r['seconds']:.2f}", f"{r['points'] / r['seconds']:,.0f}", f"{r['more_seconds']:.3f}"]
        for r in rows
    ]
    return rows, f"Into an SQLite store that exists, by one drain.\n\n{markdown_table(header, lines)}"


if __name__ == "__main__":
    sys.exit(main())
