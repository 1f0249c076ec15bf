"""The log of this process: the logger `convoy` and its handler. The root logger, which mlflow uses, is left alone."""

import logging
import socket
import sys

logger = logging.getLogger("convoy")


def start_rank_logging(rank: int) -> None:
    """Log INFO as plain lines on rank 0, and warnings with their rank on the others, to standard output."""
    form = "%(message)s" if rank == 0 else f"[rank {rank} on {socket.gethostname()}] %(levelname)s %(message)s"
    _start(logging.StreamHandler(sys.stdout), form, logging.INFO if rank == 0 else logging.WARNING)


def start_command_logging() -> None:
    """Log INFO with the time, to standard error."""
    _start(logging.StreamHandler(sys.stderr), "%(asctime)s %(message)s", logging.INFO)


def _start(handler: logging.Handler, form: str, level: int) -> None:
    handler.setFormatter(logging.Formatter(form))
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
