"""What only a GPU can show. `pytest tests/test_gpu.py` on a machine that has one; mlflow is not needed there."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed import HashStore  # type: ignore[attr-defined]

from pipeline.base.launch import Launch
from pipeline.config.schema import TrainConfig
from pipeline.parallel.rank import Rank
from pipeline.parallel.replicas import DDPReplicas, new_stream
from pipeline.parallel.start import start_rank
from tests.train.helpers import config_of, flat_weights, make_trainer, set_total_steps
from train.steps.captured import CapturedStep
from train.steps.eager import EagerStep
from train.trainer import Trainer

ROOT = Path(__file__).parents[1]
NO_DROPOUT = ("model.arguments.dropout=0", "model.arguments.dropout2d=0")
SYNTHETIC = (
    "data.dataset=synthetic",
    "data.arguments.train_size=2048",
    "data.global_batch_size=64",
    "optim.schedule=constant",
    "train.epochs=2",
    "tracking.enabled=false",
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def train(folder: Path, name: str, *settings: str, ranks: int = 1) -> list[dict[str, float | str]]:
    """The metrics of a training that finished."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, str(ROOT / "train" / "main.py"), *SYNTHETIC, f"run.name={name}", *settings]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (folder / "runs" / name / "journal.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "metric"]


def on_gpu(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(rank, *arguments)` in a process of its own: the tests' own must not touch CUDA, it forks."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_with_rank, (function, arguments))


def _with_rank(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    with start_rank(Launch(), TrainConfig(device="cuda")) as rank:
        return function(rank, *arguments)


def losses(metrics: list[dict[str, float | str]]) -> list[float]:
    return [float(record["value"]) for record in metrics if record["key"] == "train/loss"]


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
def test_each_precision_learns(tmp_path: Path, precision: str) -> None:
    values = losses(train(tmp_path, precision, f"train.precision={precision}"))
    assert values[-1] < 0.5 * values[0]


def test_a_rank_takes_the_gpu_by_itself(tmp_path: Path) -> None:
    train(tmp_path, "auto")
    tags = (tmp_path / "runs" / "auto" / "journal.jsonl").read_text()
    assert '"device":"cuda"' in tags


def test_two_ranks_on_one_gpu_over_gloo_train_as_one(tmp_path: Path) -> None:
    exact = ("train.precision=fp64", *NO_DROPOUT, "train.backend=gloo")
    one = losses(train(tmp_path, "one", *exact))
    two = losses(train(tmp_path, "two", *exact, ranks=2))
    assert one == pytest.approx(two, abs=1e-9)


def test_streamed_data_train_as_resident_data(tmp_path: Path) -> None:
    resident = losses(train(tmp_path, "resident", "data.placement=device", "train.precision=fp64"))
    streamed = losses(train(tmp_path, "streamed", "data.placement=workers", "train.precision=fp64"))
    assert resident == pytest.approx(streamed, abs=1e-9)


def test_more_ranks_than_gpus_are_explained(tmp_path: Path) -> None:
    ranks = torch.cuda.device_count() + 1
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, str(ROOT / "train" / "main.py"), *SYNTHETIC]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "two ranks on one GPU cannot use NCCL" in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_step_is_captured_and_its_times_are_known(tmp_path: Path) -> None:
    names = {record["key"] for record in train(tmp_path, "captured")}
    assert "time/graph_ms" in names
    assert "time/backward_ms" not in names
    assert '"step":"CUDA graph"' in (tmp_path / "runs" / "captured" / "journal.jsonl").read_text()
    eager = {record["key"] for record in train(tmp_path, "eager", "train.cuda_graph=never")}
    assert {"time/forward_ms", "time/backward_ms", "time/update_ms"} <= eager


OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop", "adadelta")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["convnet", "net_conv10_20"])
def test_a_captured_step_trains_as_an_eager_one_dropout_included(optimizer: str, model: str) -> None:
    captured, eager = on_gpu(_train_both_ways, optimizer, model)
    torch.testing.assert_close(captured, eager, rtol=1e-3, atol=1e-5)


def _train_both_ways(rank: Rank, optimizer: str, model: str) -> tuple[torch.Tensor, torch.Tensor]:
    results = []
    momentum = ("optim.momentum=0.9",) if optimizer == "sgd" else ()
    for way in ("auto", "never"):
        settings = (*SYNTHETIC, f"optim.name={optimizer}", "optim.lr=0.003", *momentum, f"model.name={model}")
        trainer, _ = make_trainer(rank, config_of(*settings, "train.precision=fp32", f"train.cuda_graph={way}"), 320)
        assert isinstance(trainer.step, CapturedStep if way == "auto" else EagerStep)
        set_total_steps(trainer, 5)
        trainer.step.prepare()
        trainer.train_epoch()
        results.append(flat_weights(trainer).cpu())
    return results[0], results[1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_capturing_leaves_weights_and_optimizer_as_they_were(optimizer: str) -> None:
    for before, after in on_gpu(_capture_in_the_middle, optimizer):
        assert torch.equal(before, after)


def _capture_in_the_middle(rank: Rank, optimizer: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    trainer, recorder = make_trainer(rank, config_of(*SYNTHETIC, f"optim.name={optimizer}", "train.cuda_graph=never"))
    set_total_steps(trainer, 32)
    trainer.train_epoch()
    trainer.save()
    state = recorder.states[-1]
    again, _ = make_trainer(rank, config_of(*SYNTHETIC, f"optim.name={optimizer}"))
    again.load_state(state)
    before = everything(again)
    again.step.prepare()
    return list(zip(before, everything(again), strict=True))


def everything(trainer: Trainer) -> list[torch.Tensor]:
    """Weights and state of the optimizer, but for the learning rate, which every step sets."""
    states = (value for state in trainer.update.optimizer.state.values() for value in state.values())
    return [flat_weights(trainer).cpu().clone(), *(v.cpu().clone() for v in states if isinstance(v, torch.Tensor))]


def test_a_short_last_batch_has_its_exact_gradient_when_captured() -> None:
    change, reference = on_gpu(_change_by_short_batch)
    torch.testing.assert_close(change, reference, rtol=1e-9, atol=1e-11)


def _change_by_short_batch(rank: Rank) -> tuple[torch.Tensor, torch.Tensor]:
    exact = (
        "train.precision=fp64",
        "optim.name=sgd",
        "optim.lr=1",
        *NO_DROPOUT,
    )
    trainer, _ = make_trainer(rank, config_of(*SYNTHETIC, *exact), 7)
    assert isinstance(trainer.step, CapturedStep)
    trainer.step = CapturedStep(trainer.step.parts, batch_size=64)
    inputs = trainer.train_loader.prepare(torch.arange(7, device=rank.device))
    loss = torch.nn.functional.nll_loss(trainer.model(inputs.images), inputs.classes[0])
    reference = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(trainer.model.parameters()))])
    # alive, its graph would keep the gradient accumulators on the default stream, where they break a capture
    del loss, inputs
    before = flat_weights(trainer).clone()
    trainer.step.prepare()
    (batch,) = list(trainer.train_loader.batches(0))
    trainer.step(batch, 0)
    return (before - flat_weights(trainer)).cpu(), reference.cpu()


@pytest.mark.parametrize("compress", [False, True])
def test_ddp_over_nccl_is_captured_too(compress: bool) -> None:
    captured, eager = on_gpu(_train_with_ddp, compress)
    torch.testing.assert_close(captured, eager, rtol=1e-3, atol=1e-4)


def _train_with_ddp(rank: Rank, compress: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One rank in a process group of its own: all that one GPU can show of NCCL."""
    dist.init_process_group("nccl", store=HashStore(), rank=0, world_size=1, device_id=rank.device)
    rank = replace(rank, backend="nccl")
    results = []
    for captured in (True, False):
        stream = new_stream(rank.device) if captured else None
        trainer, _ = make_trainer(replace(rank, backend="none"), config_of(*SYNTHETIC, "train.precision=fp32"), 320)
        assert isinstance(trainer.step, CapturedStep)
        images = torch.zeros(1, 1, 28, 28, device=rank.device)
        replicas = DDPReplicas(trainer.model, rank, trainer.timer, images, 1, compress, stream)
        assert ("bfloat16" in replicas.description) == compress
        parts = replace(trainer.step.parts, replicas=replicas)
        trainer.step = CapturedStep(parts, 64) if captured else EagerStep(parts)
        set_total_steps(trainer, 5)
        trainer.step.prepare()
        trainer.train_epoch()
        results.append(flat_weights(trainer).cpu())
        del trainer, parts, replicas  # a captured graph must be gone before its process group
    dist.destroy_process_group()
    return results[0], results[1]


def test_a_compiled_model_trains(tmp_path: Path) -> None:
    values = losses(train(tmp_path, "compiled", "train.compile=true"))
    assert values[-1] < 0.5 * values[0]


def test_a_training_stopped_and_resumed_goes_on_with_a_captured_step(tmp_path: Path) -> None:
    train(tmp_path, "again", "train.epochs=1")
    resumed = losses(train(tmp_path, "again", "train.epochs=2"))
    whole = losses(train(tmp_path, "whole", "train.epochs=2"))
    assert resumed == pytest.approx(whole, rel=1e-2)


def _weights_after_nan(rank: Rank, optimizer: str, graph: str) -> tuple[torch.Tensor, list[float]]:
    """Behind six steps, of which the third has an image of NaN; and what was skipped."""
    config = config_of(
        *SYNTHETIC, "train.precision=fp32", f"optim.name={optimizer}", "optim.lr=0.01", f"train.cuda_graph={graph}"
    )
    trainer, _ = make_trainer(rank, config, 64 * 6)
    shift = trainer.train_loader.prepare.normalize.shift
    usual = shift.clone()
    trainer.step.prepare()
    for number, batch in enumerate(trainer.train_loader.batches(0)):
        shift.copy_(torch.full_like(usual, torch.nan) if number == 2 else usual)
        trainer.step(batch, number)
    return flat_weights(trainer).cpu(), trainer.update.skipped.tolist()


@pytest.mark.parametrize("graph", ["auto", "never"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop", "adadelta"])
def test_a_step_without_finite_gradients_is_skipped_by_the_device(optimizer: str, graph: str) -> None:
    weights, skipped = on_gpu(_weights_after_nan, optimizer, graph)
    assert weights.isfinite().all()
    assert skipped == [1.0, 0.0, 1.0]


def final_weights(folder: Path, name: str) -> torch.Tensor:
    loaded = load_file(folder / "runs" / name / "model" / "final.safetensors")
    return torch.cat([value.flatten() for value in loaded.values()])


def test_a_deterministic_training_gives_the_same_bits_again(tmp_path: Path) -> None:
    for name in ("first", "second"):
        train(tmp_path, name, "train.deterministic=true")
    assert torch.equal(final_weights(tmp_path, "first"), final_weights(tmp_path, "second"))


def test_a_reproducible_training_gives_the_same_bits_on_one_rank_and_on_two(tmp_path: Path) -> None:
    for ranks in (1, 2):
        train(tmp_path, str(ranks), "train.reproducible=true", "train.backend=gloo", ranks=ranks)
    assert torch.equal(final_weights(tmp_path, "1"), final_weights(tmp_path, "2"))
