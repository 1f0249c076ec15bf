"""What makes the number of ranks a matter of speed only: the same batches, losses and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.config.schema import OptimConfig
from pipeline.data.loaders import ResidentLoader
from pipeline.learning.optim import Schedule, build_optimizer
from pipeline.learning.update import Update
from pipeline.parallel.rank import Rank
from pipeline.parallel.replicas import build_replicas
from tests.ranks import run_ranks
from tests.train.helpers import config_of, flat_weights, losses, make_trainer, set_total_steps
from train.steps.captured import CapturedStep
from train.steps.eager import EagerStep
from train.trainer import Trainer

NO_DROPOUT = ("model.arguments.dropout=0", "model.arguments.dropout2d=0")


def test_recorded_indices_of_the_global_batches_are_the_same_on_real_ranks() -> None:
    reference = run_ranks(1, _recorded_batches)[0]
    assert len(reference) == 45
    assert sorted(i for batch in reference for i in batch) == list(range(1437))
    for world_size in (2, 3, 4):
        per_rank = run_ranks(world_size, _recorded_batches)
        joined: list[list[int]] = [sum(parts, []) for parts in zip(*per_rank, strict=True)]
        assert joined == reference


def _recorded_batches(rank: Rank) -> list[list[int]]:
    """The indices of the samples a rank's loader gives, told by labels that are the indices."""
    trainer, _ = make_trainer(rank, config_of())
    loader = trainer.train_loader
    assert isinstance(loader, ResidentLoader)
    loader.prepare.take.labels = torch.arange(1437)
    return [
        sum((loader.prepare(m).classes[0].tolist() for m in batch.micro_batches), []) for batch in loader.batches(0)
    ]


def test_losses_of_the_first_10_steps_in_float32_differ_by_less_than_1e_6_between_numbers_of_ranks() -> None:
    _assert_same_losses(10, 1e-6, "train.precision=fp32")


def test_losses_of_100_steps_in_float64_differ_by_less_than_1e_9_between_numbers_of_ranks() -> None:
    _assert_same_losses(100, 1e-9, "train.precision=fp64")


def _assert_same_losses(steps: int, bound: float, precision: str) -> None:
    settings = (*NO_DROPOUT, precision)
    reference = torch.tensor(run_ranks(1, losses, steps, settings)[0], dtype=torch.float64)
    assert len(reference) == steps
    assert reference[-1] < 0.8 * reference[0]  # it learns, so the comparison is not one of constants
    for world_size in (2, 3, 4):
        others = run_ranks(world_size, losses, steps, settings)
        assert all(other == others[0] for other in others)
        assert (torch.tensor(others[0], dtype=torch.float64) - reference).abs().max() < bound


@pytest.mark.parametrize(
    ("world_size", "num_samples", "accumulate", "case"),
    [
        (2, 8, 1, "an even split"),
        (3, 10, 1, "an uneven split"),
        (4, 3, 1, "a short batch that leaves a rank without samples"),
        (2, 9, 2, "accumulation over uneven micro-batches"),
        (4, 5, 3, "accumulation in which some micro-batches are empty"),
        (1, 7, 3, "accumulation in one process"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else str(value),
)
@pytest.mark.parametrize("loss", ["nll", "mse"])
def test_the_gradient_is_that_of_one_process_on_the_joined_batch(
    world_size: int, num_samples: int, accumulate: int, case: str, loss: str
) -> None:
    results = run_ranks(world_size, _gradient, num_samples, accumulate, loss)
    gradient, reference = results[0]
    assert reference.abs().max() > 1e-3
    torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(gradient, other) for other, _ in results)


@pytest.mark.parametrize(("world_size", "num_samples"), [(1, 16), (1, 7), (3, 10), (4, 3)])
@pytest.mark.parametrize("loss", ["nll", "mse"])
def test_a_step_of_fixed_shapes_has_the_gradient_of_the_samples_that_are_not_padding(
    world_size: int, num_samples: int, loss: str
) -> None:
    for gradient, reference in run_ranks(world_size, _gradient, num_samples, 1, loss, True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


def test_gradients_of_ranks_on_several_nodes_are_those_of_one_process() -> None:
    for gradient, reference in run_ranks(4, _gradient, 10, 1, "nll", num_local=2):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


def test_steps_of_fixed_shapes_train_as_others_do_dropout_included() -> None:
    for fixed, eager in run_ranks(2, _trained_both_ways):
        torch.testing.assert_close(fixed, eager, rtol=1e-5, atol=1e-6)


def _trained_both_ways(rank: Rank) -> tuple[torch.Tensor, torch.Tensor]:
    """Four full steps: a padded one draws other random numbers."""
    results = []
    for fixed in (True, False):
        trainer, _ = make_trainer(rank, config_of("optim.name=adam", "optim.lr=0.001"), 128)
        set_total_steps(trainer, 4)
        if fixed:
            _fix_shapes(trainer, 16)
        trainer.train_epoch()
        results.append(flat_weights(trainer))
    return results[0], results[1]


def test_a_short_batch_of_a_network_with_batch_statistics_is_not_padded() -> None:
    for fixed, eager in run_ranks(2, _trained_with_batch_statistics):
        torch.testing.assert_close(fixed, eager, rtol=1e-10, atol=1e-12)


def _trained_with_batch_statistics(rank: Rank) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and statistics after two steps of 16 samples and one of 7."""
    results = []
    for fixed in (True, False):
        trainer, _ = make_trainer(rank, config_of("train.precision=fp64", "data.global_batch_size=16"), 39)
        assert isinstance(trainer.step, EagerStep)
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 3, 5), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 24 * 24, 10), nn.LogSoftmax(1))
        model = nn.Sequential(*layers).double()
        replicas = build_replicas(trainer.config, model, rank, trainer.timer, torch.zeros(1, 1, 28, 28))
        optimizer = build_optimizer(OptimConfig(name="sgd", lr=0.1), [{"params": list(model.parameters())}])
        parts = trainer.step.parts
        update = Update(optimizer, Schedule(OptimConfig(schedule="constant"), 3, 3), parts.precision)
        parts = replace(parts, replicas=replicas, update=update)
        step = CapturedStep(parts, 8) if fixed else EagerStep(parts)
        for index, batch in enumerate(trainer.train_loader.batches(0)):
            step(batch, index)
        results.append(torch.cat([value.double().flatten() for value in model.state_dict().values()]))
    return results[0], results[1]


def _fix_shapes(trainer: Trainer, batch_size: int) -> None:
    assert isinstance(trainer.step, EagerStep)
    trainer.step = CapturedStep(trainer.step.parts, batch_size)


def _gradient(
    rank: Rank, num_samples: int, accumulate: int, loss: str, fixed_shapes: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one step over `num_samples`, seen as the change of the weights under plain SGD with lr 1; and by hand."""
    chosen = NO_DROPOUT if loss == "nll" else ("model.name=lenet_5x5", "data.image_size=32", "loss=mse")
    settings = ("train.precision=fp64", "optim.name=sgd", "optim.lr=1", "optim.schedule=constant")
    batching = ("data.global_batch_size=16", f"train.accumulate={accumulate}")
    trainer, _ = make_trainer(rank, config_of(*chosen, *settings, *batching), num_samples)
    model, before = trainer.model, flat_weights(trainer).clone()
    inputs = trainer.train_loader.prepare(torch.arange(num_samples))
    output, labels = model(inputs.images), inputs.classes[0]
    one_hot = F.one_hot(labels, 10).double()
    value = F.nll_loss(output, labels) if loss == "nll" else F.mse_loss(output, one_hot)
    reference = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])
    if fixed_shapes:
        _fix_shapes(trainer, batch_size=16)
    (batch,) = list(trainer.train_loader.batches(0))
    assert batch.global_count == num_samples
    trainer.step(batch, 0)
    return before - flat_weights(trainer), reference


def test_clipping_bounds_the_norm_of_the_whole_gradient_on_every_number_of_ranks() -> None:
    for world_size in (1, 2):
        for change in run_ranks(world_size, _clipped_change):
            assert change == pytest.approx(0.01, rel=1e-4)


def _clipped_change(rank: Rank) -> float:
    config = config_of("train.clip_norm=0.01", "optim.name=sgd", "optim.lr=1", "optim.schedule=constant")
    trainer, _ = make_trainer(rank, config, 32)
    before = flat_weights(trainer).clone()
    for batch in trainer.train_loader.batches(0):
        trainer.step(batch, 0)
    return float((flat_weights(trainer) - before).norm())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_counts_every_sample_once_and_agrees_on_every_number_of_ranks(world_size: int) -> None:
    reference = run_ranks(1, _evaluated, 500)[0]
    for result in run_ranks(world_size, _evaluated, 7):
        assert result[0] == reference[0]
        assert result[1] == pytest.approx(reference[1], rel=1e-6)
        assert result[2] == reference[2]


def _evaluated(rank: Rank, eval_batch_size: int) -> tuple[list[list[int]], float, list[int]]:
    trainer, _ = make_trainer(rank, config_of(f"data.eval_batch_size={eval_batch_size}"))
    evaluation = trainer.evaluator.evaluate()
    assert evaluation is not None and evaluation.count == 360
    predictions = trainer.evaluator.predictions()
    assert torch.equal(predictions.labels, trainer.evaluator.loader.prepare.take.labels)  # type: ignore[arg-type]
    assert int((predictions.labels == predictions.predicted).sum()) == evaluation.num_correct
    return evaluation.confusion.tolist(), evaluation.loss, predictions.predicted.tolist()


def test_bf16_on_cpu_trains() -> None:
    values = run_ranks(2, losses, 30, ("train.precision=bf16",))[0]
    assert values[-1] < 0.7 * values[0]


def test_streamed_data_train_to_the_same_weights_as_resident_data() -> None:
    weights = [
        run_ranks(2, _weights_after, (f"data.placement={placement}", "data.workers=1"))[0]
        for placement in ("device", "workers")
    ]
    assert torch.equal(*weights)


def _weights_after(rank: Rank, settings: tuple[str, ...]) -> torch.Tensor:
    trainer, _ = make_trainer(rank, config_of(*settings), 200)
    set_total_steps(trainer, 7)
    trainer.train_epoch()
    return flat_weights(trainer)
