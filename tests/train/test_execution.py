"""How a training is executed where that is not set: by rule, which looks at device, settings and room."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.parallel.rank import Rank
from tests.train.helpers import config_of
from train.execution import choose_placement, find_capture_obstacle

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ALONE = Rank(0, 0, 1, 1, GPU, "none", 1)


def test_on_cpu_auto_is_where_the_data_are_and_a_choice_is_obeyed() -> None:
    assert choose_placement("auto", 10**12, CPU)[0] == "device"
    assert choose_placement("workers", 1, CPU)[0] == "workers"


@pytest.mark.parametrize(("free", "placement"), [(200, "device"), (199, "workers")])
def test_on_a_gpu_auto_is_the_device_if_the_images_fill_at_most_half_of_what_is_free(
    free: int, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
    assert choose_placement("auto", 100, GPU)[0] == placement


@pytest.mark.parametrize(
    ("settings", "rank", "placement", "obstacle"),
    [
        ((), ALONE, "device", None),
        (("train.cuda_graph=never",), ALONE, "device", "train.cuda_graph=never"),
        (("train.reproducible=true",), ALONE, "device", "train.reproducible"),
        (("train.accumulate=2",), ALONE, "device", "train.accumulate > 1"),
        ((), ALONE, "workers", "streamed data"),
        ((), replace(ALONE, device=CPU), "device", "on CPU"),
        ((), replace(ALONE, world_size=2, backend="gloo"), "device", "several ranks without nccl"),
        ((), replace(ALONE, world_size=2, backend="nccl"), "device", None),
        (
            ("data.global_batch_size=1",),
            replace(ALONE, world_size=2, backend="nccl"),
            "device",
            "ranks without samples",
        ),
    ],
)
def test_a_step_is_captured_unless_something_named_stands_against_it(
    settings: tuple[str, ...], rank: Rank, placement: str, obstacle: str | None
) -> None:
    assert find_capture_obstacle(config_of(*settings), rank, placement) == obstacle
