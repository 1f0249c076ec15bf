"""How Convoy's speed grows with the ranks, and where the time of a step goes.

weak: as many samples per rank on any number of ranks. strong: the same global batch on any number.
The runs follow one another round by round; the first record of each is not counted. On the nodes of a Slurm job it is
slurm/scaling.sbatch that starts this.

    python benchmarks/scaling.py --ranks 1 2 4 --rounds 3
    python benchmarks/scaling.py --modes weak --batch 2048
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import signal
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
    ROOT,
    BenchmarkError,
    alternate,
    num_cores,
    parse_result,
    write_results,
)
from benchmarks.launching import Launcher, SlurmNodes, ThisMachine
from benchmarks.prediction import ASSUMPTION, Timing, fit_ring, tabulate_prediction, why_no_prediction
from benchmarks.programs.convoy import convoy_settings
from benchmarks.programs.same_training import Training
from benchmarks.scaling_figure import draw_scaling
from benchmarks.scaling_runs import Case, Run, Runs, find_efficiencies, find_splits, rates, read_run, tabulate
from pipeline.run.journal import read_journal

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
    launcher: Launcher


def main(argv: Sequence[str] | None = None) -> int:
    options = read_options(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # of scancel: ends the ranks, tidies up
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
    add("--ranks-per-node", type=int, help="in a Slurm job: --ranks are multiples of it (1, 2, 4, ... and all nodes)")
    add("--container", default="", help="with --ranks-per-node: what stands before a command of the environment")
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
        launcher = choose_launcher(given)
        cases = tuple(list_cases(given, launcher))
    except ValueError as error:
        parser.error(str(error))
    return Options(cases, given.device, given.rounds, given.timeout, given.out, launcher)


def choose_launcher(given: argparse.Namespace) -> Launcher:
    """Return the launcher. Raises ValueError for nodes that this process has not been granted."""
    num_gpus = torch.cuda.device_count() if given.device == "cuda" else None
    if given.ranks_per_node is None:
        return ThisMachine(num_gpus)
    scratch = given.out.parent.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    container = shlex.split(given.container)
    return SlurmNodes.of_this_job(given.ranks_per_node, num_gpus=num_gpus, container=container, scratch=scratch)


def list_cases(given: argparse.Namespace, launcher: Launcher) -> Iterable[Case]:
    """Yield the cases. Raises ValueError for what does not fit together."""
    ranks = sorted(set(given.ranks or launcher.default_ranks()))
    if launcher.fewest_ranks not in ranks:
        raise ValueError(
            f"--ranks {ranks}: {launcher.fewest_ranks} has to be among them, against which the others are measured"
        )
    launcher.check(ranks)
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
    with tempfile.TemporaryDirectory(prefix="convoy-scaling-", dir=options.launcher.scratch) as folder:
        settings = [*convoy_settings(case.training, case.ranks), f"run.dir={folder}", "run.name=scaling"]
        if options.device == "cpu":
            settings.append("train.threads=1")  # or a single rank would compute on all cores
        options.launcher.run([str(ROOT / "train" / "main.py"), *settings], case.ranks, options.timeout)
        records, _ = read_journal(Path(folder) / "scaling" / "journal.jsonl")
    return read_run(records, case.global_batch)


def predict(options: Options, runs: Runs) -> str:
    """Return a table for more ranks from measured terms, or why there is none."""
    reason = why_no_prediction(options.device, torch.cuda.device_count(), options.launcher.num_nodes)
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
    arguments = ["-m", "benchmarks.programs.all_reduce", f"--device={options.device}"]
    done = options.launcher.run(arguments, ranks, options.timeout)
    result = parse_result(done.output)
    return [Timing(ranks, size, of) for size, of in zip(result["bytes"], result["seconds"], strict=True)]


def gradient_bytes(training: Training, gradients: str) -> int:
    """Return the bytes of all gradients. `gradients` is how the run says that they travel."""
    size = 2 if "bfloat16" in gradients else 4
    return size * sum(parameter.numel() for parameter in training.build_network().parameters())


def describe(options: Options) -> str:
    text = (
        f"Convoy on synthetic images 28x28: median (lowest to highest) of {options.rounds} interleaved rounds, without "
        f"the first record of each run. Efficiency is the speed per rank over that on {options.launcher.reference}, "
        "round by round."
    )
    if options.device != "cpu":
        return f"{text} The split is of sampled steps; in a CUDA graph, communication is part of the computing."
    if options.launcher.ranks_per_node is not None:
        return f"{text} Each rank has one thread."
    cores = num_cores()
    return (
        f"{text} There are {cores} cores here, and each rank has one thread. Where more ranks share them, they cannot "
        f"be faster than {cores} together: an efficiency of {cores} / ranks at best."
    )


def write_report(options: Options, runs: Runs) -> None:
    """Print it, and store it with its figure."""
    launcher = options.launcher
    machine = launcher.describe_machine()
    title = launcher.format_machine(machine)
    # On several nodes the ranks of each share its cores alike, and so do those that they are measured against.
    cores = num_cores() if options.device == "cpu" and launcher.ranks_per_node is None else None
    modes = list(dict.fromkeys(case.mode for case in runs))
    tables = {mode: tabulate(mode, runs, cores=cores, ranks_per_node=launcher.ranks_per_node) for mode in modes}
    parts = [describe(options), title, *(f"## {mode.capitalize()} scaling\n\n{of}" for mode, of in tables.items())]
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
    efficiencies, splits = find_efficiencies(runs), find_splits(runs)
    draw_scaling(efficiencies, splits, place, subtitle=title, reference=launcher.reference, cores=cores)
    print(f"figure: {place}")


if __name__ == "__main__":
    sys.exit(main())
