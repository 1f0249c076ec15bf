"""The same training in Convoy, in a plain DDP script, in Lightning, in Accelerate, and as computation alone.

They run one after the other, round by round, so that what disturbs the machine disturbs them all; compared are the
ratios within the rounds. Of each peer its best number of DataLoader workers counts.

    python benchmarks/peers.py --ranks 2 --rounds 5
    python benchmarks/peers.py --recipe --data mnist --root data
    python benchmarks/peers.py --guard 1.15 --programs plain convoy
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this may be started as a file

import torch

from benchmarks.comparison import MIN_GUARD_PAIRS, Comparison, Run, Variant, guard_failure
from benchmarks.harness import (
    RESULTS,
    BenchmarkError,
    Finished,
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
from benchmarks.programs.convoy import convoy_settings, read_convoy_run
from benchmarks.programs.same_training import LEARNING_RATES, Training
from pipeline.run.journal import read_journal

PEERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("plain_ddp", ("torchvision",)),
    "lightning": ("lightning_ddp", ("torchvision", "lightning")),
    "accelerate": ("accelerate_ddp", ("torchvision", "accelerate")),
}
"""Module in benchmarks.programs, and the packages that it needs."""
LIMITS: Mapping[str, str] = {"compute_alone": "compute_alone", "floor": "hardware_floor"}
PROGRAMS = ("convoy", *PEERS, *LIMITS)
RECIPE = {"images": 60_000, "eval_images": 10_000, "epochs": 2}
RECIPE_GLOBAL_BATCH = 32


@dataclass(frozen=True)
class Options:
    training: Training
    programs: tuple[str, ...]
    ranks: int
    rounds: int
    workers: tuple[int, ...]
    guard: float | None
    recipe: bool
    timeout: float
    out: Path


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 1 if a program failed or the guard found Convoy too slow."""
    options = read_options(argv)
    programs, missing = split_by_installed(options.programs)
    for line in missing:
        print(line)
    if options.guard is not None and "plain" not in programs:
        print("the guard needs the plain DDP script, which cannot run here", file=sys.stderr)
        return 1
    try:
        comparison, failures = compare(options, programs)
        write_report(options, comparison, [*missing, *failures])
        comparison.check()
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    if options.guard is None:
        return 0
    failure = guard_failure(comparison.ratios("plain"), options.guard)
    if failure is not None:
        print(failure, file=sys.stderr)
    return 0 if failure is None else 1


def read_options(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--programs", nargs="+", choices=PROGRAMS, help="default: all that fit the device; with --recipe, no limits")
    add("--ranks", type=int, default=2, help="processes; on GPUs one GPU each")
    add("--rounds", type=int, default=5)
    add("--data", choices=("synthetic", "mnist"), default="synthetic", help="mnist: all 60,000 images")
    add("--root", default="data", help="folder that holds MNIST/raw")
    add("--images", type=int, help="training images per epoch of the synthetic data (6,400)")
    add("--epochs", type=int, default=3, help="the first is not counted")
    add("--batch", type=int, help="samples per rank and step (32; with --recipe 32 over all ranks)")
    add("--optimizer", choices=tuple(LEARNING_RATES), default="adadelta")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on GPUs, in every program")
    add("--workers", help="numbers of DataLoader workers to try in each peer, like 0,1 (0, 1, 2, 4, 8 up to its cores)")
    add("--recipe", action="store_true", help="the whole recipe for MNIST, compared from command to exit")
    add("--guard", type=float, metavar="RATIO", help="fail if Convoy is not that many times as fast as plain")
    add("--timeout", type=float, default=1800, help="seconds that one command may take")
    add("--out", type=Path, help="results are written to OUT.json and OUT.md (benchmarks/results/peers)")
    given = parser.parse_args(argv)
    try:
        return check_options(given)
    except ValueError as error:
        parser.error(str(error))


def check_options(given: argparse.Namespace) -> Options:
    """Return the options. Raises ValueError for what does not fit together."""
    device = given.device if given.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.device_count() < given.ranks:
        raise ValueError(f"--ranks {given.ranks}: torch sees {torch.cuda.device_count()} GPU(s) here")
    programs = tuple(given.programs or default_programs(device, recipe=given.recipe))
    if given.recipe and set(programs) & LIMITS.keys():
        raise ValueError("--recipe compares commands from start to exit, which says nothing of " + ", ".join(LIMITS))
    if "floor" in programs and device != "cuda":
        raise ValueError("--programs floor: needs a GPU")
    if given.guard is not None and not {"convoy", "plain"} <= set(programs):
        raise ValueError("--guard compares convoy with plain: name both in --programs")
    if given.guard is not None and given.rounds < MIN_GUARD_PAIRS:
        raise ValueError(f"--guard needs at least --rounds {MIN_GUARD_PAIRS}")
    if min(given.ranks, given.rounds) < 1 or given.epochs < 2:
        raise ValueError("accepted: --ranks and --rounds from 1, --epochs from 2 (the first is not counted)")
    name = "peers_recipe" if given.recipe else "peers"
    return Options(
        training=choose_training(given, device),
        programs=programs,
        ranks=given.ranks,
        rounds=given.rounds,
        workers=choose_workers(given),
        guard=given.guard,
        recipe=given.recipe,
        timeout=given.timeout,
        out=given.out or RESULTS / name,
    )


def choose_workers(given: argparse.Namespace) -> tuple[int, ...]:
    """Return the numbers of workers per rank to try; by default as many as it has cores at most."""
    if given.workers is not None:
        return tuple(int(number) for number in given.workers.split(","))
    cores = max(1, num_cores() // given.ranks)
    return tuple(number for number in (0, 1, 2, 4, 8) if number <= cores)


def default_programs(device: str, *, recipe: bool) -> Iterable[str]:
    left_out = set(LIMITS) if recipe else set() if device == "cuda" else {"floor"}
    return (name for name in PROGRAMS if name not in left_out)


def choose_training(given: argparse.Namespace, device: str) -> Training:
    sizes = {"images": given.images or 6400, "eval_images": 1000, "epochs": given.epochs}
    if given.recipe or given.data == "mnist":
        if given.images not in (None, RECIPE["images"]):
            raise ValueError(f"--images {given.images}: MNIST and the recipe have {RECIPE['images']}")
        sizes |= RECIPE if given.recipe else {**RECIPE, "epochs": given.epochs}
    default_batch = max(1, RECIPE_GLOBAL_BATCH // given.ranks) if given.recipe else 32
    wants_bf16 = given.precision == "bf16" or (given.precision == "auto" and device == "cuda")
    return Training(
        data=given.data,
        root=str(Path(given.root).resolve()),
        batch=given.batch or default_batch,
        optimizer=given.optimizer,
        device="cuda" if device == "cuda" else "cpu",
        precision="bf16" if wants_bf16 else "fp32",
        **sizes,
    )


def split_by_installed(programs: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the programs that can run here, and a line for each that cannot."""
    usable, missing = [], []
    for name in programs:
        packages = PEERS[name][1] if name in PEERS else ()
        absent = [package for package in packages if importlib.util.find_spec(package) is None]
        if absent:
            missing.append(f"{name} is left out: {', '.join(absent)} not installed")
        else:
            usable.append(name)
    return usable, missing


def compare(options: Options, programs: Sequence[str]) -> tuple[Comparison, list[str]]:
    """Run all variants round by round, and the floor once, at the end. Also a line for each failure of a peer."""
    failures: list[str] = []
    variants = list_variants(programs, options.workers)
    runs: dict[Variant, list[Run]] = {variant: [] for variant in variants}
    for round_index in range(options.rounds):
        for variant in alternate(variants, round_index):
            run = run_patiently(variant, options, failures)
            runs[variant].append(run)
            print(f"round {round_index + 1}/{options.rounds}  {variant.label:24} {format_run(run)}", flush=True)
    if "floor" in programs:
        runs[Variant("floor")] = [run_floor(options)]
    return Comparison(runs, by_wall=options.recipe), failures


def format_run(run: Run) -> str:
    rate, wall = f"{run['images_per_second']:10,.0f} images/s", f"{run['wall_seconds']:6.1f} s from command to exit"
    return f"{rate}  {wall}  others used {run['cpu_by_others']:.0%} of the cores"


def run_patiently(variant: Variant, options: Options, failures: list[str]) -> Run:
    """Run a variant. A peer may fail once, which is written down, so that hours of measuring are not lost; Convoy may
    not."""
    try:
        return run_variant(variant, options)
    except BenchmarkError as error:
        if variant.program not in PEERS:
            raise
        print(error, file=sys.stderr)
        failures.append(f"{variant.label} failed once, and was started again: {str(error).splitlines()[1]}")
        return run_variant(variant, options)


def list_variants(programs: Iterable[str], workers: Sequence[int]) -> list[Variant]:
    """Return what runs in each round."""
    variants = []
    for name in programs:
        if name in PEERS:
            variants += [Variant(name, number) for number in workers]
        elif name != "floor":
            variants.append(Variant(name))
    return variants


def run_variant(variant: Variant, options: Options) -> Run:
    """Run a variant once. Raises BenchmarkError if it fails."""
    if variant.program == "convoy":
        return run_convoy(options)
    if variant.program == "compute_alone":
        return run_program("compute_alone", options.training.arguments(), options, num_threads=None)
    arguments = [*options.training.arguments(), f"--workers={variant.workers}"]
    return run_program(PEERS[variant.program][0], arguments, options, max(1, num_cores() // options.ranks))


def run_program(module: str, arguments: Sequence[str], options: Options, num_threads: int | None) -> Run:
    command = torchrun(["-m", f"benchmarks.programs.{module}", *arguments], options.ranks)
    environment = clean_environment(os.environ, num_threads)
    done = run_command(command, environment=environment, timeout=options.timeout)
    return parse_result(done.output) | of_the_command(done)


def run_floor(options: Options) -> Run:
    """Return the floor of one device's share, times the devices."""
    share = replace(options.training, images=options.training.images // options.ranks)
    run = run_program("hardware_floor", share.arguments(), replace(options, ranks=1), num_threads=None)
    return {**run, "images_per_second": run["images_per_second"] * options.ranks, "threads": None}


def run_convoy(options: Options) -> Run:
    """Run the command a user would give. Its times are in the journal of its run."""
    with tempfile.TemporaryDirectory(prefix="convoy-peers-") as folder:
        settings = convoy_settings(options.training, options.ranks)
        command = torchrun(["train/main.py", *settings, f"run.dir={folder}", "run.name=peers"], options.ranks)
        done = run_command(command, environment=clean_environment(os.environ), timeout=options.timeout)
        records, _ = read_journal(Path(folder) / "peers" / "journal.jsonl")
    return read_convoy_run(records, options.training) | of_the_command(done)


def of_the_command(done: Finished) -> dict[str, float]:
    return {"wall_seconds": done.wall_seconds, "cpu_by_others": done.cpu_by_others}


def write_report(options: Options, comparison: Comparison, remarks: Sequence[str]) -> None:
    """Print it, and store it."""
    machine = describe_machine()
    training = {key: value for key, value in asdict(options.training).items() if key != "root"}
    described = ", ".join(f"{key} {value}" for key, value in training.items())
    lines = [
        f"Median (lowest to highest) of {options.rounds} interleaved rounds on {options.ranks} rank(s): {described}.",
        "Images/s in the second and later epochs, over all ranks; speeds are compared by "
        + comparison.summary()["counts"]
        + ", round by round, with the best number of workers of each peer.",
        format_machine(machine) + f"; others used {comparison.cpu_by_others().format('.0%')} of its cores meanwhile.",
    ]
    markdown = "\n\n".join([*lines, comparison.table(), *remarks])
    results = {"machine": machine, "training": training, "ranks": options.ranks, "rounds": options.rounds}
    results["remarks"] = list(remarks)
    paths = write_results(options.out, results | comparison.summary(), markdown)
    print(f"\n{markdown}\n\nwritten to {paths[0]} and {paths[1].name}")


if __name__ == "__main__":
    sys.exit(main())
