"""Record CPU, memory, disk, network and GPUs of this node in a run folder (what a training starts by itself)."""

import argparse
import os
import select
import sys
import time
from pathlib import Path

from pipeline.base.logs import start_command_logging
from pipeline.base.signals import ignore_stop_signals
from pipeline.run.node_metrics import SystemMonitor, host_name

CHECK_EVERY = 1.0
"""Seconds after which the death of the parent is noticed."""
SHORTEST = 1.0
"""Shortest interval of the last sample, in seconds: rates over less are noise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--follow", type=int, required=True, metavar="PID", help="the training, which is the parent")
    parser.add_argument("--every", type=float, metavar="SECONDS", default=10.0, help="default: %(default)s")


def run(arguments: argparse.Namespace) -> int:
    ignore_stop_signals()
    os.nice(10)
    start_command_logging()
    monitor = SystemMonitor(arguments.run_dir.absolute(), host_name())
    follow(monitor, arguments.follow, arguments.every)
    return 0


def follow(monitor: SystemMonitor, parent: int, every: float) -> None:
    """Sample every `every` seconds until the end, and once more then: a short run is to have a sample, too."""
    sampled = time.monotonic()
    while not wait_for_end(parent, every):
        monitor.sample()
        sampled = time.monotonic()
    if time.monotonic() - sampled >= SHORTEST:
        monitor.sample()
    monitor.close()


def wait_for_end(parent: int, seconds: float) -> bool:
    """Wait for `seconds` at most; return whether the parent is gone, or has written to standard input or closed it.

    Both are watched, because other children of a dead parent may still hold the pipe open.
    """
    deadline = time.monotonic() + seconds
    while os.getppid() == parent:
        left = deadline - time.monotonic()
        readable, _, _ = select.select([sys.stdin], [], [], max(0.0, min(left, CHECK_EVERY)))
        if readable:
            return True
        if left <= CHECK_EVERY:
            return False
    return True
