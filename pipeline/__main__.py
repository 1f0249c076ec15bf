"""`python -m pipeline <command>`: what surrounds a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipeline.commands import publish, report, sample, sync

COMMANDS = {"sync": sync, "publish": publish, "report": report, "sample": sample}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(subparser)
    arguments = parser.parse_args(argv)
    exit_code: int = COMMANDS[arguments.command].run(arguments)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
