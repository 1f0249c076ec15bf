"""The metrics of a node while it trains: its processors, memory, disks, network and GPUs.

Each node has a journal of them, system/<host>.jsonl of the run folder: keys are `system/<host>/<name>`, the step is the
number of the sample. Imports neither torch nor mlflow, so that the monitor is a small process.
"""

import fcntl
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import psutil

from pipeline.base.logs import logger
from pipeline.run.journal import Journal, clean_name

MIB = 2**20

Values = dict[str, float]
Reading = Callable[[], Values]


class SystemMonitor:
    """Appends samples of this node to its file. Never raises: a failure is logged once, and the rest goes on.

    Of several monitors of one host and run folder (two launchers on a machine, or one that has not noticed yet that its
    training died) one writes, and another takes over when that has ended: else a step would have two values.
    """

    def __init__(self, run_folder: Path, host: str):
        self._path = run_folder / "system" / f"{host}.jsonl"
        self._prefix = f"system/{host}/"
        self._readings = node_readings(run_folder) | gpu_readings()
        self._journal: Journal | None = None
        self._lock: IO[bytes] | None = None
        self._logged: set[str] = set()
        self._read()  # rates are counted since the reading before

    def sample(self) -> None:
        values = self._read()
        try:
            journal = self._journal or self._open()
            if journal is not None:
                journal.metrics(values, max(journal.last_steps.values(), default=-1) + 1)
        except Exception as error:  # a full disk, say; the line that it tore is cut off when the file is opened again
            self._log_once("the samples cannot be written, will be tried again", error)
            self.close()

    def close(self) -> None:
        """Force the samples to the disk, and leave the file to others; the next sample would open it again."""
        journal, lock, self._journal, self._lock = self._journal, self._lock, None, None
        try:
            if journal is not None:
                journal.close()
        except OSError as error:
            self._log_once("the samples may not be on the disk", error)
        if lock is not None:
            lock.close()

    def _read(self) -> Values:
        values: Values = {}
        for what, read in self._readings.items():
            try:
                values |= {self._prefix + name: round(value, 3) for name, value in read().items()}
            except Exception as error:  # whatever a driver raises
                self._log_once(f"{what} cannot be read", error)
        return values

    def _open(self) -> Journal | None:
        """Continue behind the last sample in the file; None if another monitor has it."""
        self._path.parent.mkdir(exist_ok=True)
        if self._lock is None:
            self._lock = self._path.open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError as error:  # not every filesystem has locks
            self._log_once("the file of the samples cannot be locked", error)
        self._journal = Journal(self._path)
        return self._journal

    def _log_once(self, what: str, error: Exception) -> None:
        if what not in self._logged:
            self._logged.add(what)
            logger.warning("%s: %s: %s", what, type(error).__name__, error)


def node_readings(run_folder: Path) -> dict[str, Reading]:
    """Return all readings but those of the GPUs, by what is read. Names are MLflow's own where it has the same."""
    disk = ("disk_read_mib_per_second", "disk_write_mib_per_second")
    network = ("network_receive_mib_per_second", "network_transmit_mib_per_second")
    return {
        # of all cores, since the reading before
        "the use of the CPU": lambda: {"cpu_utilization_percentage": psutil.cpu_percent()},
        "the use of the memory": read_memory,
        "the space on the disk": lambda: {"disk_usage_percentage": psutil.disk_usage(str(run_folder)).percent},
        "disk traffic": Rates(count_disk_bytes, disk),
        "network traffic": Rates(count_network_bytes, network),
    }


def read_memory() -> Values:
    """Return how much memory programs cannot get. Caches, which they could get, do not count."""
    memory = psutil.virtual_memory()
    return memory_usage(memory.total - memory.available, memory.total)


def memory_usage(used: int, total: int) -> Values:
    return {"memory_usage_mib": used / MIB, "memory_usage_percentage": 100 * used / total}


class Rates:
    """MiB per second in two directions, over all devices, since the reading before; the first has none."""

    def __init__(self, count_bytes: Callable[[], dict[str, tuple[int, int]]], names: tuple[str, str]):
        self._count_bytes = count_bytes
        self._names = names
        self._counted: dict[str, tuple[int, int]] = {}
        self._at = 0.0

    def __call__(self) -> Values:
        before, before_at = self._counted, self._at
        self._counted, self._at = self._count_bytes(), time.monotonic()
        devices = self._counted.keys() & before.keys()  # a new one brings all that it ever counted
        if not devices:
            return {}
        moved = [sum(self._counted[device][i] - before[device][i] for device in devices) for i in (0, 1)]
        seconds = self._at - before_at
        return {name: count / MIB / seconds for name, count in zip(self._names, moved, strict=True)}


def count_disk_bytes() -> dict[str, tuple[int, int]]:
    """Return bytes read and written so far, by disk. Partitions and volumes would count the same bytes again."""
    counters = psutil.disk_io_counters(perdisk=True)
    return {name: (c.read_bytes, c.write_bytes) for name, c in counters.items() if is_hardware("/sys/block", name)}


def count_network_bytes() -> dict[str, tuple[int, int]]:
    """Return bytes received and sent so far, by network card; in a container, which has none, by virtual one.

    Traffic between ranks of one node over the loopback does not count, and what a card moves by RDMA is not known.
    """
    counters = psutil.net_io_counters(pernic=True)
    cards = [name for name in counters if is_hardware("/sys/class/net", name)]
    names = cards or [name for name in counters if name != "lo"]
    return {name: (counters[name].bytes_recv, counters[name].bytes_sent) for name in names}


def is_hardware(folder: str, name: str) -> bool:
    """Return whether /sys lists a physical device for `name`."""
    return Path(folder, name.replace("/", "!"), "device").exists()


def read_gpu_memory(nvml: Any, gpu: Any) -> Values:
    memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
    return memory_usage(memory.used, memory.total)


GPU_QUERIES: dict[str, Callable[[Any, Any], Values]] = {
    # the share of time in which any kernel ran, however much of the GPU it used
    "utilization": lambda nvml, gpu: {"utilization_percentage": nvml.nvmlDeviceGetUtilizationRates(gpu).gpu},
    "memory": read_gpu_memory,
    "power": lambda nvml, gpu: {"power_usage_watts": nvml.nvmlDeviceGetPowerUsage(gpu) / 1000},
    # of the sensor NVML_TEMPERATURE_GPU
    "temperature": lambda nvml, gpu: {"temperature_celsius": nvml.nvmlDeviceGetTemperature(gpu, 0)},
}


def gpu_readings() -> dict[str, Reading]:
    """Return a reading for each quantity of each GPU of the node, so that one that fails costs no other.

    Numbered as nvidia-smi does, whichever of them the training has. None without GPU or NVML.
    """
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
    except Exception as error:  # not installed, no driver, no GPU, or one that has failed
        logger.info("no GPU metrics, which need nvidia-ml-py and a GPU: %s: %s", type(error).__name__, error)
        return {}

    def read(index: int, query: Callable[[Any, Any], Values]) -> Values:
        values = query(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
        return {f"gpu_{index}_{name}": value for name, value in values.items()}

    gpus = range(count)
    return {f"{what} of GPU {i}": partial(read, i, query) for i in gpus for what, query in GPU_QUERIES.items()}


def host_name() -> str:
    """Return the name of this node as it can stand in a metric name and in a file name."""
    return clean_name(socket.gethostname().replace("/", "_"), limit=64)  # the longest on Linux
