"""How Convoy's speed grows with the ranks, and where the time of a step goes.

weak: as many samples per rank on any number of ranks. strong: the same global batch on any number.
The runs follow one another round by round; the first record of each is not counted.

    python benchmarks/scaling.py --ranks 1 2 4 --rounds 3
    python benchmarks/scaling.py --modes weak --batch 2048
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this may be started as a file

import torch

from benchmarks.harness import (
    RESULTS,
    BenchmarkError,
    alternate,
    clean_environment,
    describe_machine,
    format_machine,
    num_cores,
    parse_result,
    run_command,
    torchrun,
    write_results,
)
from benchmarks.prediction import ASSUMPTION, Timing, fit_ring, tabulate_prediction, why_no_prediction
from benchmarks.programs.convoy import convoy_settings
from benchmarks.programs.same_training import Training
from benchmarks.scaling_figure import draw_scaling
from benchmarks.scaling_runs import Case, Run, Runs, find_efficiencies, find_splits, rates, read_run, tabulate
from pipeline.tracking.journal import read_journal

MODES = ("weak", "strong")
DEFAULTS = {"cpu": {"batch": 32, "steps": 200, "epochs": 1}, "cuda": {"batch": 2048, "steps": 50, "epochs": 10}}
PREDICTED_TIMES = (1, 2, 4, 8, 16)
"""As many times as the most ranks measured."""


@dataclass(frozen=True)
class Options:
    cases: tuple[Case, ...]
    device: str
    rounds: int
    timeout: float
    out: Path


def main(argv: Sequence[str] | None = None) -> int:
    options = read_options(argv)
    try:
        write_report(options, compare(options))
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def read_options(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", help="1 among them (CPU: 1 2 4; GPUs: powers of 2, up to all)")
    add("--modes", nargs="+", choices=MODES, default=MODES)
    add("--rounds", type=int, default=3)
    add("--batch", type=int, help="samples per rank and step of weak scaling (CPU 32, GPU 2048)")
    add("--global-batch", type=int, help="of strong scaling (--batch times the most ranks)")
    add("--steps", type=int, help="of an epoch (CPU 200, GPU 50)")
    add("--epochs", type=int, help="(CPU 1, GPU 10)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--timeout", type=float, default=900, help="seconds that one command may take")
    add("--out", type=Path, default=RESULTS / "scaling", help="results are written to OUT.json, OUT.md and OUT.png")
    given = parser.parse_args(argv)
    try:
        cases = tuple(list_cases(given, torch.cuda.device_count()))
    except ValueError as error:
        parser.error(str(error))
    return Options(cases, given.device, given.rounds, given.timeout, given.out)


def list_cases(given: argparse.Namespace, num_devices: int) -> Iterable[Case]:
    """Raises ValueError for what does not fit together."""
    known = [2**power for power in range(10) if 2**power <= num_devices] if given.device == "cuda" else [1, 2, 4]
    ranks = sorted(set(given.ranks or known))
    if 1 not in ranks:
        raise ValueError(f"--ranks {ranks}: 1 has to be among them, against which the others are measured")
    if given.device == "cuda" and ranks[-1] > num_devices:
        raise ValueError(f"--ranks {ranks[-1]}: torch sees {num_devices} GPU(s) here")
    batch, steps, epochs = (getattr(given, key) or value for key, value in DEFAULTS[given.device].items())
    global_batch = given.global_batch or batch * ranks[-1]
    if "strong" in given.modes and any(global_batch % number for number in ranks):
        raise ValueError(f"--global-batch {global_batch}: has to be divisible by all of --ranks {ranks}")
    for mode in given.modes:
        for number in ranks:
            share = batch if mode == "weak" else global_batch // number
            yield Case(mode, number, choose_training(given.device, share, share * number * steps, epochs))


def choose_training(device: str, batch: int, images: int, epochs: int) -> Training:
    on_gpu = device == "cuda"
    return Training(
        images=images,
        eval_images=500,
        epochs=epochs,
        batch=batch,
        device="cuda" if on_gpu else "cpu",
        precision="bf16" if on_gpu else "fp32",
    )


def compare(options: Options) -> dict[Case, list[Run]]:
    runs: dict[Case, list[Run]] = {case: [] for case in options.cases}
    for round_index in range(options.rounds):
        for case in alternate(options.cases, round_index):
            run = run_case(case, options)
            runs[case].append(run)
            figures = f"{run['images_per_second']:10,.0f} images/s"
            print(f"round {round_index + 1}/{options.rounds}  {case.mode:6} {case.ranks} rank(s) {figures}", flush=True)
    return runs


def run_case(case: Case, options: Options) -> Run:
    with tempfile.TemporaryDirectory(prefix="convoy-scaling-") as folder:
        settings = [*convoy_settings(case.training, case.ranks), f"run.dir={folder}", "run.name=scaling"]
        if options.device == "cpu":
            settings.append("train.threads=1")  # or a single rank would compute on all cores
        command = torchrun(["train/main.py", *settings], case.ranks)
        run_command(command, environment=clean_environment(os.environ), timeout=options.timeout)
        records, _ = read_journal(Path(folder) / "scaling" / "journal.jsonl")
    return read_run(records, case.global_batch)


def predict(options: Options, runs: Runs) -> str:
    """A table for more ranks from measured terms, or why there is none."""
    reason = why_no_prediction(options.device, torch.cuda.device_count())
    weak = {case.ranks: of for case, of in runs.items() if case.mode == "weak"}
    if reason is None and len(weak) < 2:
        reason = "No prediction for more ranks: weak scaling was not measured on several."
    if reason is not None:
        return reason
    timings = [timing for ranks in weak if ranks > 1 for timing in time_all_reduces(ranks, options)]
    ring = fit_ring(timings)
    case = next(case for case in runs if case.mode == "weak" and case.ranks == 1)
    num_bytes = gradient_bytes(case.training, weak[max(weak)][0]["gradients"])
    table = tabulate_prediction(
        ring,
        ranks=sorted({*weak, *(max(weak) * times for times in PREDICTED_TIMES)} - {1}),
        num_bytes=num_bytes,
        step_seconds=case.global_batch / median(rates(weak[1])),
        measured={ranks: spread.median for ranks, spread in find_efficiencies(runs)["weak"].items()},
    )
    fitted = (
        f"All-reduces over nccl fit a ring with {1e6 * ring.latency:.1f} us a message and {ring.bandwidth / 1e9:.1f} "
        f"GB/s a link, off by {ring.worst_miss(timings):.0%} at most; the gradients are {num_bytes / 1e6:.2f} MB."
    )
    return f"## Prediction of weak scaling\n\n{fitted} {ASSUMPTION}\n\n{table}"


def time_all_reduces(ranks: int, options: Options) -> list[Timing]:
    command = torchrun(["-m", "benchmarks.programs.all_reduce", f"--device={options.device}"], ranks)
    done = run_command(command, environment=clean_environment(os.environ), timeout=options.timeout)
    result = parse_result(done.output)
    return [Timing(ranks, size, of) for size, of in zip(result["bytes"], result["seconds"], strict=True)]


def gradient_bytes(training: Training, gradients: str) -> int:
    """`gradients` is how the run says that they travel."""
    size = 2 if "bfloat16" in gradients else 4
    return size * sum(parameter.numel() for parameter in training.build_network().parameters())


def describe(options: Options) -> str:
    cores = num_cores()
    lines = [
        f"Convoy on synthetic images 28x28: median (lowest to highest) of {options.rounds} interleaved rounds, without "
        "the first record of each run. Efficiency is the speed over that of one rank times the ranks, round by round.",
    ]
    if options.device == "cpu":
        lines.append(
            f"There are {cores} cores here, and each rank has one thread. Where more ranks share them, they cannot be "
            f"faster than {cores} together: an efficiency of {cores} / ranks at best."
        )
    else:
        lines.append("The split is of sampled steps; in a CUDA graph, communication is part of the computing.")
    return " ".join(lines)


def write_report(options: Options, runs: Runs) -> None:
    """Print it, and store it with its figure."""
    machine = describe_machine()
    cores = num_cores() if options.device == "cpu" else None
    modes = list(dict.fromkeys(case.mode for case in runs))
    parts = [describe(options), format_machine(machine)]
    parts += [f"## {mode.capitalize()} scaling\n\n{tabulate(mode, runs, cores=cores)}" for mode in modes]
    markdown = "\n\n".join([*parts, predict(options, runs)])
    rows = [{**asdict(case), "global_batch": case.global_batch, "runs": list(of)} for case, of in runs.items()]
    for row in rows:
        del row["training"]["root"]
    paths = write_results(options.out, {"machine": machine, "rounds": options.rounds, "cases": rows}, markdown)
    print(f"\n{markdown}\n\nwritten to {paths[0]} and {paths[1].name}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no figure: matplotlib is not installed")
        return
    place = options.out.with_name(options.out.name + ".png")
    draw_scaling(find_efficiencies(runs), find_splits(runs), place, subtitle=format_machine(machine), cores=cores)
    print(f"figure: {place}")


if __name__ == "__main__":
    sys.exit(main())
