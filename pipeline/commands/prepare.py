"""`prepare DATASET ...`: have datasets in place and verified before a training needs them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "download datasets and verify them, e.g. on a login node for compute nodes without a network"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", nargs="+", metavar="DATASET", help="e.g. mnist; those of data.dataset")
    parser.add_argument("--root", type=Path, default=Path("data"), help="data.root of the training (data)")


def run(arguments: argparse.Namespace) -> int:
    """0; 1: one of them cannot be had; 2: there is no such dataset."""
    from pipeline.data.sources.datasets import (  # torch, which no other command waits for
        DATASETS,
        DataError,
        prepare_dataset,
    )

    if unknown := [name for name in arguments.dataset if name not in DATASETS]:
        print(f"{', '.join(unknown)}: unknown; accepted: {', '.join(DATASETS)}", file=sys.stderr)
        return 2
    exit_code = 0
    for name in arguments.dataset:
        try:
            prepare_dataset(DATASETS[name], arguments.root, download=True)
            print(f"{name}: ready, and verified")
        except DataError as error:
            print(error, file=sys.stderr)
            exit_code = 1
    return exit_code
