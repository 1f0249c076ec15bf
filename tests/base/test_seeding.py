"""Seeds of random streams: functions of their position, apart from each other, and the same for ever."""

from __future__ import annotations

import random

import torch

from pipeline.base.seeding import stream_seed


def test_a_seed_is_a_function_of_its_arguments() -> None:
    first = stream_seed(3, "step", 100, 2)
    random.seed(0)
    torch.manual_seed(0)
    assert stream_seed(3, "step", 100, 2) == first


def test_seeds_are_those_of_the_first_release() -> None:
    """Others would end every resumed training with other weights: raise the checkpoint format before changing them."""
    assert stream_seed(0, "weights") == 4109352128593480813
    assert stream_seed(0, "step", 7, 3) == 459769008392395446


def test_every_argument_matters() -> None:
    seeds = [
        stream_seed(0, "step"),
        stream_seed(1, "step"),
        stream_seed(0, "order"),
        stream_seed(0, "step", 0),
        stream_seed(0, "step", 0, 0),
        stream_seed(0, "step", 1, 0),
        stream_seed(0, "step", 0, 1),
        stream_seed(0, "step", 1, 1),
        stream_seed(0, "step", 10, 1),
        stream_seed(0, "step", 1, 10),
    ]
    assert len(set(seeds)) == len(seeds)


def test_no_two_of_many_positions_share_a_seed() -> None:
    seeds = {stream_seed(seed, "step", step, rank) for seed in range(3) for step in range(2000) for rank in range(8)}
    assert len(seeds) == 3 * 2000 * 8


def test_seeds_fill_63_bits_evenly() -> None:
    seeds = [stream_seed(0, "step", step) for step in range(4000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    for bit in range(63):
        ones = sum(seed >> bit & 1 for seed in seeds)
        assert abs(ones - 2000) < 6 * 32, (
            f"bit {bit}"
        )  # six standard deviations of 4000 fair coins: sqrt(4000) / 2 = 32


def test_the_extremes_the_config_allows_are_seeds_of_torch() -> None:
    for seed in (0, 2**63 - 1):
        generator = torch.Generator()
        generator.manual_seed(stream_seed(seed, "step", 2**40, 4095))
        torch.rand(1, generator=generator)


def test_neighbouring_steps_draw_unrelated_numbers() -> None:
    def draw(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(stream_seed(0, "step", step, 0))
        return torch.randn(10_000, generator=generator, dtype=torch.float64)

    correlation = torch.corrcoef(torch.stack((draw(1), draw(2))))[0, 1].item()
    assert abs(correlation) < 6 / 10_000**0.5  # six standard deviations
