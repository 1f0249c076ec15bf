"""What the same bits on any number of ranks cost: a training with train.reproducible, and the same without.

They run one after the other, round by round, with one thread per rank.

    python benchmarks/reproducible.py --ranks 1 2 --rounds 5
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this may be started as a file

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
    run_command,
    torchrun,
    write_results,
)
from benchmarks.programs.convoy import convoy_settings, read_convoy_run
from benchmarks.programs.same_training import Training
from pipeline.run.journal import read_journal

WAYS = {"as it is": (), "reproducible": ("train.reproducible=true",)}


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 1 if a training failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2])
    add("--rounds", type=int, default=5)
    add("--batch", type=int, default=32, help="samples per rank and step")
    add("--steps", type=int, default=200, help="of an epoch; the second and third count")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--timeout", type=float, default=600, help="seconds that one training may take")
    add("--out", type=Path, default=RESULTS / "reproducible", help="results are written to OUT.json and OUT.md")
    options = parser.parse_args(argv)
    rates: dict[tuple[int, str], list[float]] = {(ranks, way): [] for ranks in options.ranks for way in WAYS}
    try:
        for index in range(options.rounds):
            for ranks in options.ranks:
                for way in alternate(list(WAYS), index):
                    rates[ranks, way].append(measure(ranks, way, options))
                    print(f"round {index + 1}/{options.rounds}  {ranks} rank(s), {way}: {rates[ranks, way][-1]:,.0f}/s")
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    write_report(options, rates)
    return 0


def measure(ranks: int, way: str, options: argparse.Namespace) -> float:
    """Return the images per second of all ranks."""
    images = options.steps * options.batch * ranks
    training = Training(images=images, eval_images=200, epochs=3, batch=options.batch, device=options.device)
    with tempfile.TemporaryDirectory(prefix="convoy-reproducible-") as folder:
        settings = [
            *convoy_settings(training, ranks),
            *WAYS[way],
            "train.threads=1",
            f"run.dir={folder}",
            "run.name=run",
        ]
        command = torchrun(["train/main.py", *settings], ranks)
        run_command(command, environment=clean_environment(os.environ), timeout=options.timeout)
        run = read_convoy_run(read_journal(Path(folder) / "run" / "journal.jsonl")[0], training)
    return float(run["images_per_second"])


def write_report(options: argparse.Namespace, rates: dict[tuple[int, str], list[float]]) -> None:
    """Print it, and store it."""
    machine = describe_machine()
    rows = []
    for ranks in options.ranks:
        usual, shards = (rates[ranks, way] for way in WAYS)
        slower = Spread.of(pairwise_ratios(usual, shards))
        rows.append([str(ranks), *(Spread.of(each).format(",.0f") for each in (usual, shards)), slower.format(".2f")])
    header = ["ranks", *(f"images/s, {way}" for way in WAYS), "times as long"]
    markdown = "\n\n".join(
        [
            f"The convnet on synthetic images, {options.batch} samples per rank and step, one thread per rank, 8 "
            f"virtual ranks: median (lowest to highest) of {options.rounds} rounds, in which the ways took turns.",
            format_machine(machine),
            markdown_table(header, rows),
        ]
    )
    named = {f"{ranks} rank(s), {way}": values for (ranks, way), values in rates.items()}
    paths = write_results(options.out, {"machine": machine, "images_per_second": named}, markdown)
    print(f"\n{markdown}\n\nwritten to {paths[0]} and {paths[1].name}")


if __name__ == "__main__":
    sys.exit(main())
