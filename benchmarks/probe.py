"""What to ask a GPU first, in a few minutes, before a training or a benchmark on it is worth its time.

    python benchmarks/probe.py sync speed nccl teardown

sync      every place within a step where the host waits for the device, by optimizer and way of executing the step
speed     microseconds of a step: queued by the host, computed, within the loop of a training, and with records
nccl      whether a captured step trains as an eager one through DistributedDataParallel over NCCL, on one rank
teardown  whether a process group is left while a captured graph with a collective lives: with NCCL it may hang

On a CPU it only shows that it runs; there is no NCCL there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this may be started as a file

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from benchmarks.harness import BenchmarkError, clean_environment, run_command, torchrun
from pipeline.base.launch import Launch
from pipeline.base.signals import StopRequest
from pipeline.base.timing import StartupTimer
from pipeline.config import load_config, parse_command_line
from pipeline.config.schema import TrainConfig
from pipeline.data.build import list_dataset, load_dataset
from pipeline.parallel.rank import Rank
from pipeline.parallel.replicas import DDPReplicas, new_stream
from pipeline.parallel.start import start_rank
from train.build import build_trainer
from train.output import RunOutput
from train.steps.captured import CapturedStep
from train.steps.eager import EagerStep
from train.trainer import Trainer

OPTIMIZERS = ("sgd", "adam", "adadelta", "rmsprop")
EXECUTIONS: Mapping[str, tuple[str, ...]] = {
    "as chosen": (),
    "eager": ("train.cuda_graph=never",),
    "fp16": ("train.precision=fp16",),
    "streamed": ("data.placement=workers", "data.workers=0"),
}
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "as it is": (),
    "eager": ("train.cuda_graph=never",),
    "channels first": ("train.channels_last=false",),
    "fp32": ("train.precision=fp32",),
    "sgd with momentum": ("optim.name=sgd", "optim.lr=0.01", "optim.momentum=0.9"),
}
NUM_SYNC_STEPS = 5
NEVER = 10**9
"""Steps between two records, so that there are none."""
TEARDOWN_TIMEOUT = 60.0
TEARDOWN = """
import os, torch, torch.distributed as dist
on_gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
values = torch.ones(8, device=device)
dist.all_reduce(values)
if on_gpu:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        dist.all_reduce(values)
    graph.replay()
    torch.cuda.synchronize()
dist.destroy_process_group()
print("returned", flush=True)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 1 if a question could not be answered."""
    questions: Mapping[str, Callable[[str], None]] = {"sync": sync, "speed": speed, "nccl": nccl, "teardown": teardown}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="+", choices=questions, metavar="question", help=", ".join(questions))
    given = parser.parse_args(argv)
    device, exit_code = "cuda" if torch.cuda.is_available() else "cpu", 0
    for name in given.questions:
        print(f"## {name} on {device}", flush=True)
        try:
            questions[name](device)
        except (BenchmarkError, RuntimeError) as error:
            print(f"no answer: {error}", flush=True)
            exit_code = 1
    return exit_code


def sync(device: str) -> None:
    """Print the places at which the host waits within a step."""
    with start_rank(Launch(), TrainConfig(device=device)) as rank:
        for optimizer in OPTIMIZERS:
            for name, settings in EXECUTIONS.items():
                if name == "fp16" and device == "cpu":
                    continue
                named = (f"optim.name={optimizer}", "optim.lr=0.001", *settings)
                step, places = find_waits(prepare_trainer(rank, 64, NUM_SYNC_STEPS + 1, *named))
                print(f"{optimizer:9} {name:10} {step:12} {len(places)} waits {sorted(set(places))}", flush=True)


def find_waits(trainer: Trainer) -> tuple[str, list[str]]:
    """Return the kind of step, and file and line of each wait in five steps behind the first."""
    batches = trainer.train_loader.batches(0)
    trainer.step(next(batches), 0)  # makes what the optimizer keeps
    trainer.rank.wait_for_device()
    with warnings.catch_warnings(record=True) as seen, noticing_waits(trainer.rank.device):
        warnings.simplefilter("always")
        for number, batch in enumerate(batches, 1):
            trainer.step(batch, number)
    waits = [warning for warning in seen if "synchroniz" in str(warning.message)]
    places = [f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits]
    return type(trainer.step).__name__, places


@contextmanager
def noticing_waits(device: torch.device) -> Iterator[None]:
    """Have torch warn at each call inside that waits for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def speed(device: str) -> None:
    """Print the microseconds of a step by batch size and settings."""
    batch_sizes, num_steps = ((64, 512, 2048), 200) if device == "cuda" else ((64,), 10)
    with start_rank(Launch(), TrainConfig(device=device)) as rank:
        for batch_size in batch_sizes:
            for name, settings in VARIANTS.items():
                trainer = prepare_trainer(rank, batch_size, num_steps, *settings)
                queued, computed = time_steps(trainer, num_steps)
                in_loop, with_records = (time_epoch(trainer, every) for every in (NEVER, 10))
                figures = {"queued": queued, "step": computed, "in the loop": in_loop, "with records": with_records}
                described = "  ".join(f"{what} {1e6 * seconds:7.1f}" for what, seconds in figures.items())
                print(f"batch {batch_size:5}  {name:18} {described} us", flush=True)


def time_steps(trainer: Trainer, num_steps: int) -> tuple[float, float]:
    """Return the seconds a step until the host has queued them, and until the device has computed them."""
    batch = next(trainer.train_loader.batches(0))
    for number in range(num_steps // 10):
        trainer.step(batch, number)
    trainer.rank.wait_for_device()
    started = time.perf_counter()
    for number in range(num_steps):
        trainer.step(batch, number)
    queued = time.perf_counter() - started
    trainer.rank.wait_for_device()
    return queued / num_steps, (time.perf_counter() - started) / num_steps


def time_epoch(trainer: Trainer, log_every: int) -> float:
    """Return the seconds a step of an epoch, which ends by waiting for the device."""
    trainer.config = trainer.config.model_copy(update={"log_every": log_every})
    trainer.position = replace(trainer.position, epoch=trainer.position.epoch + 1, samples_seen=0)
    first_step, started = trainer.position.global_step, time.perf_counter()
    trainer.train_epoch()
    return (time.perf_counter() - started) / (trainer.position.global_step - first_step)


def nccl(device: str) -> None:
    """Print how far a captured training is from an eager one, with gradients as they are and as bfloat16."""
    if device != "cuda":
        print("no GPU, no NCCL")
        return
    for compress in (False, True):
        with start_rank(Launch(), TrainConfig(device=device)) as rank:
            dist.init_process_group("nccl", store=HashStore(), rank=0, world_size=1, device_id=rank.device)
            captured, eager = (train_over_nccl(rank, way, compress=compress) for way in ("captured", "eager"))
            difference = float((captured - eager).abs().max())
            print(f"compress={compress}: the weights differ by {difference:.2e} at most", flush=True)


def train_over_nccl(rank: Rank, way: str, *, compress: bool, num_steps: int = 10) -> Tensor:
    """Return the weights behind `num_steps` steps through DDP."""
    settings = ("train.precision=fp32", "optim.name=adam", "optim.lr=0.001")
    trainer = prepare_trainer(rank, 64, num_steps, *settings)
    assert isinstance(trainer.step, CapturedStep)
    stream = new_stream(rank.device) if way == "captured" else None
    images = torch.zeros(1, 1, 28, 28, device=rank.device)
    ddp = DDPReplicas(trainer.model, replace(rank, backend="nccl"), trainer.timer, images, 1, compress, stream)
    parts = replace(trainer.step.parts, replicas=ddp)
    trainer.step = EagerStep(parts) if stream is None else CapturedStep(parts, 64)
    trainer.step.prepare()
    trainer.train_epoch()
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]).cpu()


def teardown(device: str) -> None:
    """Print whether destroy_process_group returns on all GPUs (two CPU ranks) while a graph lives."""
    ranks = torch.cuda.device_count() or 2
    with tempfile.TemporaryDirectory(prefix="convoy-probe-") as folder:
        program = Path(folder) / "teardown.py"
        program.write_text(TEARDOWN)
        environment = clean_environment(os.environ)
        done = run_command(torchrun([str(program)], ranks), environment=environment, timeout=TEARDOWN_TIMEOUT)
    print(f"{done.output.count('returned')} of {ranks} ranks returned")


def prepare_trainer(rank: Rank, batch_size: int, num_steps: int, *settings: str) -> Trainer:
    """Collective. Return a trainer of epochs of `num_steps` steps, ready for its first one; it records nowhere."""
    data = ("data.dataset=synthetic", f"data.arguments.train_size={batch_size * num_steps}")
    own = (f"data.global_batch_size={batch_size}", f"train.log_every={NEVER}", "optim.schedule=constant")
    config = load_config(parse_command_line([*data, *own, *settings]))
    dataset = load_dataset(config.data, list_dataset(config.data, config.run.seed), rank)
    trainer = build_trainer(config, rank, dataset, RunOutput(), StopRequest(), StartupTimer())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*capturable=True.*")  # the step is captured here
        trainer.step.prepare()
    trainer.model.train()
    return trainer


if __name__ == "__main__":
    sys.exit(main())
