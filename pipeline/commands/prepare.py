"""Download datasets and verify them, e.g. on a login node for compute nodes without a network."""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", nargs="+", metavar="DATASET", help="e.g. mnist; those of data.dataset")
    parser.add_argument("--root", type=Path, default=Path("data"), help="data.root of the training (data)")


def run(arguments: argparse.Namespace) -> int:
    """Return 0; 1 if one of them cannot be had, 2 if there is no such dataset."""
    from pipeline.data.catalog import source  # imports torch, which no other command waits for
    from pipeline.data.samples import DataError

    try:
        datasets = [source(name)(root=arguments.root, seed=0) for name in arguments.dataset]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    exit_code = 0
    for dataset in datasets:
        try:
            if dataset.files is not None:
                dataset.files.prepare(download=True)
            print(f"{dataset.name}: ready, and verified")
        except DataError as error:
            print(error, file=sys.stderr)
            exit_code = 1
    return exit_code
