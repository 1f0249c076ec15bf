"""A request for a checkpoint counts once, and one that comes during a save asks for another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from pipeline.base.signals import StopRequest
from pipeline.config.schema import CheckpointConfig
from pipeline.parallel.rank import Rank
from train.output import RunOutput
from train.saving import Saving


def test_a_request_that_comes_while_it_saves_asks_for_another_checkpoint() -> None:
    stop = StopRequest()

    class Output(RunOutput):
        def save_checkpoint(self, state: Any, value: float | None) -> None:
            stop.wants_save = not value

    display: Any = SimpleNamespace(saved=lambda *_: None)
    state: Any = SimpleNamespace(position=SimpleNamespace(global_step=1))
    alone = Rank(0, 0, 1, 1, torch.device("cpu"), "none", 1)
    saving = Saving(CheckpointConfig(), alone, Output(), display, stop)
    stop.wants_save = True
    saving.save(lambda: state, 0.0)
    assert saving.is_wanted()
    saving.save(lambda: state, 1.0)
    assert not saving.is_wanted()
