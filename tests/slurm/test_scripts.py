"""The batch script without a cluster: it is run as it is, with small stand-ins for Slurm's commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "train.sbatch"
SCRIPTS = pytest.mark.parametrize("script", sorted((ROOT / "slurm").iterdir()), ids=lambda path: path.name)
TRAINS = "--nodes=1 --ntasks-per-node=1 --requeue --open-mode=append --signal=B:USR1@120 --output=/dev/null"
DIRECTIVES = {
    "train": f"--job-name=convoy {TRAINS}",
    "sweep": f"--job-name=convoy-sweep {TRAINS}",
    "scaling": "--job-name=convoy-scaling --nodes=1 --ntasks-per-node=1 --no-requeue --output=/dev/null",
    "sync": "--job-name=convoy-sync --nodes=1 --ntasks=1 --time=1:00:00 --output=/dev/null",
}

PYTHON = """#!/bin/bash
[[ $1 == -c && $2 == *json* ]] && exec python3 "$@" # reads the last line of the dry run
if [[ $1 == -c ]]; then  # how many ranks: the GPUs that torch sees, else the CPUs granted
    ((FAKE_GPUS)) && echo "$FAKE_GPUS" || echo "$3"
    exit "${FAKE_TORCH_CODE:-0}"
fi
env > dry_run_environment
echo "network: many lines"
printf '{"run_folder": "%s"}\\n' "$PWD/runs/it"
exit "${FAKE_DRY_RUN_CODE:-0}"
"""
SRUN = """#!/bin/bash
printf '%s\\0' "$@" > srun_arguments
mkdir -p runs/it
printf '%s' "$FAKE_STATUS" > runs/it/status.json
exit "${FAKE_SRUN_CODE:-0}"
"""
SCONTROL = """#!/bin/bash
case $1 in
    --oneliner) echo "JobId=$SLURM_JOB_ID $FAKE_JOB Restarts=${SLURM_RESTART_COUNT:-0} BatchFlag=1" ;;
    show) printf '%s\\n' localhost second ;;
    requeue) echo "$2" >> requeued ;;
esac
"""
STEP = """#!/bin/bash
while [[ $1 != bash ]]; do shift; done
exec "$@"
"""


class Job:
    """What Slurm would give a job of one node; `environment` can be changed before `run`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.commands = folder / "bin"
        self.commands.mkdir()
        for name, text in (("python", PYTHON), ("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", "#!/bin/bash\n")):
            self.stand_in(name, text)
        self.environment = {
            "PATH": f"{self.commands}:/usr/bin:/bin",
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_CPUS_ON_NODE": "6",
            "SLURM_SUBMIT_DIR": str(folder),
            "CONVOY_ROOT": str(ROOT),
        }

    def stand_in(self, name: str, text: str) -> None:
        (self.commands / name).write_text(text)
        (self.commands / name).chmod(0o755)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """As Slurm starts it: a copy, in the folder of sbatch, with the output that #SBATCH names."""
        copy = self.folder / "slurm_script"
        shutil.copy(SCRIPT, copy)
        command = ["/bin/bash", str(copy), *arguments]
        null = subprocess.DEVNULL
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdin=null, stdout=null, stderr=null)

    def run(self, *arguments: str) -> int:
        return self.start(*arguments).wait(timeout=60)

    def log(self, job: str = "17") -> str:
        return (self.folder / "logs" / f"slurm-{job}.log").read_text()

    def srun(self) -> list[str]:
        """srun's arguments; empty if it was not called."""
        file = self.folder / "srun_arguments"
        return file.read_text().split("\0")[:-1] if file.exists() else []

    def requeued(self) -> list[str]:
        file = self.folder / "requeued"
        return file.read_text().split() if file.exists() else []

    def leaves(self, state: str, launch_id: str = "17-0") -> None:
        """What the ranks write into status.json before srun ends."""
        self.environment["FAKE_STATUS"] = json.dumps({"launch_id": launch_id, "state": state}, indent=1)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@SCRIPTS
def test_bash_reads_it(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@SCRIPTS
def test_shellcheck_finds_nothing(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    command = ["shellcheck", "--shell=bash", "--external-sources", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@SCRIPTS
def test_every_path_in_it_exists(script: Path) -> None:
    paths = set(re.findall(r"\b(?:train|pipeline|configs|slurm|tests|docs)/[\w./-]*\w", script.read_text()))
    assert paths
    optional = {"slurm/site.env"}
    assert sorted(path for path in paths - optional if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("name", DIRECTIVES)
def test_slurm_reads_the_options_that_are_meant(name: str) -> None:
    lines = (ROOT / "slurm" / f"{name}.sbatch").read_text().splitlines()
    code = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    read = [line.removeprefix("#SBATCH ") for line in lines[:code] if line.startswith("#SBATCH ")]
    meant = [line for line in lines if re.match(r"\s*#+\s*SBATCH\b", line)]
    assert len(read) == len(meant), "`# SBATCH`, `##SBATCH` and what stands behind the first command are comments"
    assert " ".join(read) == DIRECTIVES[name], (
        "if this is meant, try it on a Slurm, then change DIRECTIVES in this file"
    )


def test_every_argument_arrives_whole(job: Job) -> None:
    arguments = (
        "tracking.experiment=my exp",
        """run.name="it's" $HOME * \\ `x`""",
        "",
        "--config",
        "a b.yaml",
        "two\nlines",
    )
    assert job.run(*arguments) == 0
    assert job.srun()[-len(arguments) - 1 :] == [str(ROOT / "train" / "main.py"), *arguments]


def test_one_torchrun_on_each_node(job: Job) -> None:
    assert job.run() == 0
    expected = ["--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "torchrun", "--nnodes=2"]
    assert [argument for argument in job.srun() if argument in expected] == expected


def test_jobs_and_restarts_do_not_meet(job: Job) -> None:
    meetings = []
    for job_id, restart in (("14500", None), ("14500", "1"), ("14501", None)):
        job.environment["SLURM_JOB_ID"] = job_id
        if restart:
            job.environment["SLURM_RESTART_COUNT"] = restart
        assert job.run() == 0
        meetings.append([a.partition("=")[2] for a in job.srun() if a.startswith(("--rdzv-endpoint", "--rdzv-id"))])
        job.environment.pop("SLURM_RESTART_COUNT", None)
    assert meetings == [["localhost:19500", "14500-0"], ["localhost:19500", "14500-1"], ["localhost:19501", "14501-0"]]
    assert "29500" not in SCRIPT.read_text()


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [({}, 6), ({"FAKE_GPUS": "4"}, 4), ({"FAKE_GPUS": "4", "CONVOY_RANKS_PER_NODE": "3"}, 3)],
    ids=["cpus granted", "gpus that torch sees", "set"],
)
def test_ranks_per_node(job: Job, environment: dict[str, str], ranks: int) -> None:
    job.environment |= environment
    assert job.run() == 0
    assert f"--nproc-per-node={ranks}" in job.srun()
    assert f"WORLD_SIZE={2 * ranks}\n" in (job.folder / "dry_run_environment").read_text()


@pytest.mark.parametrize("code", [1, 2])
def test_a_wrong_config_ends_the_job_with_its_code_before_any_rank(job: Job, code: int) -> None:
    job.environment["FAKE_DRY_RUN_CODE"] = str(code)
    job.leaves("preempted")
    assert job.run() == code
    assert (job.srun(), job.requeued()) == ([], [])


def test_a_python_without_torch_ends_the_job(job: Job) -> None:
    job.environment["FAKE_TORCH_CODE"] = "1"
    assert job.run() == 1
    assert job.srun() == []


@pytest.mark.parametrize(
    ("state", "launch_id", "srun_code", "requeued"),
    [
        ("preempted", "17-0", 1, True),  # torchrun got a TERM, the ranks saved: preemption with a grace time
        ("preempted", "17-0", 0, False),  # nobody warned this script: the training itself was asked to stop
        ("preempted", "16-3", 1, False),  # left by another launch; this one failed before it trained
        ("finished", "17-0", 0, False),
        ("failed", "17-0", 1, False),
        ("running", "17-0", 137, False),
    ],
)
def test_requeued_if_it_stopped_early_and_saved(
    job: Job, state: str, launch_id: str, srun_code: int, requeued: bool
) -> None:
    job.leaves(state, launch_id)
    job.environment["FAKE_SRUN_CODE"] = str(srun_code)
    assert job.run() == (0 if requeued else srun_code)
    assert job.requeued() == (["17"] if requeued else [])


def test_an_end_to_requeueing(job: Job) -> None:
    job.environment |= {"SLURM_RESTART_COUNT": "3", "CONVOY_MAX_RESTARTS": "3"}
    job.leaves("preempted", "17-3")
    job.environment["FAKE_SRUN_CODE"] = "1"
    assert job.run() == 1
    assert job.requeued() == []
    assert "CONVOY_MAX_RESTARTS" in job.log()


def test_the_last_element_of_an_array_requeues_itself_and_not_the_array(job: Job) -> None:
    job.environment |= {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2", "FAKE_JOB": "ArrayTaskId=2"}
    job.leaves("preempted", "17_2-0")
    job.environment["FAKE_SRUN_CODE"] = "1"
    assert job.run() == 0
    assert job.requeued() == ["17_2"]
    assert "requeueing job 17_2" in job.log("17_2")
    assert "CONVOY_RUN_NAME=slurm-17_2\n" in (job.folder / "dry_run_environment").read_text()


def test_what_a_job_inherits_of_the_job_that_submitted_it_is_not_its_own(job: Job) -> None:
    job.environment |= {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "2", "job": "mine", "warned": "1"}
    job.leaves("preempted")
    job.environment["FAKE_SRUN_CODE"] = "1"
    assert job.run() == 0
    assert job.requeued() == ["17"]
    assert "job 17, restart 0" in job.log("17")
    assert "warned" not in job.log("17")


def test_a_folder_without_the_program_is_named(job: Job) -> None:
    del job.environment["CONVOY_ROOT"]
    assert job.run() == 1
    assert f"no slurm/common.sh in {job.folder}" in job.log()
    assert "CONVOY_ROOT" in job.log()


def test_site_env_comes_before_python_is_needed(job: Job) -> None:
    checkout = job.folder / "a checkout"
    (checkout / "slurm").mkdir(parents=True)
    shutil.copy(ROOT / "slurm" / "common.sh", checkout / "slurm")
    job.environment |= {"CONVOY_ROOT": "a checkout", "PATH": "/usr/bin:/bin"}
    assert job.run() == 1
    assert "no torchrun on PATH" in job.log()
    (checkout / "slurm" / "site.env").write_text(f'echo "$unset_as_modules_do"; PATH={job.commands}:$PATH\n')
    assert job.run() == 0
    assert job.srun()[-1] == str(checkout / "train" / "main.py")


def test_a_container_is_put_before_all_that_needs_python(job: Job) -> None:
    checkout = job.folder / "checkout"
    (checkout / "slurm").mkdir(parents=True)
    shutil.copy(ROOT / "slurm" / "common.sh", checkout / "slurm")
    (checkout / "slurm" / "site.env").write_text('container=(enter --bind "/a b")\n')
    job.stand_in("enter", '#!/bin/bash\necho "$3" >> entered\nexec "${@:3}"\n')
    job.environment["CONVOY_ROOT"] = str(checkout)
    assert job.run() == 0
    assert (job.folder / "entered").read_text().split() == ["python"] * 3
    assert job.srun()[job.srun().index("torchrun") - 3 :][:4] == ["enter", "--bind", "/a b", "torchrun"]


@pytest.fixture
def real_job(job: Job) -> Job:
    """All real but Slurm: torchrun and two ranks."""
    job.stand_in("python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    job.stand_in("torchrun", f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    job.stand_in("srun", STEP)
    job.environment |= {
        "SLURM_JOB_ID": str(os.getpid()),  # the port follows from it
        "SLURM_NNODES": "1",
        "CONVOY_RANKS_PER_NODE": "2",
    }
    return job


def test_a_warned_job_saves_and_requeues_itself_with_real_ranks(real_job: Job) -> None:
    name = real_job.environment["SLURM_JOB_ID"]
    arguments = ("train.epochs=50", "train.threads=1", "tracking.enabled=false", "run.dir=my runs")
    script = real_job.start(*arguments)
    log = real_job.folder / "logs" / f"slurm-{name}.log"
    try:
        deadline = time.monotonic() + 120
        while not (log.exists() and "rendezvous" in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        script.send_signal(signal.SIGUSR1)  # long before the ranks listen: it must not be lost
        assert script.wait(timeout=120) == 0, log.read_text()
    finally:
        script.kill()
    status = json.loads((real_job.folder / "my runs" / f"slurm-{name}" / "status.json").read_text())
    assert (status["state"], status["launch_id"]) == ("preempted", f"{name}-0")
    assert status["global_step"] > 0
    assert real_job.requeued() == [name]
    assert log.read_text().count("asking the ranks to save") == 1
    assert list(log.parent.iterdir()) == [log]  # nothing is left of the request
