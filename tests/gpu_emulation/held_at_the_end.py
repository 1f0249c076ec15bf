"""Runs a program that trains, and says which parts of the training are still held when it leaves its process group.

torchrun --nproc_per_node=2 -m tests.gpu_emulation.held_at_the_end MODULE [argument ...]

MODULE has a function `main`, as train.main has.
"""

from __future__ import annotations

import importlib
import json
import sys
import weakref
from typing import Any
from unittest import mock

import torch.distributed as dist

from train.build import build_trainer
from train.trainer import Trainer

PREFIX = "HELD "


def main() -> None:
    module = importlib.import_module(sys.argv.pop(1))
    parts: dict[str, weakref.ref[Any]] = {}
    destroy = dist.destroy_process_group

    def build_watched(*arguments: Any) -> Trainer:
        trainer = build_trainer(*arguments)
        replicas = trainer.step.parts.replicas
        for name, part in {"trainer": trainer, "step": trainer.step, "DDP": replicas.model}.items():
            parts[name] = weakref.ref(part)
        return trainer

    def destroy_watched() -> None:
        held = [name for name, part in parts.items() if part() is not None]
        print(PREFIX + json.dumps({"watched": list(parts), "held": held}), flush=True)
        destroy()

    with (
        mock.patch("train.main.build_trainer", build_watched),
        mock.patch("torch.distributed.destroy_process_group", destroy_watched),
    ):
        module.main()


if __name__ == "__main__":
    main()
