"""What is run, what the journal of a run amounts to, the fit of a ring and what it predicts."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import prediction, scaling, scaling_figure, scaling_runs
from benchmarks.harness import BenchmarkError, Spread, clean_environment, parse_result, run_command, torchrun
from benchmarks.prediction import Ring, Timing, fit_ring
from benchmarks.scaling_runs import Case
from pipeline.base.timing import PHASES


def options_of(*arguments: str) -> scaling.Options:
    return scaling.read_options(["--device=cpu", *arguments])


def metric(step: int, key: str, value: float) -> dict[str, Any]:
    return {"kind": "metric", "step": step, "key": key, "value": value}


def test_weak_scaling_keeps_the_batch_of_a_rank_and_strong_scaling_that_of_all() -> None:
    cases = options_of("--ranks", "1", "2", "4", "--batch=8", "--steps=20").cases
    assert [(case.mode, case.ranks, case.training.batch, case.global_batch) for case in cases] == [
        ("weak", 1, 8, 8),
        ("weak", 2, 8, 16),
        ("weak", 4, 8, 32),
        ("strong", 1, 32, 32),
        ("strong", 2, 16, 32),
        ("strong", 4, 8, 32),
    ]
    assert all(case.training.images == 20 * case.global_batch for case in cases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "2", "4"], "1 has to be among them"),
        (["--ranks", "1", "3", "--global-batch=32"], "divisible"),
        (["--device=cuda", "--ranks", "1", "2"], "1 GPU"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: Sequence[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SystemExit):
        options_of(*arguments)
    assert message in capsys.readouterr().err


def test_the_parts_of_a_step_are_all_its_phases() -> None:
    assert sorted(phase for phases in scaling_runs.PARTS.values() for phase in phases) == sorted(PHASES)


def test_the_first_record_is_not_counted_and_others_by_their_steps() -> None:
    run = scaling_runs.read_run(
        [
            {"kind": "tags", "values": {"gradients": "shared memory"}},
            metric(10, scaling_runs.RATE, 1.0),
            metric(10, "time/data_ms", 1e6),
            metric(20, scaling_runs.RATE, 100.0),  # 10 steps of 4 images: 0.4 s
            metric(20, "time/data_ms", 3.0),
            metric(20, "time/forward_ms", 5.0),
            metric(20, "time/update_ms", 1.0),
            metric(20, "time/save_seconds", 9.0),
            metric(25, scaling_runs.RATE, 200.0),  # 5 steps: 0.1 s
            metric(25, "time/communication_ms", 6.0),
            metric(25, "perf/epoch_seconds", 7.0),
        ],
        global_batch=4,
    )
    assert run["images_per_second"] == pytest.approx(60 / 0.5)
    assert run["milliseconds"] == pytest.approx({"data": 2.0, "compute": 4.0, "communication": 2.0, "other": 0.0})
    assert run["gradients"] == "shared memory"


def test_a_run_of_one_record_says_nothing() -> None:
    with pytest.raises(BenchmarkError, match="at least 2"):
        scaling_runs.read_run([metric(10, scaling_runs.RATE, 1.0)], global_batch=4)


def runs_of(rates: dict[int, list[float]]) -> dict[Case, list[scaling_runs.Run]]:
    split = {"data": 1.0, "compute": 20.0, "communication": 3.0, "other": 0.5}
    training = scaling.choose_training("cpu", 8, 80, 1)
    return {
        Case("weak", ranks, training): [
            {"images_per_second": rate, "milliseconds": split, "gradients": "nccl"} for rate in of
        ]
        for ranks, of in rates.items()
    }


def test_efficiency_is_against_one_rank_of_the_same_round() -> None:
    runs = runs_of({1: [100.0, 200.0, 50.0], 4: [200.0, 800.0, 100.0]})
    efficiencies = scaling_runs.find_efficiencies(runs)["weak"]
    assert efficiencies[1] == Spread(1.0, 1.0, 1.0, 3)
    assert efficiencies[4] == Spread(median=0.5, minimum=0.5, maximum=1.0, count=3)


def test_the_table_marks_the_ranks_that_share_cores() -> None:
    runs = runs_of({1: [100.0], 2: [180.0], 4: [200.0]})
    lines = scaling_runs.tabulate("weak", runs, cores=2).splitlines()
    assert lines[3] == "| 2 | 16 | 180 | 90% | 1.00 | 20.00 | 3.00 | 0.50 |"
    assert lines[4] == "| 4 (sharing 2 cores) | 32 | 200 | 50% | 1.00 | 20.00 | 3.00 | 0.50 |"
    assert "sharing" not in scaling_runs.tabulate("weak", runs, cores=None)


RING = Ring(latency=5e-6, bandwidth=100e9)
SIZES = [4096 * 4**power for power in range(8)]


def timings_of(ring: Ring, *, noise: float = 0.0) -> list[Timing]:
    cases = [(ranks, size) for ranks in (2, 4) for size in SIZES]
    return [Timing(n, size, ring.seconds(n, size) * (1 + noise * (-1) ** i)) for i, (n, size) in enumerate(cases)]


def test_the_time_of_a_ring_is_its_formula() -> None:
    assert Ring(latency=1.0, bandwidth=10.0).seconds(4, 100) == pytest.approx(2 * 3 * 1.0 + 2 * 3 / 4 * 100 / 10)
    assert RING.seconds(1, 100) == 0


def test_a_ring_is_found_again_from_its_times() -> None:
    fitted = fit_ring(timings_of(RING))
    assert fitted.latency == pytest.approx(RING.latency) and fitted.bandwidth == pytest.approx(RING.bandwidth)
    noisy = timings_of(RING, noise=0.1)
    fitted = fit_ring(noisy)
    assert fitted.latency == pytest.approx(RING.latency, rel=0.1)
    assert fitted.bandwidth == pytest.approx(RING.bandwidth, rel=0.1)
    assert 0.05 < fitted.worst_miss(noisy) < 0.2


def test_times_that_shrink_with_the_size_are_no_ring() -> None:
    with pytest.raises(BenchmarkError, match="no ring"):
        fit_ring([Timing(2, size, 1e-3 / size) for size in SIZES])


def test_more_ranks_are_predicted_from_the_step_of_one() -> None:
    ring = Ring(latency=1e-3, bandwidth=1e9)
    table = prediction.tabulate_prediction(
        ring, ranks=[2, 4], num_bytes=1_000_000, step_seconds=0.01, measured={1: 1.0, 2: 0.7}
    )
    # 2 ranks: 2 messages and 1 MB over a link of 1 GB/s
    assert table.splitlines()[2:] == ["| 2 | 3,000 | 13.000 | 76.9% | 70.0% |", "| 4 | 7,500 | 17.500 | 57.1% |  |"]


def test_nothing_is_predicted_from_cpu_ranks_or_a_single_gpu() -> None:
    assert "CPU ranks" in (prediction.why_no_prediction("cpu", 8, 1) or "")
    assert "single GPU" in (prediction.why_no_prediction("cuda", 1, 1) or "")
    assert prediction.why_no_prediction("cuda", 2, 1) is None
    assert "between nodes" in (prediction.why_no_prediction("cuda", 8, 2) or "")
    assert "CPU ranks" in scaling.predict(options_of(), runs_of({1: [1.0], 2: [2.0]}))


def test_on_several_gpus_the_prediction_is_made_from_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(
        scaling, "time_all_reduces", lambda ranks, _: [timing for timing in timings_of(RING) if timing.ranks == ranks]
    )
    runs = runs_of({1: [1000.0], 2: [1900.0], 4: [3600.0]})  # 8 images: 8 ms a step
    text = scaling.predict(replace(options_of(), device="cuda"), runs)
    assert "5.0 us a message" in text and "100.0 GB/s" in text and "off by 0% at most" in text
    assert prediction.ASSUMPTION in text
    ranks = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert ranks == ["ranks", "---", "2", "4", "8", "16", "32", "64"]
    efficiency = 8e-3 / (8e-3 + RING.seconds(2, 4 * 300_426))
    assert f"| {efficiency:.1%} | 95.0% |" in text


def test_without_matplotlib_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    scaling.write_report(replace(options_of(), out=tmp_path / "scaling"), runs_of({1: [100.0], 2: [180.0]}))
    assert "no figure: matplotlib is not installed" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scaling.json", "scaling.md"]
    text = (tmp_path / "scaling.md").read_text()
    assert "## Weak scaling" in text and "No prediction" in text
    stored = json.loads((tmp_path / "scaling.json").read_text())
    assert [case["runs"][0]["images_per_second"] for case in stored["cases"]] == [100.0, 180.0]


def test_a_gradient_has_the_size_in_which_it_travels() -> None:
    training = scaling.choose_training("cpu", 8, 80, 1)
    assert scaling.gradient_bytes(training, "nccl") == 4 * 300_426
    assert scaling.gradient_bytes(training, "nccl, as bfloat16") == 2 * 300_426


def test_all_reduces_are_timed_by_size() -> None:
    arguments = ["-m", "benchmarks.programs.all_reduce", "--device=cpu", "--calls=5", "--sizes", "4096", "16777216"]
    done = run_command(torchrun(arguments, 2), environment=clean_environment(os.environ), timeout=120)
    result = parse_result(done.output)
    assert (result["ranks"], result["bytes"]) == (2, [4096, 16777216])
    small, large = result["seconds"]
    assert 0 < small < large


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_the_figure_is_drawn(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    runs = runs_of({1: [100.0, 110.0], 2: [180.0, 190.0], 4: [200.0, 210.0]})
    efficiencies, splits = scaling_runs.find_efficiencies(runs), scaling_runs.find_splits(runs)
    left, right = Figure().subplots(1, 2)
    scaling_figure.draw_efficiencies(left, efficiencies, [1, 2, 4], "one rank", cores=2)
    scaling_figure.draw_splits(right, splits, [1, 2, 4])
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert labels == ["ideal", "limit of 2 cores", "ranks share cores", "weak scaling"]
    assert [round(bar.get_height(), 1) for bar in right.patches] == [1.0, 20.0, 3.0, 0.5] * 3
    path = tmp_path / "scaling.png"
    assert (
        scaling_figure.draw_scaling(efficiencies, splits, path, subtitle="a machine", reference="one rank", cores=2)
        == path
    )
    assert path.read_bytes().startswith(b"\x89PNG")
