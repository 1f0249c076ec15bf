"""What is started on the nodes of a Slurm job, seen by stand-ins for Slurm's commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.harness import ROOT
from benchmarks.launching import SlurmNodes
from tests.benchmarks.test_scaling import options_of, runs_of

SRUN = """#!/bin/bash
echo "RANK ${RANK:-unset}"
echo "world $CONVOY_WORLD_SIZE of job $SLURM_JOB_ID"
printf '%s\\n' "$@"
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Of six nodes with two ranks each."""
    for name, text in (("scontrol", "#!/bin/bash\nprintf '%s\\n' n1 n2 n3 n4 n5 n6\n"), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name, value in (("PATH", f"{tmp_path}:/usr/bin:/bin"), ("SLURM_JOB_ID", "14501"), ("RANK", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-6]")
    return monkeypatch


def nodes_of(scratch: Path, *container: str) -> SlurmNodes:
    return SlurmNodes.of_this_job(2, num_gpus=None, container=container, scratch=scratch)


def test_all_nodes_are_among_the_cases_and_a_whole_one_is_the_fewest(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = options_of("--ranks-per-node=2", f"--out={tmp_path}/scaling", "--modes", "weak")
    assert [case.ranks for case in options.cases] == [2, 4, 8, 12]
    assert options.launcher.scratch == tmp_path


def test_a_torchrun_on_each_of_the_first_nodes(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = nodes_of(tmp_path, "apptainer", "exec", "a b.sif").command(["main.py", "a=1"], 4)
    split = command.index("apptainer")
    assert command[0] == "srun"
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n1,n2"} <= set(command[:split])
    assert command[split : split + 6] == ["apptainer", "exec", "a b.sif", sys.executable, "-m", "torch.distributed.run"]
    assert {"--nnodes=2", "--nproc-per-node=2", "--rdzv-endpoint=n1:19501"} <= set(command[split:])
    assert command[-2:] == ["main.py", "a=1"]


def test_two_runs_of_a_job_cannot_meet(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nodes = nodes_of(tmp_path)
    ids = [argument for _ in range(2) for argument in nodes.command([], 2) if argument.startswith("--rdzv-id=")]
    assert len(set(ids)) == 2


def test_srun_is_told_of_the_job_but_not_of_another_launcher(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = nodes_of(tmp_path).run(["main.py"], 6, timeout=60).output.splitlines()
    assert lines[:2] == ["RANK unset", "world 6 of job 14501"]
    assert {f"--chdir={ROOT}", "--nodelist=n1,n2,n3", "main.py"} <= set(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "4", "8"], "2 has to be among them"),
        (["--ranks", "2", "3"], "multiple of --ranks-per-node 2"),
        (["--ranks", "2", "14"], "the job has 6 node(s)"),
        (["--device=cuda"], "torch sees 1 GPU(s)"),
        (["--global-batch=32"], "divisible"),
    ],
)
def test_what_the_nodes_do_not_allow_is_refused(
    arguments: Sequence[str], message: str, job: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SystemExit):
        options_of("--ranks-per-node=2", f"--out={tmp_path}/scaling", *arguments)
    assert message in capsys.readouterr().err


def test_outside_of_a_job_it_is_said_what_is_missing(
    job: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.delenv("SLURM_JOB_ID")
    (tmp_path / "srun").unlink()
    job.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        options_of("--ranks-per-node=2", f"--out={tmp_path}/scaling")
    assert "no SLURM_JOB_ID, srun" in capsys.readouterr().err


def test_the_report_says_what_the_reference_is(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = runs_of({2: [100.0, 200.0], 4: [150.0, 300.0], 12: [300.0, 600.0]})
    out = tmp_path / "scaling"
    scaling.write_report(replace(options_of("--rounds=2"), launcher=nodes_of(tmp_path), out=out), runs)
    text = (tmp_path / "scaling.md").read_text()
    assert "over that on one node (2 ranks)" in text
    assert "6 node(s) with 2 rank(s) each, the first: " in text
    rows = [line.split(" | ") for line in text.splitlines() if " node" in line and line.startswith("|")]
    assert [(row[0], row[3]) for row in rows] == [
        ("| 2 on 1 node", "100% (100% to 100%)"),
        ("| 4 on 2 nodes", "75% (75% to 75%)"),
        ("| 12 on 6 nodes", "50% (50% to 50%)"),
    ]
    assert "sharing" not in text and "No prediction" in text
