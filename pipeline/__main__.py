"""`convoy <command>` or `python -m pipeline <command>`: what surrounds a training."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.commands import monitor, prepare, publish, report, sweep, sync

COMMANDS = {"prepare": prepare, "sync": sync, "report": report, "sweep": sweep}
BESIDE = {"publish": publish, "monitor": monitor}
"""Commands that a training starts beside itself, and people need not see."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["train"]:  # -P: not a folder called train where it is started
        os.execv(sys.executable, [sys.executable, "-P", "-m", "train.main", *argv[1:]])
    prog = "convoy" if Path(sys.argv[0]).name == "convoy" else "python -m pipeline"
    parser = argparse.ArgumentParser(prog=prog)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    help_train = "Train on one process; on several ranks: torchrun --nproc_per_node=N -m train.main"
    subparsers.add_parser("train", help=help_train)
    for name, command in COMMANDS.items():
        command.add_arguments(subparsers.add_parser(name, help=command.__doc__, description=command.__doc__))
    for name, command in BESIDE.items():
        command.add_arguments(subparsers.add_parser(name, description=command.__doc__))
    arguments, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(arguments, "settings") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes key=value in one place only
        arguments.settings += rest
    return int((COMMANDS | BESIDE)[arguments.command].run(arguments))


if __name__ == "__main__":
    sys.exit(main())
