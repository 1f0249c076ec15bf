"""What is compared, and what the rounds amount to."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.comparison import Comparison, Run, Variant, guard_failure
from benchmarks.harness import BenchmarkError
from benchmarks.programs.convoy import convoy_settings, read_convoy_run
from benchmarks.programs.same_training import (
    LEARNING_RATES,
    Training,
    parse_training,
    steady_rate,
    torchvision_datasets,
)
from pipeline.config import load_config, parse_command_line
from pipeline.data.build import list_dataset
from pipeline.data.samples import PixelSamples
from pipeline.learning.update import Precision
from pipeline.run.journal import Journal, read_journal

ROOT = Path(__file__).parents[2]
CONVOY, PLAIN_0, PLAIN_1 = Variant("convoy"), Variant("plain", 0), Variant("plain", 1)


def runs(*rates: float, wall_seconds: float = 10.0, threads: int = 1) -> list[Run]:
    """Of 100 images an epoch."""
    return [
        {
            "images_per_second": rate,
            "epoch_seconds": [1.0, 100 / rate],
            "wall_seconds": wall_seconds,
            "accuracy": 0.5,
            "threads": threads,
        }
        for rate in rates
    ]


def test_the_first_epoch_is_not_counted() -> None:
    assert steady_rate(100, [50.0, 1.0, 3.0]) == 50.0
    with pytest.raises(ValueError, match="at least 2"):
        steady_rate(100, [1.0])


def test_a_peer_is_its_best_number_of_workers_by_the_median() -> None:
    comparison = Comparison({CONVOY: runs(20, 20, 20), PLAIN_0: runs(10, 10, 10), PLAIN_1: runs(40, 5, 5)})
    assert comparison.best("plain") == PLAIN_0
    assert comparison.ratios("plain") == [2.0, 2.0, 2.0]


def test_what_is_measured_once_is_compared_with_every_round() -> None:
    floor = Variant("floor")
    comparison = Comparison({CONVOY: runs(20, 10), floor: runs(100)})
    assert comparison.ratios("floor") == [0.2, 0.1]


def test_a_recipe_is_compared_by_the_time_of_the_commands() -> None:
    measured = {CONVOY: runs(1, wall_seconds=5), PLAIN_0: runs(100, wall_seconds=20)}
    assert Comparison(measured, by_wall=True).ratios("plain") == [4.0]
    assert Comparison(measured).ratios("plain") == [0.01]


def test_the_table_has_a_ratio_for_the_best_variant_of_each_program_only() -> None:
    alone: list[Run] = [{"images_per_second": 50.0, "epoch_seconds": [2.0], "wall_seconds": 3.0, "threads": 1}]
    measured = {CONVOY: runs(20), PLAIN_0: runs(8), PLAIN_1: runs(10), Variant("compute_alone"): alone}
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in Comparison(measured).table().splitlines()]
    by_program = {row[0]: row[1:] for row in cells[2:]}
    assert by_program["convoy"] == ["20", "5", "10.0", "50.00", ""]
    assert by_program["plain, 0 worker(s)"][-1] == ""
    assert by_program["plain, 1 worker(s)"][-1] == "2.000"
    assert by_program["compute_alone"] == ["50", "2", "", "", "0.400"]


def test_programs_on_unequal_numbers_of_threads_are_not_compared() -> None:
    Comparison({CONVOY: runs(20), PLAIN_0: runs(10)}).check()
    with pytest.raises(BenchmarkError, match="threads"):
        Comparison({CONVOY: runs(20, threads=2), PLAIN_0: runs(10)}).check()


@pytest.mark.parametrize(
    ("ratios", "fails"),
    [([1.0, 1.1, 1.15, 3.0, 3.0], False), ([1.0, 1.1, 1.14, 3.0, 3.0], True), ([9.0, 9.0, 9.0, 1.0, 1.0], False)],
)
def test_the_guard_looks_at_the_median(ratios: Sequence[float], fails: bool) -> None:
    failure = guard_failure(ratios, 1.15)
    assert (failure is not None) == fails
    if failure is not None:
        assert "1.140" in failure and "1.15 at least" in failure and "5 pairs" in failure


def test_the_guard_refuses_to_judge_by_few_pairs() -> None:
    with pytest.raises(ValueError, match="at least 5"):
        guard_failure([2.0] * 4, 1.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guard", "1.15", "--programs", "convoy", "lightning"], "name both"),
        (["--guard", "1.15", "--programs", "plain", "convoy", "--rounds", "4"], "--rounds 5"),
        (["--recipe", "--programs", "convoy", "compute_alone"], "says nothing of compute_alone"),
        (["--programs", "floor", "--device", "cpu"], "needs a GPU"),
        (["--epochs", "1"], "--epochs from 2"),
        (["--data", "mnist", "--images", "100"], "60000"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        peers.read_options(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_recipe_is_the_one_of_the_config() -> None:
    options = peers.read_options(["--recipe", "--data", "mnist", "--root", "somewhere", "--device", "cpu"])
    command = parse_command_line(["--config", str(ROOT / "configs" / "mnist.yaml")])
    recipe = load_config(command, [])
    training = options.training
    assert training.batch * options.ranks == recipe.data.global_batch_size
    assert training.epochs == recipe.train.epochs
    assert (training.optimizer, LEARNING_RATES[training.optimizer]) == (recipe.optim.name, recipe.optim.lr)
    assert not {"compute_alone", "floor"} & set(options.programs)


def test_a_round_runs_each_peer_with_each_number_of_workers_and_all_else_once() -> None:
    assert peers.list_variants(["convoy", "plain", "compute_alone", "floor"], [0, 1]) == [
        CONVOY,
        PLAIN_0,
        PLAIN_1,
        Variant("compute_alone"),
    ]


def test_a_peer_that_is_not_installed_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torchvision": object()}
    monkeypatch.setattr(importlib.util, "find_spec", installed.get)
    usable, missing = peers.split_by_installed(["convoy", "plain", "accelerate"])
    assert usable == ["convoy", "plain"]
    assert missing == ["accelerate is left out: accelerate not installed"]


def test_a_peer_may_fail_once_and_that_is_told_while_convoy_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    options, failures = peers.read_options(["--device", "cpu"]), list[str]()
    outcomes: list[Run | BenchmarkError] = [
        BenchmarkError("the command\nexit code 1"),
        runs(10)[0],
        BenchmarkError("the command\nexit code 1"),
    ]

    def run_variant(variant: Variant, options: peers.Options) -> Run:
        outcome = outcomes.pop(0)
        if isinstance(outcome, BenchmarkError):
            raise outcome
        return outcome

    monkeypatch.setattr(peers, "run_variant", run_variant)
    assert peers.run_patiently(PLAIN_0, options, failures)["images_per_second"] == 10
    assert failures == ["plain, 0 worker(s) failed once, and was started again: exit code 1"]
    with pytest.raises(BenchmarkError):
        peers.run_patiently(CONVOY, options, failures)
    assert not outcomes


def test_convoy_is_given_the_training_that_the_others_are_given() -> None:
    training = Training(images=640, eval_images=100, epochs=3, batch=16, optimizer="sgd")
    command = parse_command_line(convoy_settings(training, ranks=4))
    config = load_config(command, [])
    assert config.data.dataset == "synthetic"
    assert {key: int(value) for key, value in config.data.arguments.items()} == {
        "train_size": 640,
        "validation_size": 100,
    }
    assert config.data.global_batch_size == 64
    assert (config.optim.name, config.optim.lr, config.optim.momentum) == ("sgd", 0.01, 0.9)
    assert (config.train.epochs, config.train.device, config.train.precision) == (3, "cpu", "fp32")
    assert config.model.name == "convnet" and not config.tracking.enabled


def test_convoys_figures_are_those_of_its_journal(tmp_path: Path) -> None:
    training = Training(images=100, epochs=3)
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"kind": "tags", "values": {"threads_per_rank": "2"}})
    for step, (seconds, accuracy) in enumerate([(9.0, 0.1), (1.0, 0.7), (3.0, 0.9)]):
        journal.metrics({"perf/epoch_seconds": seconds}, step)
        journal.metrics({"eval/accuracy": accuracy}, step)
    journal.close()

    records, _ = read_journal(tmp_path / "journal.jsonl")
    assert read_convoy_run(records, training) == {
        "images_per_second": 50.0,
        "epoch_seconds": [9.0, 1.0, 3.0],
        "accuracy": 0.9,
        "threads": 2,
    }
    with pytest.raises(BenchmarkError, match="3 of 4 epochs"):
        read_convoy_run(records, Training(images=100, epochs=4))


def test_the_programs_read_the_training_that_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(data="mnist", root="/a b", images=7, batch=3, optimizer="sgd", device="cuda", precision="bf16")
    monkeypatch.setattr(sys, "argv", ["program", *training.arguments(), "--workers=1"])
    assert parse_training("") == (training, 1)


def test_the_peers_are_given_the_pixels_that_convoy_is_given() -> None:
    training = Training(images=20, eval_images=10)
    config = load_config(parse_command_line(convoy_settings(training, ranks=1)))
    ours = list_dataset(config.data, config.run.seed)
    for theirs, split in zip(torchvision_datasets(training), (ours.train, ours.validation), strict=True):
        assert isinstance(split, PixelSamples)
        assert len(theirs) == len(split)  # type: ignore[arg-type]
        items = [theirs[index] for index in range(len(split))]
        torch.testing.assert_close(
            torch.stack([pixels for pixels, _ in items]), (split.pixels / 255 - ours.mean[0]) / ours.std[0]
        )
        assert [label for _, label in items] == split.labels.tolist()


def test_sgd_and_adadelta_are_set_as_convoy_sets_them() -> None:
    for name in ("sgd", "adadelta"):
        training = Training(optimizer=name)
        network = training.build_network()
        torchs = training.build_torch_optimizer(network)
        device = torch.device("cpu")
        convoys = training.build_convoy_update(network, Precision("fp32", device), capture_on=None).optimizer
        assert isinstance(convoys, type(torchs))
        for key in ("lr", "momentum", "weight_decay", "rho", "eps"):
            assert torchs.param_groups[0].get(key) == convoys.param_groups[0].get(key), key
