"""A real Slurm on this machine: slurmctld and as many slurmd as it has nodes, gone without a trace afterwards.

with start_cluster(Path(tempfile.mkdtemp())) as cluster:
    job = cluster.submit("--nodes=2", "script.sbatch", cwd=folder)
    cluster.wait_for(job, "COMPLETED", timeout=60)
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from tests.servers import port_of, reserve_port
from tests.slurm.configuration import Configuration

SCRIPT = Path(__file__).with_name("cluster.sh")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip")
START_SECONDS = 60.0
CLIENT_SECONDS = 120.0
POLL_SECONDS = 0.1
LOG_CHARACTERS = 2000
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
"""States that Slurm does not requeue a job from."""


def missing_for_slurm() -> str | None:
    """Why there can be no cluster here, and what to do."""
    if os.geteuid() != 0:
        return "a Slurm cluster needs namespaces and devices of its own: run as root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge util-linux iproute2"
    tried = subprocess.run(
        ["unshare", "--mount", "--net", "--uts", "true"], capture_output=True, text=True, check=False
    )
    return f"namespaces are not permitted here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """Nodes n1, n2, ... of two partitions, `low` (the default) and `high`, whose jobs requeue those of `low`."""

    def __init__(self, folder: Path, names: list[str], process: subprocess.Popen[str], output: IO[str]):
        self.folder = folder
        self.names = names
        self.client_prefix: list[str] = []
        """Before each client's command."""
        self._process = process
        self._output = output

    def environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        """For a client: ours without what another Slurm has set, then `env`."""
        foreign = ("SLURM", "SBATCH_", "SQUEUE_", "SINFO_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return kept | {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf")} | dict(env or {})

    def run(
        self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A client's command, such as scancel or srun, as on a login node."""
        done = subprocess.run(
            [*self.client_prefix, *command],
            cwd=cwd,
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CLIENT_SECONDS,
            check=False,
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def submit(self, *sbatch_arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """The job's id. A job runs in `cwd`, with the environment of this process and `env`."""
        return self.run("sbatch", "--parsable", *sbatch_arguments, cwd=cwd, env=env).stdout.strip()

    def field(self, job: str, name: str) -> str:
        """What `scontrol show job` says, also of an array's element (17_2) and up to 300 s after the job's end."""
        description = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        found = re.search(rf"\b{name}=(\S+)", description)
        assert found, f"no {name} in: {description}"
        return found[1]

    def state(self, job: str) -> str:
        """Such as PENDING, RUNNING, COMPLETING, COMPLETED; PENDING, too, while it waits for its next start."""
        return self.field(job, "JobState")

    def exit_code(self, job: str) -> int:
        """As in subprocess: negative if a signal ended it."""
        code, signal = map(int, self.field(job, "ExitCode").split(":"))
        return -signal or code

    def restarts(self, job: str) -> int:
        """How often it was requeued."""
        return int(self.field(job, "Restarts"))

    def wait_for(self, job: str, *states: str, timeout: float) -> str:
        """The first of `states` it is seen in, within `timeout` seconds. Fails at once if the job ended in another."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in states:
            is_over = state in ENDED or time.monotonic() > deadline
            assert not is_over, f"job {job} is {state}, not {' or '.join(states)}\n{self._report(job)}"
            time.sleep(POLL_SECONDS)
        return state

    def job_processes(self, job: str) -> list[psutil.Process]:
        """Those that the job started on all nodes, without Slurm's own."""
        return [process for process in self.processes() if _job_of(process) == job]

    def processes(self) -> list[psutil.Process]:
        """All of this cluster, with their ids outside of it."""
        return list(psutil.Process(self._process.pid).children(recursive=True))

    def node_states(self) -> dict[str, str]:
        """Such as idle, mixed, allocated, completing, down; with a * where the node does not answer."""
        words = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").stdout.split()
        return dict(zip(words[::2], words[1::2], strict=True))

    def cancel_all(self, timeout: float = 60.0) -> None:
        """Returns when nothing runs any more."""
        self.run("scancel", "--user=root")
        poll(lambda: not self.run("squeue", "--noheader").stdout, timeout, lambda: self._report())

    def wait_until_idle(self, *names: str, timeout: float = START_SECONDS) -> None:
        """All nodes, or those named."""
        waited_for = set(names or self.names)
        poll(
            lambda: waited_for <= {name for name, state in self.node_states().items() if state == "idle"},
            timeout,
            lambda: self._report(),
        )

    def fail_node(self, name: str) -> None:
        """End all its processes at once. About 30 s later Slurm calls the node down and requeues its jobs."""
        self._ask("power_off", name)

    def restore_node(self, name: str) -> None:
        """Returns when the node is idle, or has got work again.

        A node that is back before Slurm has called it down may keep its lost jobs RUNNING for a minute, or for ever if
        it was not a job's first node.
        """
        started = time.strftime("%Y-%m-%dT%H:%M:%S")
        self._ask("power_on", name)
        poll(lambda: self._has_registered(name, started), START_SECONDS, lambda: self._report())

    def cut(self, name: str) -> None:
        """Separate networks only: what is sent to the node and by it is lost, and no connection is closed."""
        self._ask("cut", name)

    def heal(self, name: str) -> None:
        """The end of `cut`."""
        self._ask("heal", name)

    def logs(self, *names: str) -> str:
        """The end of each, or of those named, such as slurmctld.log and n1.log."""
        files = sorted((self.folder / "log").glob("*"))
        texts = {file.name: file.read_text(errors="replace") for file in files if not names or file.name in names}
        self._output.seek(0)
        texts[SCRIPT.name] = self._output.read()
        return "\n".join(f"--- {name}\n{text[-LOG_CHARACTERS:]}" for name, text in texts.items() if text)

    def start(self) -> None:
        """Returns when all nodes are idle."""
        self._check_answer("start_controller")
        for name in self.names:
            self._ask("power_on", name)
        try:
            self.wait_until_idle()
        except AssertionError as error:
            raise AssertionError(f"the nodes do not become idle: {error}\n{self.logs()}") from error

    def _has_registered(self, name: str, since: str) -> bool:
        node = self.run("scontrol", "--oneliner", "show", "node", name).stdout
        start = re.search(r"\bSlurmdStartTime=(\S+)", node)
        state = self.node_states()[name]
        return bool(start and start[1] >= since and state in ("idle", "mixed", "allocated"))

    def _ask(self, function: str, name: str) -> None:
        """Of the script in which the nodes live."""
        assert name in self.names and self._process.stdin is not None
        self._process.stdin.write(f"{function} {name}\n")
        self._process.stdin.flush()
        self._check_answer(f"{function} {name}")

    def _check_answer(self, question: str) -> None:
        answers = self._process.stdout
        assert answers is not None
        ready, _, _ = select.select([answers], [], [], START_SECONDS)
        answer = answers.readline().strip() if ready else "no answer"
        assert answer == "0", f"{question}: {answer or 'the cluster has ended'}\n{self.logs()}"

    def _report(self, job: str | None = None) -> str:
        commands = [["sinfo", "--Node", "--long"], ["squeue"], *([["scontrol", "show", "job", job]] if job else [])]
        shown = [self.run(*command, check=False) for command in commands]
        return "\n".join([*(done.stdout + done.stderr for done in shown), self.logs("slurmctld.log")])


@contextmanager
def start_cluster(
    folder: Path,
    nodes: int = 4,
    cpus: int = 8,
    gpus: int = 4,
    first_job_id: int | None = None,
    separate_networks: bool = False,
) -> Iterator[Cluster]:
    """A cluster whose nodes claim so many CPUs and GPUs each. All its files are in `folder`, which goes with it.

    It ends with this block, and by itself when this process is killed.

    With separate networks each node has its own address on a bridge, and reaches nothing but that bridge. Without, all
    are on this machine's loopback.
    """
    with ExitStack() as stack:
        reservations = [stack.enter_context(reserve_port()) for _ in range(nodes + 1)]
        configuration = Configuration(list(map(port_of, reservations)), cpus, gpus, first_job_id, separate_networks)
        configuration.write(folder)
        output = stack.enter_context(tempfile.TemporaryFile("w+"))
        process = _launch(folder, configuration, output)
        stack.callback(_stop, process)
        cluster = Cluster(folder, configuration.nodes, process, output)
        if separate_networks:
            cluster.client_prefix = ["nsenter", "--net", f"--target={process.pid}"]
        cluster.start()
        yield cluster


def poll(is_so: Callable[[], bool], timeout: float, explain: Callable[[], str]) -> None:
    """Until it is so; after `timeout` seconds it fails with an explanation."""
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline, f"not within {timeout} s\n{explain()}"
        time.sleep(POLL_SECONDS)


def _launch(folder: Path, configuration: Configuration, output: IO[str]) -> subprocess.Popen[str]:
    network = ["unshare", "--net"] if configuration.separate_networks else []
    kind = "separate" if configuration.separate_networks else "shared"
    return subprocess.Popen(
        [*network, "bash", str(SCRIPT), str(folder), kind, *configuration.nodes],
        env={name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=output,
        text=True,
        start_new_session=True,
    )


def _stop(process: subprocess.Popen[str]) -> None:
    """Closing its stdin ends the script, the kernel ends the rest; the folder is removed last."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):  # it has ended already
        process.stdin.close()
    process.stdout.close()
    process.wait(START_SECONDS)


def _job_of(process: psutil.Process) -> str | None:
    try:
        environment = process.environ()
        is_slurms = process.name() == "slurmstepd"
    except psutil.Error:  # it has ended
        return None
    if is_slurms or "SLURM_JOB_ID" not in environment:
        return None
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return str(environment["SLURM_JOB_ID"])
