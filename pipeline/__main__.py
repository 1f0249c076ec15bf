"""`python -m pipeline <command>`: what surrounds a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipeline.commands import prepare, publish, report, sample, sweep, sync

COMMANDS = {"prepare": prepare, "sync": sync, "report": report, "sweep": sweep}
PROCESSES = {"publish": publish, "sample": sample}
"""What a training starts beside itself, and people need not see."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        command.add_arguments(subparsers.add_parser(name, help=command.HELP, description=command.HELP))
    for name, process in PROCESSES.items():
        process.add_arguments(subparsers.add_parser(name, description=process.HELP))
    arguments, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(arguments, "settings") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes key=value in one place only
        arguments.settings += rest
    exit_code: int = (COMMANDS | PROCESSES)[arguments.command].run(arguments)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
