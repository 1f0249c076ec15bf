"""What a node does while it trains: sampled beside the training, by a process that nothing stops but its end."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest

from pipeline.base.signals import SIGNALS
from pipeline.checks import find_problems
from pipeline.commands import monitor as monitor_command
from pipeline.config import CommandLine, ConfigError, load_config
from pipeline.run import node_metrics as system
from pipeline.run.journal import clean_name
from pipeline.run.node_metrics import MIB, Rates, SystemMonitor, host_name
from train.attempt.sidecars import MonitorProcess

ROOT = Path(__file__).parents[2]
HOST = host_name()
OF_EVERY_NODE = {"cpu_utilization_percentage", "memory_usage_mib", "memory_usage_percentage", "disk_usage_percentage"}
TRAFFIC = {
    *("disk_read_mib_per_second", "disk_write_mib_per_second"),
    *("network_receive_mib_per_second", "network_transmit_mib_per_second"),
}

Samples = dict[int, dict[str, float]]
"""Number of the sample -> name -> value."""


def read_samples(folder: Path, host: str = HOST) -> Samples:
    """Read without the reader under test; no name may have two values in one sample, and no line be broken."""
    path = folder / "system" / f"{host}.jsonl"
    lines = path.read_bytes().decode().split("\n") if path.exists() else [""]
    assert lines.pop() == ""
    samples: Samples = {}
    for line in lines:
        record = json.loads(line)
        prefix, _, name = record["key"].rpartition("/")
        assert (record["v"], record["kind"], prefix) == (2, "metric", f"system/{host}")
        assert name not in samples.setdefault(record["step"], {})
        samples[record["step"]][name] = record["value"]
    return samples


def wait_until(condition: Callable[[], Any], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.02)


def num_samples(folder: Path) -> int:
    """Also while a line is being written."""
    path = folder / "system" / f"{HOST}.jsonl"
    return path.read_bytes().count(b'/cpu_utilization_percentage"') if path.exists() else 0


def popen(process: MonitorProcess) -> subprocess.Popen[bytes]:
    assert process._process is not None
    return process._process


def is_gone(pid: int) -> bool:
    """Or dead, with a parent that does not ask: who inherits the orphans in a container may not."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(autouse=True)
def _warnings_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("convoy"), "propagate", True)


@pytest.fixture
def no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails


# the process


@pytest.fixture
def process(tmp_path: Path) -> Iterator[MonitorProcess]:
    process = MonitorProcess(tmp_path, 0.1)
    yield process
    process.close()


def test_a_process_samples_this_node_until_it_is_closed(tmp_path: Path, process: MonitorProcess) -> None:
    pid = popen(process).pid
    wait_until(lambda: num_samples(tmp_path) >= 3)
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19)
    assert os.getsid(pid) == pid
    process.close()
    assert is_gone(pid)
    samples = read_samples(tmp_path)
    assert list(samples) == list(range(len(samples)))
    total = psutil.virtual_memory().total / MIB
    for sample in samples.values():
        assert sample.keys() >= OF_EVERY_NODE
        assert {name for name in sample if not name.startswith("gpu_")} <= OF_EVERY_NODE | TRAFFIC
        assert all(0 <= value <= 100 for name, value in sample.items() if name.endswith("_percentage"))
        assert sample["memory_usage_mib"] == pytest.approx(sample["memory_usage_percentage"] / 100 * total, rel=1e-3)
        assert all(sample[name] >= 0 for name in sample)
    assert "Traceback" not in (tmp_path / "system" / f"{HOST}.log").read_text()


def test_a_resumed_run_goes_on_behind_the_last_sample_and_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    monitor = SystemMonitor(tmp_path, HOST)
    for _ in range(3):
        monitor.sample()
    monitor.close()
    path = tmp_path / "system" / f"{HOST}.jsonl"
    before = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"v":2,"kind":"metric","key":"system/')
    resumed = SystemMonitor(tmp_path, HOST)
    resumed.sample()
    resumed.close()
    assert list(read_samples(tmp_path)) == [0, 1, 2, 3]
    process = MonitorProcess(tmp_path, 0.1)
    wait_until(lambda: num_samples(tmp_path) >= 5)
    process.close()
    assert path.read_bytes().startswith(before)
    samples = read_samples(tmp_path)
    assert list(samples) == list(range(len(samples)))
    assert samples[3].keys() >= OF_EVERY_NODE


def test_signals_to_a_job_do_not_stop_the_samples_and_closing_does(tmp_path: Path, process: MonitorProcess) -> None:
    pid = popen(process).pid
    for number in SIGNALS:
        os.kill(pid, number)  # it has not even started
    wait_until(lambda: num_samples(tmp_path) >= 2)
    for number in SIGNALS:
        os.kill(pid, number)
    all_of_them = sum(1 << (number - 1) for number in SIGNALS)
    status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert int(status["SigIgn"], 16) & all_of_them == all_of_them
    assert int(status["SigBlk"], 16) & all_of_them == 0
    count = num_samples(tmp_path)
    wait_until(lambda: num_samples(tmp_path) >= count + 2)
    process.close()
    assert popen(process).returncode == 0
    process.close()  # once more does nothing


def test_the_end_of_its_input_ends_it(tmp_path: Path, process: MonitorProcess) -> None:
    wait_until(lambda: num_samples(tmp_path) >= 1)
    monitor = popen(process)
    assert monitor.stdin is not None
    monitor.stdin.close()
    assert monitor.wait(2.0) == 0


@pytest.mark.parametrize("when", ["sampling", "starting", "worker"])
def test_it_ends_soon_after_its_parent_was_killed(tmp_path: Path, when: str) -> None:
    """Also at its very start, and while a forked child of the parent holds the other end of its input."""
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from train.attempt.sidecars import MonitorProcess\n"
        "process = MonitorProcess(Path(sys.argv[1]), 0.1)\n"
        "print(process._process.pid, flush=True)\n"
        f"{'os.fork()' if when == 'worker' else ''}\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as parent:
        try:
            assert parent.stdout is not None
            monitor = int(parent.stdout.readline())
            if when != "starting":
                wait_until(lambda: num_samples(tmp_path) >= 1)
            parent.kill()
            parent.wait()
            wait_until(lambda: is_gone(monitor), timeout=10.0 if when == "starting" else 3.0)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)
    count = len(read_samples(tmp_path))
    time.sleep(0.3)
    assert len(read_samples(tmp_path)) == count


def test_a_forked_worker_that_holds_its_input_open_does_not_keep_it_from_being_closed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from train.attempt.sidecars import MonitorProcess\n"
        "process = MonitorProcess(Path(sys.argv[1]), 0.1)\n"
        "worker = os.fork() or time.sleep(60)\n"
        "process.close(timeout=30.0)\n"
        "os.kill(worker, 9)\n"
        "sys.exit(process._process.returncode)\n"
    )
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=60).returncode == 0
    assert time.monotonic() - began < 20.0


def test_one_that_does_not_end_is_killed(tmp_path: Path) -> None:
    process = MonitorProcess(tmp_path, 0.1)
    os.kill(popen(process).pid, signal.SIGSTOP)
    process.close(timeout=0.1)
    assert popen(process).returncode == -signal.SIGKILL


def test_a_run_folder_that_this_node_does_not_see_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = MonitorProcess(tmp_path / "elsewhere", 0.1)
    process.close()
    assert f"the system metrics of {HOST} are not recorded" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_process_imports_nothing_of_the_training(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from pipeline.__main__ import main\n"
        "assert main(['monitor', sys.argv[1], '--follow', str(os.getppid())]) == 0\n"
        "assert 'psutil' in sys.modules\n"
        "assert not {'torch', 'mlflow', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["node-1.cluster", "../etc/passwd", "..", "", "a/b", "näher=@[1]", "x" * 300])
def test_a_host_has_a_name_that_mlflow_takes_and_that_is_one_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: name)
    host = host_name()
    assert clean_name(f"system/{host}/cpu") == f"system/{host}/cpu"
    assert Path(f"system/{host}.jsonl").resolve().parent == Path("system").resolve()
    assert 1 <= len(host) <= 64


@pytest.mark.parametrize(("text", "is_accepted"), [("0", True), ("0.1", True), ("0.01", False), ("-1", False)])
def test_the_time_between_samples_is_nothing_or_not_too_short(text: str, is_accepted: bool) -> None:
    command = CommandLine(ROOT / "configs" / "default.yaml", (f"tracking.system_every={text}",), dry_run=False)
    if is_accepted:
        assert load_config(command, [find_problems]).tracking.system_every == float(text)
        return
    with pytest.raises(ConfigError) as caught:
        load_config(command, [find_problems])
    assert [problem.keys for problem in caught.value.problems] == [("tracking.system_every",)]


# how it ends


@pytest.mark.parametrize(("seconds", "count"), [(0.9, 0), (1.1, 1)])
def test_a_run_shorter_than_the_time_between_samples_has_one_unless_that_would_be_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, count: int, no_nvml: None
) -> None:
    now = fake_clock(monkeypatch)

    def wait_for_end(parent: int, at_most: float) -> bool:
        assert (parent, at_most) == (1, 60.0)
        now[0] += seconds
        return True

    monkeypatch.setattr(monitor_command, "wait_for_end", wait_for_end)
    monitor_command.follow(SystemMonitor(tmp_path, HOST), 1, 60.0)
    assert len(read_samples(tmp_path)) == count


def fake_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    for module in (system, monitor_command):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


# what is read


def test_a_rate_is_what_was_counted_since_the_reading_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = fake_clock(monkeypatch)
    counted = {"sda": (10 * MIB, 0), "sdb": (0, 0)}
    rates = Rates(lambda: dict(counted), ("in", "out"))
    assert rates() == {}
    counted |= {"sda": (13 * MIB, 5 * MIB), "sdb": (1 * MIB, 0)}
    now[0] += 2.0
    assert rates() == {"in": 2.0, "out": 2.5}
    counted["sdc"] = (10**15, 10**15)  # plugged in: what it had counted before is nothing that happened now
    now[0] += 1.0
    assert rates() == {"in": 0.0, "out": 0.0}
    del counted["sda"]
    counted["sdc"] = (10**15 + MIB, 10**15)
    now[0] += 0.5
    assert rates() == {"in": 2.0, "out": 0.0}


def test_traffic_is_counted_once_and_not_that_within_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def nic(count: int) -> SimpleNamespace:
        return SimpleNamespace(bytes_recv=count, bytes_sent=count + 1)

    def disk(count: int) -> SimpleNamespace:
        return SimpleNamespace(read_bytes=count, write_bytes=count + 1)

    monkeypatch.setattr(system, "is_hardware", lambda folder, name: name in ("eth0", "nvme0n1"))
    interfaces = {"lo": nic(1), "eth0": nic(10), "bond0": nic(10)}
    monkeypatch.setattr(psutil, "net_io_counters", lambda pernic: dict(interfaces))
    disks = {"nvme0n1": disk(10), "nvme0n1p1": disk(7), "dm-0": disk(7), "loop0": disk(1)}
    monkeypatch.setattr(psutil, "disk_io_counters", lambda perdisk: disks)
    assert system.count_network_bytes() == {"eth0": (10, 11)}
    assert system.count_disk_bytes() == {"nvme0n1": (10, 11)}
    del interfaces["eth0"]  # a container
    assert system.count_network_bytes() == {"bond0": (10, 11)}


def test_counters_of_this_machine_are_those_of_the_kernel() -> None:
    for name, (received, _) in system.count_network_bytes().items():
        assert name != "lo"
        assert 0 <= int(Path(f"/sys/class/net/{name}/statistics/rx_bytes").read_text()) - received < 100 * MIB
    for name, (read, _) in system.count_disk_bytes().items():
        sectors = int(Path(f"/sys/block/{name}/stat").read_text().split()[2])
        assert 0 <= 512 * sectors - read < 1000 * MIB


class FakeNvml(ModuleType):
    """A node of two GPUs; `failing` names the queries that raise, as (name of the function, index of the GPU)."""

    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.failing: set[tuple[str, int]] = set()

    def nvmlInit(self) -> None:
        if ("nvmlInit", 0) in self.failing:
            raise RuntimeError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        return self._answer("nvmlDeviceGetHandleByIndex", index, index)

    def nvmlDeviceGetUtilizationRates(self, gpu: int) -> Any:
        return self._answer("nvmlDeviceGetUtilizationRates", gpu, SimpleNamespace(gpu=90 + gpu, memory=5))

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> Any:
        memory = SimpleNamespace(used=(20 + gpu) * 2**30, total=80 * 2**30, free=0)
        return self._answer("nvmlDeviceGetMemoryInfo", gpu, memory)

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> Any:
        return self._answer("nvmlDeviceGetPowerUsage", gpu, 350_500 + gpu)

    def nvmlDeviceGetTemperature(self, gpu: int, sensor: int) -> Any:
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self._answer("nvmlDeviceGetTemperature", gpu, 60 + gpu)

    def _answer(self, query: str, gpu: int, answer: Any) -> Any:
        if (query, gpu) in self.failing:
            raise RuntimeError("Not Supported")
        return answer


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def gpu_values(sample: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in sample.items() if name.startswith("gpu_")}


def test_every_gpu_of_the_node_has_its_metrics(tmp_path: Path, nvml: FakeNvml) -> None:
    monitor = SystemMonitor(tmp_path, HOST)
    monitor.sample()
    assert gpu_values(read_samples(tmp_path)[0]) == {
        "gpu_0_utilization_percentage": 90,
        "gpu_0_memory_usage_mib": 20 * 1024,
        "gpu_0_memory_usage_percentage": 25,
        "gpu_0_power_usage_watts": 350.5,
        "gpu_0_temperature_celsius": 60,
        "gpu_1_utilization_percentage": 91,
        "gpu_1_memory_usage_mib": 21 * 1024,
        "gpu_1_memory_usage_percentage": 26.25,
        "gpu_1_power_usage_watts": 350.501,
        "gpu_1_temperature_celsius": 61,
    }


def test_a_query_that_fails_stops_no_other_and_no_later_one(
    tmp_path: Path, nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = SystemMonitor(tmp_path, HOST)
    monitor.sample()
    nvml.failing = {("nvmlDeviceGetPowerUsage", 0), ("nvmlDeviceGetHandleByIndex", 1)}
    monitor.sample()
    monitor.sample()
    nvml.failing = set()
    monitor.sample()
    samples = [set(gpu_values(sample)) for sample in read_samples(tmp_path).values()]
    left = {"gpu_0_utilization_percentage", "gpu_0_memory_usage_mib", "gpu_0_memory_usage_percentage"}
    assert samples == [samples[0], left | {"gpu_0_temperature_celsius"}, samples[1], samples[0]]
    assert len(samples[0]) == 10
    assert caplog.text.count("power of GPU 0 cannot be read: RuntimeError: Not Supported") == 1
    assert caplog.text.count("of GPU 1 cannot be read") == 4  # once for each quantity


@pytest.mark.parametrize("why", ["no package", "no driver"])
def test_without_gpu_the_rest_is_sampled(tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml()
    fake.failing = {("nvmlInit", 0)}
    monkeypatch.setitem(sys.modules, "pynvml", fake if why == "no driver" else None)
    SystemMonitor(tmp_path, HOST).sample()
    sample = read_samples(tmp_path)[0]
    assert gpu_values(sample) == {}
    assert sample.keys() >= OF_EVERY_NODE


@pytest.mark.parametrize("function", ["cpu_percent", "virtual_memory", "disk_usage", "disk_io_counters"])
def test_a_reading_that_fails_stops_no_other(
    tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, no_nvml: None
) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise OSError("gone")

    monitor = SystemMonitor(tmp_path, HOST)
    monitor.sample()
    with monkeypatch.context() as patch:
        patch.setattr(psutil, function, fail)
        monitor.sample()
        monitor.sample()
    monitor.sample()
    whole, first, second, again = (set(sample) for sample in read_samples(tmp_path).values())
    assert first == second
    assert 1 <= len(whole - first) <= 2
    assert again == whole
    assert caplog.text.count("cannot be read: OSError: gone") == 1


# where it is written


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes: what a full disk looks like to who writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 50, 400])
def test_a_full_disk_costs_the_samples_of_its_time_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, room: int, no_nvml: None
) -> None:
    monitor = SystemMonitor(tmp_path, HOST)
    monitor.sample()
    path = tmp_path / "system" / f"{HOST}.jsonl"
    before = path.read_bytes()
    with file_size_limit(len(before) + room):
        monitor.sample()
        monitor.sample()
    monitor.sample()
    assert path.read_bytes().startswith(before)
    samples = read_samples(tmp_path)
    assert list(samples) == list(range(len(samples)))
    assert set(samples[len(samples) - 1]) == set(samples[0])
    assert caplog.text.count("the samples cannot be written") == 1


def test_a_folder_that_cannot_be_written_is_said_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_its_place = tmp_path / "system"
    in_its_place.write_text("a file")
    monitor = SystemMonitor(tmp_path, HOST)
    monitor.sample()
    monitor.sample()
    assert caplog.text.count("the samples cannot be written") == 1
    in_its_place.unlink()
    monitor.sample()
    assert list(read_samples(tmp_path)) == [0]


def test_of_two_monitors_of_one_node_one_writes_and_the_other_takes_over(tmp_path: Path) -> None:
    first, second = SystemMonitor(tmp_path, HOST), SystemMonitor(tmp_path, HOST)
    for monitor in (first, second, second, first):
        monitor.sample()
    assert list(read_samples(tmp_path)) == [0, 1]
    other = SystemMonitor(tmp_path, "other")
    other.sample()
    first.close()
    second.sample()
    assert list(read_samples(tmp_path)) == [0, 1, 2]
    assert list(read_samples(tmp_path, "other")) == [0]


def test_a_sample_is_one_line_a_metric_with_one_time(tmp_path: Path, no_nvml: None) -> None:
    before = time.time_ns() // 1_000_000
    SystemMonitor(tmp_path, HOST).sample()
    records = [json.loads(line) for line in (tmp_path / "system" / f"{HOST}.jsonl").read_text().splitlines()]
    assert {frozenset(record) for record in records} == {
        frozenset({"v", "kind", "key", "value", "step", "timestamp_ms"})
    }
    assert Counter(record["timestamp_ms"] for record in records) == {records[0]["timestamp_ms"]: len(records)}
    assert before <= records[0]["timestamp_ms"] <= time.time_ns() // 1_000_000
