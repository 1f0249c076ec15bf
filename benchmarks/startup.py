"""How long it takes from the command to the first optimizer step, in Convoy and in a DDP script of fifteen lines.

They run one after the other, round by round, on MNIST. Each is ended behind its first step.

    python benchmarks/startup.py --ranks 1 2 --rounds 5 --root data
    python benchmarks/startup.py --imports --root data
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this may be started as a file

from benchmarks.harness import (
    RESULTS,
    ROOT,
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
from pipeline.run.journal import read_journal
from pipeline.run.records import MetricRecord

SCRIPT = "fifteen_lines"
PROGRAMS = ("convoy", SCRIPT)
LIMIT = 1.3
"""Times as long as the script that Convoy may take."""
BATCH = 32
"""Samples per rank, in both."""
PREFIX = "startup/"
LISTED_SHARE = 0.005
"""Of all imports: packages that take less are summed up in one line."""

Run = Mapping[str, float]
"""Seconds: `command` and `process` to the first step, and in Convoy those of each phase."""


@dataclass(frozen=True)
class Options:
    ranks: tuple[int, ...]
    rounds: int
    root: Path
    environment: Mapping[str, str]
    settings: tuple[str, ...]
    """For Convoy, key=value."""
    timeout: float
    out: Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2])
    add("--rounds", type=int, default=5)
    add("--root", type=Path, default=Path("data"), help="folder that holds MNIST/raw")
    add("--cpu", action="store_true", help="leave GPUs alone")
    add("--tracking", action="store_true", help="with the publisher that a training starts beside itself; needs mlflow")
    add("--imports", action="store_true", help="list instead what Convoy imports up to its first step")
    add("--timeout", type=float, default=300, help="seconds that one command may take")
    add("--out", type=Path, help="results are written to OUT.json and OUT.md (benchmarks/results/startup)")
    given = parser.parse_args(argv)
    environment = clean_environment(os.environ)
    options = Options(
        ranks=tuple(given.ranks),
        rounds=given.rounds,
        root=given.root.resolve(),
        environment={**environment, "CUDA_VISIBLE_DEVICES": ""} if given.cpu else environment,
        settings=() if given.tracking else ("tracking.enabled=false", "tracking.system_every=0"),
        timeout=given.timeout,
        out=given.out or RESULTS / ("imports" if given.imports else "startup"),
    )
    try:
        if given.imports:
            report_imports(options)
        else:
            runs = compare(options)
            report_startup(options, runs)
            excesses = find_excesses(runs)
            for line in excesses:
                print(line, file=sys.stderr)
            return 1 if excesses else 0
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def compare(options: Options) -> dict[tuple[str, int], list[Run]]:
    """Return all runs of each program on each number of ranks, in the order of the rounds."""
    runs: dict[tuple[str, int], list[Run]] = {(name, ranks): [] for ranks in options.ranks for name in PROGRAMS}
    for round_index in range(options.rounds):
        for ranks in options.ranks:
            for name in alternate(PROGRAMS, round_index):
                run = (run_convoy if name == "convoy" else run_fifteen_lines)(ranks, options)
                runs[name, ranks].append(run)
                figures = f"command {run['command']:.2f} s, process {run['process']:.2f} s"
                print(f"round {round_index + 1}/{options.rounds}  {name:14} {ranks} rank(s): {figures}", flush=True)
    return runs


def run_fifteen_lines(ranks: int, options: Options) -> Run:
    started = time.time()
    command = torchrun([str(ROOT / "benchmarks" / "programs" / "fifteen_lines.py"), str(options.root)], ranks)
    done = run_command(command, environment=options.environment, timeout=options.timeout)
    result = parse_result(done.output)
    return {"command": result["unix_time"] - started, "process": result["seconds"]}


def run_convoy(ranks: int, options: Options) -> Run:
    """Run Convoy and ask it to stop behind its first step, whose times are in the journal of its run."""
    with tempfile.TemporaryDirectory(prefix="convoy-startup-") as folder:
        command = torchrun(["train/main.py", *convoy_settings(ranks, folder, options)], ranks)
        started = time.time()
        run_to_first_step(command, Path(folder), options)
        return read_startup(Path(folder), started)


def convoy_settings(ranks: int, folder: str, options: Options) -> list[str]:
    # the first record lets it stop soon behind the first step
    stopping = ["train.log_every=1", "tracking.close_timeout=0.1"]
    data = ["data.dataset=mnist", f"data.root={options.root}", f"data.global_batch_size={BATCH * ranks}"]
    return [*data, *stopping, "optim.name=adadelta", f"run.dir={folder}", "run.name=startup", *options.settings]


def run_to_first_step(command: Sequence[str], folder: Path, options: Options, log: Path | None = None) -> None:
    """Run the command until its first step. `log` gets what it writes to stderr. Raises BenchmarkError if there is no
    first step in time."""
    log = log or folder / "stderr"
    deadline = time.monotonic() + options.timeout
    environment = {**options.environment, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        try:
            while process.poll() is None and time.monotonic() < deadline and not has_stepped(folder):
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if not has_stepped(folder):
        raise BenchmarkError(f"{' '.join(command)}\nmade no step; it ended with:\n{log.read_text()[-4000:]}")


def startup_records(folder: Path) -> list[MetricRecord]:
    journal = folder / "startup" / "journal.jsonl"
    records = read_journal(journal)[0] if journal.exists() else []
    return [record for record in records if record["kind"] == "metric" and record["key"].startswith(PREFIX)]


def has_stepped(folder: Path) -> bool:
    return any(record["key"] == f"{PREFIX}total_seconds" for record in startup_records(folder))


def read_startup(folder: Path, started: float) -> Run:
    records = startup_records(folder)
    seconds = {r["key"].removeprefix(PREFIX).removesuffix("_seconds"): float(r["value"]) for r in records}
    process = seconds.pop("total")
    return {"command": records[-1]["timestamp_ms"] / 1000 - started, "process": process, **seconds}


def report_startup(options: Options, runs: Mapping[tuple[str, int], Sequence[Run]]) -> None:
    machine = describe_machine()
    phases = [key for key in runs["convoy", options.ranks[0]][0] if key not in ("command", "process")]
    header = ["program", "ranks", "from command, s", "from start of rank 0, s", *phases, "times as long as the script"]
    rows = [startup_row(name, ranks, runs, phases) for name, ranks in runs]
    markdown = "\n\n".join(
        [
            f"Seconds to the first optimizer step on MNIST: median (lowest to highest) of {options.rounds} interleaved "
            "rounds, under torchrun. The phases are those of Convoy's rank 0, in their order; the ratio compares the "
            "times from the start of rank 0, round by round.",
            format_machine(machine),
            markdown_table(header, rows),
        ]
    )
    results = {
        "machine": machine,
        "rounds": options.rounds,
        "settings": options.settings,
        "runs": [{"program": name, "ranks": ranks, "seconds": list(of)} for (name, ranks), of in runs.items()],
    }
    paths = write_results(options.out, results, markdown)
    print(f"\n{markdown}\n\nwritten to {paths[0]} and {paths[1].name}")


def startup_row(
    name: str, ranks: int, runs: Mapping[tuple[str, int], Sequence[Run]], phases: Iterable[str]
) -> list[str]:
    own = runs[name, ranks]
    totals = [Spread.of([run[key] for run in own]).format(".2f") for key in ("command", "process")]
    split = [f"{Spread.of([run[phase] for run in own]).median:.2f}" if name == "convoy" else "" for phase in phases]
    ratio = Spread.of(startup_ratios(runs, ranks)).format(".2f") if name == "convoy" else ""
    return [name, str(ranks), *totals, *split, ratio]


def startup_ratios(runs: Mapping[tuple[str, int], Sequence[Run]], ranks: int) -> list[float]:
    """Return how many times as long as the script Convoy takes from the start of rank 0, round by round."""
    seconds = {name: [run["process"] for run in runs[name, ranks]] for name in PROGRAMS}
    return pairwise_ratios(seconds["convoy"], seconds[SCRIPT])


def find_excesses(runs: Mapping[tuple[str, int], Sequence[Run]]) -> list[str]:
    """Return a line for each number of ranks on which the median is over the limit."""
    ratios = {ranks: Spread.of(startup_ratios(runs, ranks)) for _, ranks in runs}
    return [
        f"too slow: on {ranks} rank(s) {ratio.format('.2f')} times as long as the script, limit {LIMIT:g}"
        for ranks, ratio in ratios.items()
        if ratio.median > LIMIT
    ]


@dataclass(frozen=True)
class Import:
    """A line of `python -X importtime`."""

    module: str
    seconds: float
    """Of the module itself, without what it imports."""

    @property
    def package(self) -> str:
        """Return the first part of the name; of torch the first two, as it is most of all."""
        parts = self.module.split(".")
        return ".".join(parts[:2] if parts[0] == "torch" else parts[:1])


def report_imports(options: Options) -> None:
    """Print and store what is imported on one rank, without torchrun. Importing is slower while it is timed."""
    machine, imports = describe_machine(), time_imports(options)
    total, rows, rest = sum(each.seconds for each in imports), [], 0.0
    by_package, counts = Counter[str](), Counter(each.package for each in imports)
    for each in imports:
        by_package[each.package] += each.seconds  # type: ignore[assignment]
    for package, seconds in by_package.most_common():
        if seconds >= LISTED_SHARE * total:
            rows.append([package, str(counts[package]), f"{1000 * seconds:.0f}", f"{seconds / total:.1%}"])
        else:
            rest += seconds
    rows += [["all others", "", f"{1000 * rest:.0f}", f"{rest / total:.1%}"]]
    rows += [["all", str(len(imports)), f"{1000 * total:.0f}", "100%"]]
    title = "What Convoy imports up to its first optimizer step on MNIST, each module without what it imports itself."
    table = markdown_table(["package", "modules", "ms", "share"], rows)
    markdown = "\n\n".join([title, format_machine(machine), table])
    results = {"machine": machine, "seconds_by_package": dict(by_package.most_common())}
    paths = write_results(options.out, results, markdown)
    print(f"{markdown}\n\nwritten to {paths[0]} and {paths[1].name}")


def time_imports(options: Options) -> list[Import]:
    with tempfile.TemporaryDirectory(prefix="convoy-startup-") as folder:
        log = Path(folder) / "imports"
        command = [sys.executable, "-X", "importtime", "train/main.py", *convoy_settings(1, folder, options)]
        run_to_first_step(command, Path(folder), options, log)
        text = log.read_text()
    found = re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", text, flags=re.MULTILINE)
    return [Import(module, int(microseconds) / 1e6) for microseconds, module in found]


if __name__ == "__main__":
    sys.exit(main())
