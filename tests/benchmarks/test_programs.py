"""The programs that only a benchmark starts run, and say what it reads."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.growth import summarize_holding
from benchmarks.harness import clean_environment, parse_result, run_command, torchrun
from benchmarks.programs.same_training import Training


def result_of(program: str, *arguments: str, ranks: int) -> dict[str, Any]:
    command = torchrun(["-m", f"benchmarks.programs.{program}", *arguments], ranks)
    return parse_result(run_command(command, environment=clean_environment(os.environ), timeout=200).output)


def test_computation_alone_has_a_speed_over_all_processes() -> None:
    training = Training(images=32, epochs=2, batch=8)
    result = result_of("compute_alone", *training.arguments(), ranks=2)
    assert result["execution"] == "eager"
    assert result["images_per_second"] == result["images_per_second_by_execution"]["eager"] > 0


def test_ranks_that_share_a_dataset_map_it_once_and_those_apart_not_at_all() -> None:
    shared, apart = (
        summarize_holding([result_of("hold_dataset", "--images=6000", *flags, ranks=2)["ranks"]])
        for flags in ([], ["--apart"])
    )
    assert shared["dataset_bytes"] == apart["dataset_bytes"] == 7000 * (28 * 28 + 8)
    assert shared["dataset_bytes"] <= shared["mapped_bytes"] < 1.1 * shared["dataset_bytes"]
    assert apart["mapped_bytes"] == 0
