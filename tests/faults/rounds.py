"""The rounds of the campaign: each disturbs a training in its way, and says what was lost by it."""

from __future__ import annotations

import gzip
import json
import logging
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from pipeline.data.sources.published import DEBIAN_FASHION_MNIST
from pipeline.models.bundle import Bundle
from pipeline.run.checkpoint import CheckpointError, Checkpoints, _fingerprint
from pipeline.run.folder import RunFolder
from tests.faults.inject import Fault, random_fault
from tests.faults.pickles import MALICIOUS, write_malicious
from tests.faults.trainings import (
    STEPS_PER_EPOCH,
    End,
    differences,
    digest_of,
    environment_of,
    records,
    state,
    torchrun_command,
    train_forked,
    train_under_torchrun,
)
from tests.train.helpers import config_of

GRACE = 30.0
"""Seconds: what torchrun leaves a rank that it asks to end."""
HANG_TIMEOUT = 10
PHASES = {
    "step": "the training loop",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "update": "the update of the weights",
    "evaluation": "the evaluation",
}
"""What is said of a rank that sleeps there."""
CONSEQUENCES = ("ended because another rank did", "Connection closed by peer", "Timed out waiting")


class NoMoreFaults(Exception):
    """Every one there is has been tried."""


@dataclass
class Context:
    """What the rounds of a campaign share: a folder, and trainings that nobody disturbed."""

    folder: Path
    next_operation: int = 0
    _references: dict[tuple[int, tuple[str, ...]], Path] = field(default_factory=dict)

    def reference(self, world_size: int, *settings: str) -> Path:
        key = world_size, settings
        if key not in self._references:
            folder = self.folder / f"reference-{len(self._references)}"
            end = train_forked(folder, world_size, *settings)
            assert end.failure is None, end.failure
            self._references[key] = folder
        return self._references[key]

    def dataset_files(self) -> list[Path]:
        """The four files of Fashion-MNIST, as Debian's package has them, unpacked."""
        folder = self.folder / "dataset"
        if not folder.exists():
            folder.mkdir()
            for packed in DEBIAN_FASHION_MNIST.glob("*.gz"):
                (folder / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
        return sorted(folder.iterdir())


Round = Callable[[Context, Path, random.Random], list[str]]
"""(context, an empty folder, random numbers) -> what was lost, nothing if all is well."""


def train(folder: Path, world_size: int, *settings: str, fault: Fault | None = None, torchrun: bool = False) -> End:
    run = train_under_torchrun if torchrun else train_forked
    return run(folder, world_size, *settings, fault=fault)


def strike(
    folder: Path, world_size: int, *settings: str, draw: Callable[[], Fault], torchrun: bool = False
) -> tuple[Fault, End]:
    """Train with a fault; again with another, and the same run, until one has struck."""
    mark = folder.parent / f"{folder.name}-struck"
    while True:
        fault = replace(draw(), mark=str(mark))
        end = train(folder, world_size, *settings, fault=fault, torchrun=torchrun)
        if mark.exists():
            mark.unlink()
            return fault, end
        shutil.rmtree(folder)  # it has finished undisturbed
        folder.mkdir()


def train_to_the_end(folder: Path, world_size: int, *settings: str, torchrun: bool = False) -> list[str]:
    end = train(folder, world_size, *settings, torchrun=torchrun)
    return [] if end.failure is None else [f"does not go on: {end.failure}\n{end.output[-2000:]}"]


def kill_ranks(context: Context, folder: Path, rng: random.Random, *, torchrun: bool = False) -> list[str]:
    """kill -9 of one rank or of all, once to three times, anywhere."""
    world_size = rng.choice((1, 2, 2, 3))
    settings = ("train.reproducible=true",) if rng.random() < 0.3 else ()
    strike(folder, world_size, *settings, draw=lambda: random_fault(rng, "kill", world_size), torchrun=torchrun)
    for _ in range(0 if torchrun else rng.randint(0, 2)):
        train(folder, world_size, *settings, fault=random_fault(rng, "kill", world_size))
    problems = train_to_the_end(folder, world_size, *settings)
    return problems or differences(folder, context.reference(world_size, *settings))


def kill_ranks_under_torchrun(context: Context, folder: Path, rng: random.Random) -> list[str]:
    return kill_ranks(context, folder, rng, torchrun=True)


def kill_in_save(context: Context, folder: Path, rng: random.Random) -> list[str]:
    """kill -9 at a file operation of a save: the next one, in each round; from the first save on a checkpoint loads."""
    # at the end of an epoch a checkpoint of the same step is replaced
    settings = ("checkpoint.every_steps=13",)
    mark, at = folder / "struck", context.next_operation
    context.next_operation += 1
    train(folder, 1, *settings, fault=Fault("kill", "file", at, (0,), mark=str(mark)))
    if not mark.exists():
        raise NoMoreFaults
    checkpoints = Checkpoints(config_of().checkpoint, RunFolder(folder / "run"))
    problems = []
    try:
        checkpoints.load_latest()
    except CheckpointError as error:
        problems.append(f"after a kill at operation {at}: {error}")
    problems += train_to_the_end(folder, 1, *settings)
    return problems or differences(folder, context.reference(1, *settings))


def kill_launcher(context: Context, folder: Path, rng: random.Random) -> list[str]:
    """kill -9 of torchrun; loader workers and publisher have to go too, also one that a server does not answer."""
    world_size = rng.choice((2, 3))
    settings = ("train.epochs=20", "data.placement=workers", "data.workers=1")
    tracking = ("tracking.enabled=true", "tracking.system_every=1")
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        subprocess.Popen(
            torchrun_command(folder, world_size, *settings, *tracking, f"tracking.uri={_server(folder, silent, rng)}"),
            env=environment_of(None),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as launcher,
    ):
        children = wait_for_step(folder, launcher, rng.randrange(20))
        launcher.send_signal(signal.SIGKILL)
        began = time.monotonic()
        _, alive = psutil.wait_procs(children, timeout=GRACE)
    for process in alive:
        process.kill()
    problems = [f"{len(alive)} processes outlive torchrun by {GRACE:.0f} s"] if alive else []
    if not problems and state(folder).get("state") != "preempted":
        problems.append(f"state {state(folder).get('state')} after {time.monotonic() - began:.0f} s")
    problems += train_to_the_end(folder, world_size, *settings)
    return problems or differences(folder, context.reference(world_size, *settings))


def _server(folder: Path, silent: socket.socket, rng: random.Random) -> str:
    return rng.choice((f"sqlite:///{folder}/mlflow.db", f"http://127.0.0.1:{silent.getsockname()[1]}"))


def wait_for_step(folder: Path, launcher: subprocess.Popen[bytes], step: int) -> list[psutil.Process]:
    """Until the training has saved that step; its processes."""
    deadline = time.monotonic() + 90
    while state(folder).get("global_step", -1) < step or state(folder).get("state") != "running":
        assert time.monotonic() < deadline, f"step {step} is never reached: {state(folder)}"
        assert launcher.poll() is None, "the launcher is gone"
        time.sleep(0.02)
    children: list[psutil.Process] = psutil.Process(launcher.pid).children(recursive=True)
    return children


def stop_by_signal(context: Context, folder: Path, rng: random.Random) -> list[str]:
    """A signal in training, evaluation or save: nothing is trained twice, and the state is right."""
    settings = ("train.log_every=1",)
    world_size, name = rng.choice((1, 2, 3)), rng.choice(("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"))
    places = ("step", "backward", "update", "evaluation", "save")
    torchrun = rng.random() < 0.2
    fault, end = strike(
        folder, world_size, *settings, draw=lambda: random_fault(rng, name, world_size, places), torchrun=torchrun
    )
    problems = [f"{fault}: {end.failure}"] if end.failure else []
    if end.seconds > GRACE + 15 * torchrun:  # which has to start
        problems.append(f"{fault}: took {end.seconds:.0f} s")
    now = state(folder)
    if now.get("state") not in ("preempted", "finished"):
        problems.append(f"{fault}: state {now.get('state')}")
    last = max((step for key, step, _ in _points(folder) if key.startswith("train/")), default=0)
    if last != now.get("global_step", 0):  # every step is recorded
        problems.append(f"{fault}: trained up to step {last}, saved step {now.get('global_step')}")
    problems += train_to_the_end(folder, world_size, *settings)
    return problems or differences(folder, context.reference(world_size, *settings))


def _points(folder: Path) -> list[tuple[str, int, float]]:
    return [(r["key"], r["step"], r["value"]) for r in records(folder) if r["kind"] == "metric"]


def resume_within_an_epoch(context: Context, folder: Path, rng: random.Random) -> list[str]:
    """Stopped three times within an epoch and gone on with on other numbers of ranks, reproducibly."""
    settings = ("train.reproducible=true", "data.augment.crop=2")
    done = 0
    for world_size in (4, 2, 1):
        steps = rng.randint(1, 2)  # and two more until all have decided: less than an epoch in all
        train(folder, world_size, *settings, fault=Fault("SIGTERM", "step", steps, (0,)))
        step = state(folder).get("global_step", 0)
        if step <= done:
            return [f"stopped on {world_size} ranks without a step behind {done}"]
        done = step
    if done >= STEPS_PER_EPOCH:
        return [f"step {done} is not within the epoch any more"]
    problems = train_to_the_end(folder, 3, *settings)
    return problems or differences(folder, context.reference(1, *settings))


@contextmanager
def listen(name: str) -> Iterator[list[str]]:
    """What is logged meanwhile."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def damage_checkpoint(context: Context, folder: Path, rng: random.Random) -> list[str]:
    """A bit flipped, or the end cut off, anywhere in the latest checkpoint: named, and the one before is used."""
    shutil.copytree(context.reference(1) / "run" / "checkpoints", folder / "run" / "checkpoints")
    checkpoints = Checkpoints(config_of().checkpoint, RunFolder(folder / "run"))
    latest, before = checkpoints.all()[:2]
    path = rng.choice(sorted(latest.iterdir()))
    content = bytearray(path.read_bytes())
    offset = rng.randrange(len(content))
    if rng.random() < 0.5:
        content[offset] ^= 1 << rng.randrange(8)
    else:
        del content[offset:]
    path.write_bytes(content)
    with listen("convoy") as said:
        loaded = checkpoints.load_latest()
    expected = int(before.name.removeprefix("step-"))
    if not any(str(latest) in message for message in said):
        return [f"{path.name} damaged at byte {offset}: {latest.name} is not named"]
    if loaded is None or loaded.position.global_step != expected:
        return [f"{path.name} damaged at byte {offset}: step {loaded and loaded.position.global_step} is loaded"]
    return []


def fill_disk(context: Context, folder: Path, rng: random.Random) -> list[str]:
    """A small disk that is full for some steps: the training goes on, and the checkpoint before stays valid."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    try:
        begin = rng.randrange(4, 18)
        end = train_forked(disk, 2, fault=Fault("fill", "step", begin, (0,), str(disk)))
        problems = [f"full from step {begin} on: {end.failure}"] if end.failure else []
        tags = {key: value for r in records(disk) if r["kind"] == "tags" for key, value in r["values"].items()}
        if "failed_saves" not in tags:
            problems.append("the failed save is not recorded")
        # the best weights of an evaluation without room are lost, as is said
        return problems or [found for found in differences(disk, context.reference(2)) if "best" not in found]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def compute_nan(context: Context, folder: Path, rng: random.Random) -> list[str]:
    """NaN on one rank: every rank skips the step, and the training goes on."""
    world_size, at = rng.choice((2, 3)), rng.randrange(26)  # each rank has 26 forward passes at least
    settings = ("train.reproducible=true",) if rng.random() < 0.5 else ()
    end = train_forked(folder, world_size, *settings, fault=Fault("nan", "gradient", at, (rng.randrange(world_size),)))
    if end.failure:
        return [f"NaN in gradient {at}: {end.failure}"]
    skipped = [value for key, _, value in _points(folder) if key == "train/skipped_steps"]
    if skipped[-1:] != [1.0]:
        return [f"NaN in gradient {at}: {skipped} steps skipped"]
    weights = Bundle.open(folder / "run" / "model").load_weights("final")
    problems = [] if all(value.isfinite().all() for value in weights.values()) else ["weights are not finite"]
    return problems + ([] if set(end.weights) == {digest_of(weights)} else ["ranks have other weights than rank 0"])


def raise_on_one_rank(context: Context, folder: Path, rng: random.Random) -> list[str]:
    return _fail_one_rank(folder, rng, "raise", limit=GRACE)


def exit_on_one_rank(context: Context, folder: Path, rng: random.Random) -> list[str]:
    return _fail_one_rank(folder, rng, "exit", limit=GRACE)


def sleep_on_one_rank(context: Context, folder: Path, rng: random.Random) -> list[str]:
    return _fail_one_rank(folder, rng, "sleep", limit=HANG_TIMEOUT + GRACE)


def _fail_one_rank(folder: Path, rng: random.Random, what: str, limit: float) -> list[str]:
    """All are gone within `limit` seconds (besides the start), and the first cause is what is read first."""
    rank, backend, where = rng.randrange(3), rng.choice(("auto", "gloo")), rng.choice(sorted(PHASES))
    fault = Fault(what, where, rng.randrange(10) if where != "evaluation" else 0, (rank,))
    settings = (f"train.hang_timeout={HANG_TIMEOUT}", f"train.backend={backend}")
    end = train_under_torchrun(folder, 3, *settings, fault=fault)
    problems = [f"{fault}: ended as if nothing had been"] if end.failure is None else []
    if end.seconds > limit + 15:
        problems.append(f"{fault}: took {end.seconds:.0f} s")
    signs = {
        "raise": "ArithmeticError: the fault",
        "exit": f"(exitcode: 3) local_rank: {rank} ",  # torchrun says it, when it has ended the others
        "sleep": f"in {PHASES[where]} (train.hang_timeout)",
    }
    before, sign, _ = end.output.partition(signs[what])
    first = [consequence for consequence in CONSEQUENCES if what != "exit" and consequence in before]
    if not sign:
        problems.append(f"{fault}, {backend}: {signs[what]!r} is not said\n{end.output[:3000]}")
    elif first or (what == "sleep" and before.count(" hung for ") != before.count(f"rank {rank} hung for ")):
        problems.append(f"{fault}, {backend}: something else is said first\n{before[:3000]}")
    return problems


def load_malicious(context: Context, folder: Path, rng: random.Random) -> list[str]:
    """Code in a checkpoint, with a manifest that fits it: refused, not executed, and the one before is used."""
    shutil.copytree(context.reference(1) / "run" / "checkpoints", folder / "run" / "checkpoints")
    checkpoints = Checkpoints(config_of().checkpoint, RunFolder(folder / "run"))
    latest = checkpoints.all()[0]
    name, marker = rng.choice(sorted(MALICIOUS)), folder / "executed"
    write_malicious(name, latest / rng.choice(("model.pt", "training.pt")), marker)
    files = {path.name: _fingerprint(path) for path in sorted(latest.glob("*.*")) if path.name != "manifest.json"}
    manifest = json.loads((latest / "manifest.json").read_bytes())
    (latest / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
    loaded = checkpoints.load_latest()
    problems = [f"{name}: executed"] if marker.exists() else []
    if loaded is None or loaded.position.global_step == int(latest.name.removeprefix("step-")):
        problems.append(f"{name}: loaded")
    return problems


def damage_dataset(context: Context, folder: Path, rng: random.Random) -> list[str]:
    """A file of a dataset cut off or changed anywhere: refused before anything is started."""
    raw = folder / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for sound in context.dataset_files():
        (raw / sound.name).symlink_to(sound)
    path = rng.choice(sorted(raw.iterdir()))
    content = bytearray(path.read_bytes())
    path.unlink()
    offset = rng.randrange(len(content))
    if rng.random() < 0.5:
        content[offset] ^= 0xFF
    else:
        del content[offset:]
    path.write_bytes(content)
    own = ("data.arguments={}", "data.dataset=fashion_mnist", "data.image_size=28")
    data = (*own, f"data.root={folder / 'data'}", "data.download=false")
    end = train_forked(folder, 1, *data)
    problems = [] if end.failure and path.name in end.failure else [f"{path.name} at {offset}: {end.failure}"]
    return problems + (["a run folder was made"] if (folder / "run").exists() else [])
