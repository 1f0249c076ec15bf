"""What a node does while it trains: samples of its processors, memory, disks, network and GPUs.

They are metrics in the journal's format, in a file for each node, system/<host>.jsonl of the run folder: keys are
`system/<host>/<name>`, the step is the number of the sample. Imports neither torch nor mlflow: the process that samples
is to be a small one.
"""

from __future__ import annotations

import fcntl
import logging
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

import psutil

from pipeline.run.journal import Journal, clean_name, iterate

logger = logging.getLogger("convoy")

MIB = 2**20
DIGITS = 3
"""Decimals of a recorded value: more would make the files larger, and tell nothing."""
SHORTEST = 1.0
"""Seconds that a last sample has to tell of: over less, a share of the CPU or a rate is noise."""

Values = dict[str, float]
Reading = Callable[[], Values]
logger = logging.getLogger("convoy")


class Sampler:
    """Appends samples of this node to its file. Never raises: what fails is said once, and the rest goes on.

    Of several samplers with one host name and one run folder (two launchers on a machine, or a sampler that has not
    noticed yet that its training died) one writes, and another takes over when that has ended: by two of them a step
    would have two values.
    """

    def __init__(self, run_folder: Path, host: str):
        """`host` is a part of a metric name and of a file name."""
        self._path = run_folder / "system" / f"{host}.jsonl"
        self._prefix = f"system/{host}/"
        self._readings = node_readings(run_folder) | gpu_readings()
        self._journal: Journal | None = None
        self._lock: IO[bytes] | None = None
        self._number = 0
        self._said: set[str] = set()
        self._read()  # what is a rate is one since the reading before

    def sample(self) -> None:
        values = self._read()
        try:
            if self._journal is None:
                self._open()
            if self._journal is not None:
                self._journal.metrics({self._prefix + name: value for name, value in values.items()}, self._number)
                self._number += 1
        except Exception as error:  # a full disk, say; the line that it tore is cut off when the file is opened again
            self._say("the samples cannot be written, will be tried again", error)
            self.close()

    def close(self) -> None:
        """Force the samples to the disk, and leave the file to others; the next sample would open it again."""
        journal, lock, self._journal, self._lock = self._journal, self._lock, None, None
        try:
            if journal is not None:
                journal.close()
        except OSError as error:
            self._say("the samples may not be on the disk", error)
        if lock is not None:
            lock.close()

    def _read(self) -> Values:
        values: Values = {}
        for what, read in self._readings.items():
            try:
                values |= {name: round(value, DIGITS) for name, value in read().items()}
            except Exception as error:  # whatever a driver comes up with
                self._say(f"{what} cannot be read", error)
        return values

    def _open(self) -> None:
        """Go on behind the last sample in the file, if no other sampler has it."""
        self._path.parent.mkdir(exist_ok=True)
        if self._lock is None:
            self._lock = self._path.open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError as error:  # not every filesystem has locks
            self._say("the file of the samples cannot be locked", error)
        self._number = max((record["step"] for record, _ in iterate(self._path)), default=-1) + 1
        self._journal = Journal(self._path)

    def _say(self, what: str, error: Exception) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s: %s: %s", what, type(error).__name__, error)


def follow(sampler: Sampler, every: float, wait_for_end: Callable[[float], bool]) -> None:
    """Sample every `every` seconds until the end, and then the rest: a short run is to have a sample, too.

    `wait_for_end` waits for the given seconds at most, and returns whether the end has come.
    """
    sampled = time.monotonic()
    while not wait_for_end(every):
        sampler.sample()
        sampled = time.monotonic()
    if time.monotonic() - sampled >= SHORTEST:
        sampler.sample()
    sampler.close()


def node_readings(run_folder: Path) -> dict[str, Reading]:
    """All but the GPUs, by what is read; names are MLflow's own where it has the same."""
    return {
        "the use of the CPU": read_cpu,
        "the use of the memory": read_memory,
        "the space on the disk": partial(read_disk_space, run_folder),
        "disk traffic": Rates(count_disk_bytes, ("disk_read_mib_per_second", "disk_write_mib_per_second")),
        "network traffic": Rates(
            count_network_bytes, ("network_receive_mib_per_second", "network_transmit_mib_per_second")
        ),
    }


def read_cpu() -> Values:
    """Of all cores, since the call before."""
    return {"cpu_utilization_percentage": psutil.cpu_percent()}


def read_memory() -> Values:
    """What programs could not get; caches, which they could, are not in use."""
    memory = psutil.virtual_memory()
    used = memory.total - memory.available
    return {"memory_usage_mib": used / MIB, "memory_usage_percentage": 100 * used / memory.total}


def read_disk_space(folder: Path) -> Values:
    """Of the filesystem that holds `folder`."""
    return {"disk_usage_percentage": psutil.disk_usage(str(folder)).percent}


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
        devices = self._counted.keys() & before.keys()  # one that came in between brings all it ever counted
        if not devices:
            return {}
        moved = [sum(self._counted[device][i] - before[device][i] for device in devices) for i in (0, 1)]
        seconds = self._at - before_at
        return {name: count / MIB / seconds for name, count in zip(self._names, moved, strict=True)}


def count_disk_bytes() -> dict[str, tuple[int, int]]:
    """Bytes read and written so far, by disk. Their partitions and volumes would count the same bytes again."""
    counters = psutil.disk_io_counters(perdisk=True)
    return {name: (c.read_bytes, c.write_bytes) for name, c in counters.items() if is_hardware("/sys/block", name)}


def count_network_bytes() -> dict[str, tuple[int, int]]:
    """Bytes received and sent so far, by network card; in a container, which has none, by virtual one.

    What ranks of one node send each other over the loopback is none of it, and what a card moves by RDMA is not known.
    """
    counters = psutil.net_io_counters(pernic=True)
    cards = [name for name in counters if is_hardware("/sys/class/net", name)]
    names = cards or [name for name in counters if name != "lo"]
    return {name: (counters[name].bytes_recv, counters[name].bytes_sent) for name in names}


def is_hardware(folder: str, name: str) -> bool:
    """Whether Linux has a device behind one of the names in this folder of its."""
    return Path(folder, name.replace("/", "!"), "device").exists()


def gpu_readings() -> dict[str, Reading]:
    """One for each quantity of each GPU, so that one that fails costs no other. Without GPU or NVML there are none.

    All GPUs of the node, numbered as nvidia-smi does, whichever of them the training has.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except Exception as error:  # not installed, no driver, no GPU, or one that has failed
        logger.info("no GPU metrics, which need nvidia-ml-py and a GPU: %s: %s", type(error).__name__, error)
        return {}
    queries = {
        "utilization": read_gpu_utilization,
        "memory": read_gpu_memory,
        "power": read_gpu_power,
        "temperature": read_gpu_temperature,
    }
    return {f"{what} of GPU {i}": partial(query, pynvml, i) for i in range(count) for what, query in queries.items()}


def read_gpu_utilization(nvml: Any, index: int) -> Values:
    """The share of time in which any kernel ran, which says nothing of how much of the GPU it used."""
    gpu = nvml.nvmlDeviceGetHandleByIndex(index)
    return {f"gpu_{index}_utilization_percentage": nvml.nvmlDeviceGetUtilizationRates(gpu).gpu}


def read_gpu_memory(nvml: Any, index: int) -> Values:
    memory = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index))
    return {
        f"gpu_{index}_memory_usage_mib": memory.used / MIB,
        f"gpu_{index}_memory_usage_percentage": 100 * memory.used / memory.total,
    }


def read_gpu_power(nvml: Any, index: int) -> Values:
    milliwatts = nvml.nvmlDeviceGetPowerUsage(nvml.nvmlDeviceGetHandleByIndex(index))
    return {f"gpu_{index}_power_usage_watts": milliwatts / 1000}


def read_gpu_temperature(nvml: Any, index: int) -> Values:
    gpu = nvml.nvmlDeviceGetHandleByIndex(index)
    return {f"gpu_{index}_temperature_celsius": nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)}


HOST_LENGTH = 64
"""Longest host name on Linux."""


def host_name() -> str:
    """Of this node, as it can stand in a metric name and in a file name."""
    return clean_name(socket.gethostname().replace("/", "_"), HOST_LENGTH)
