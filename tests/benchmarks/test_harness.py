"""Starting commands, reading what they say, and the statistics of rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import BenchmarkError, Spread

PYTHON = sys.executable


def run_python(code: str, folder: Path, timeout: float = 60) -> harness.Finished:
    return harness.run_command([PYTHON, "-c", code], environment=os.environ, timeout=timeout, folder=folder)


def test_a_spread_is_the_median_between_the_extremes() -> None:
    assert Spread.of([3.0, 1.0, 10.0, 2.0]) == Spread(median=2.5, minimum=1.0, maximum=10.0, count=4)
    assert Spread.of([1234.5, 900.0, 2000.25]).format() == "1,234 (900 to 2,000)"
    assert Spread.of([0.5]).format(".2f") == "0.50"


def test_ratios_are_of_the_same_round_and_not_of_the_medians() -> None:
    slow_then_fast = [100.0, 400.0, 200.0]
    others = [50.0, 200.0, 400.0]
    assert harness.pairwise_ratios(slow_then_fast, others) == [2.0, 2.0, 0.5]
    assert Spread.of(harness.pairwise_ratios(slow_then_fast, others)).median == 2.0  # the medians' would be 1.0


def test_rounds_of_different_length_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="shorter"):
        harness.pairwise_ratios([1.0, 2.0], [1.0])


def test_every_second_round_runs_backwards() -> None:
    names = ["a", "b", "c"]
    assert [harness.alternate(names, index) for index in range(3)] == [names, ["c", "b", "a"], names]
    assert names == ["a", "b", "c"]


def test_a_printed_result_is_found_among_other_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print("epoch 1  loss 0.5")
    harness.print_result({"images_per_second": 12.5})
    print('{"images_per_second": 1}')

    output = capsys.readouterr().out
    assert harness.parse_result(output) == {"images_per_second": 12.5}


@pytest.mark.parametrize(
    ("output", "message"),
    [("nothing\n", "0 result lines"), ("RESULT {}\nRESULT {}\n", "2 result lines"), ('RESULT {"a": 1\n', "no JSON")],
)
def test_anything_but_one_whole_result_line_is_an_error(output: str, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        harness.parse_result(output)


def test_a_result_that_is_not_finite_is_not_printed() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        harness.print_result({"images_per_second": float("inf")})


def test_a_command_gives_its_output_and_its_time(tmp_path: Path) -> None:
    done = run_python("import time; time.sleep(0.3); print('hello')", tmp_path)
    assert done.output == "hello\n"
    assert 0.3 <= done.wall_seconds < 30


def test_the_cpu_of_others_is_what_was_busy_but_not_ours() -> None:
    cores = os.cpu_count() or 1
    before, after = (
        harness.Load(machine=100.0, ours=10.0),
        harness.Load(machine=100.0 + 6 * cores, ours=10.0 + 2 * cores),
    )
    assert after.share_of_others(before, seconds=8.0) == 0.5
    assert after.share_of_others(harness.Load(machine=100.0 + 6 * cores, ours=10.0), seconds=8.0) == 0.0


def test_what_a_command_computes_is_its_own(tmp_path: Path) -> None:
    before = harness.Load.now()
    run_python("import time\nwhile time.process_time() < 0.5: pass", tmp_path)
    assert 0.4 < harness.Load.now().ours - before.ours < 30


def test_a_failing_command_is_an_error_with_the_end_of_what_it_said(tmp_path: Path) -> None:
    code = "import sys; print('first'); print('the cause', file=sys.stderr); sys.exit(3)"
    with pytest.raises(BenchmarkError, match=r"(?s)exit code 3.*first\nthe cause"):
        run_python(code, tmp_path)


def test_a_command_that_hangs_is_asked_to_end_and_what_it_said_is_shown(tmp_path: Path) -> None:
    code = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('asked').touch(), sys.exit(0)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    started = time.monotonic()
    with pytest.raises(BenchmarkError, match=r"(?s)still ran after 2 s.*ready"):
        run_python(code, tmp_path, timeout=2)
    assert time.monotonic() - started < 30
    assert (tmp_path / "asked").exists()


def test_a_command_that_will_not_end_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "TERMINATION_SECONDS", 0.5)
    child = "import time; time.sleep(600)"
    code = (
        "import pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "pathlib.Path('pid').write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(BenchmarkError, match="still ran"):
        run_python(code, tmp_path, timeout=2)
    assert not is_running(int((tmp_path / "pid").read_text()))


def is_running(pid: int) -> bool:
    """A killed process whose parent is gone may stay as a zombie for a while."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_torchrun_starts_the_ranks_that_were_asked_for(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import os; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], flush=True)")
    command = harness.torchrun([str(program)], num_ranks=2)
    done = harness.run_command(command, environment=harness.clean_environment(os.environ), timeout=120, folder=tmp_path)
    assert sorted(done.output.splitlines()) == ["rank 0 of 2", "rank 1 of 2"]


def test_a_clean_environment_has_no_other_launcher_in_it() -> None:
    environment = {"PATH": "/bin", "RANK": "3", "TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "8", "SLURM_JOB_ID": "1"}
    assert harness.clean_environment(environment) == {"PATH": "/bin"}
    assert harness.clean_environment(environment, 4) == {"PATH": "/bin", "OMP_NUM_THREADS": "4"}


def test_results_are_stored_for_programs_and_for_people(tmp_path: Path) -> None:
    base = tmp_path / "results" / "peers_1.15"
    table = harness.markdown_table(["program", "images/s"], [["convoy", "10"]])
    data, text = harness.write_results(base, {"a": [1.5]}, table)
    assert data.name == "peers_1.15.json"
    assert json.loads(data.read_text()) == {"a": [1.5]}
    assert text.read_text() == "| program | images/s |\n| --- | ---: |\n| convoy | 10 |\n"


def test_the_machine_is_described_in_one_line() -> None:
    machine = harness.describe_machine()
    line = harness.format_machine(machine)
    assert "\n" not in line
    assert machine["torch"] in line
    assert machine["cores"] == len(os.sched_getaffinity(0))
