"""Rank 0 logs all, the others only warnings, and the root logger is left alone."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Iterator

import pytest

from pipeline.base.logs import logger, start_command_logging, start_rank_logging


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.mark.usefixtures("_logging_as_before")
def test_rank_0_logs_information_and_the_others_only_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = list(root.handlers), root.level
    for rank in (0, 3, 0):  # the second time replaces the handler of the first
        start_rank_logging(rank)
        logger.info("information")
        logger.warning("a warning")
        logger.debug("detail")
    plain = "information\na warning\n"
    assert capsys.readouterr().out == f"{plain}[rank 3 on {socket.gethostname()}] WARNING a warning\n{plain}"
    assert (list(root.handlers), root.level) == before


@pytest.mark.usefixtures("_logging_as_before")
def test_a_command_logs_with_the_time_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    start_command_logging()
    logger.info("information")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} information\n", captured.err)
