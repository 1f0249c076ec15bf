"""The log of this process: the logger `convoy` and its handler."""

from __future__ import annotations

import logging
import socket
import sys


def start_logging(rank: int) -> logging.Logger:
    """Rank 0 logs INFO as plain lines; the others warnings, with their rank. The root logger is left alone."""
    logger = logging.getLogger("convoy")
    handler = logging.StreamHandler(sys.stdout)
    form = "%(message)s" if rank == 0 else f"[rank {rank} on {socket.gethostname()}] %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(form))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    return logger
