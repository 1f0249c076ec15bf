"""Checkpoints: folders that are complete or do not exist, verified before use, never unpickled.

    checkpoints/step-00000450/
        model.pt        state_dict of the unwrapped model
        training.pt     optimizer, loss scale, sums of the record in progress
        position.json   epoch, samples_seen, global_step, best evaluation so far; run id, config, dataset, model spec
        manifest.json   format, size and SHA-256 of each file above

The learning rate and all random streams are functions of the position and need no file.
"""

import hashlib
import io
import json
import math
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.base.files import sync_folder, write_synced
from pipeline.base.logs import logger
from pipeline.config.schema import CheckpointConfig
from pipeline.run.folder import RunError, RunFolder

FORMAT = 3
FILES = ("model.pt", "training.pt", "position.json")


class CheckpointError(RunError):
    """A checkpoint is damaged or does not fit; the message names it."""


@dataclass(frozen=True)
class Position:
    """The place of a training: behind `samples_seen` samples (over all ranks) of `epoch`, counted from 0."""

    epoch: int = 0
    samples_seen: int = 0
    global_step: int = 0


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, by checkpoint.metric."""

    value: float
    global_step: int


def is_better(metric: str, value: float, than: float) -> bool:
    """Compare two evaluations. NaN is better than nothing, and nothing is worse than NaN."""
    if math.isnan(than):
        return not math.isnan(value)
    return value < than if metric == "eval/loss" else value > than


@dataclass(frozen=True)
class RunIdentity:
    """The run that a checkpoint belongs to."""

    run_id: str
    config: dict[str, Any] = field(default_factory=dict)  # dotted key -> value, as the training was run with
    dataset_digest: str = ""
    model: dict[str, Any] = field(default_factory=dict)  # the ModelSpec


@dataclass(frozen=True)
class TrainingState:
    """All that a training needs to go on. `model` has unwrapped keys; tensors are on the CPU after loading."""

    position: Position
    best: Best | None
    identity: RunIdentity
    model: dict[str, Any]
    update: dict[str, Any]  # the state of `Update`: optimizer, loss scale, count of skipped steps
    recording: dict[str, Any]  # sums of the record in progress


class Checkpoints:
    """The checkpoints of one run, kept as the config says. Only rank 0 writes."""

    def __init__(self, config: CheckpointConfig, run: RunFolder):
        self.config = config
        self.folder = run.checkpoints

    def save(self, state: TrainingState, value: float | None = None) -> Path:
        """Write a checkpoint, then remove what `keep` and `keep_best` do not cover.

        `value` is the evaluation at this step, if there was one: what `keep_best` goes by. Raises OSError if it cannot
        be written, with the checkpoints there were as they were.
        """
        target = self.folder / f"step-{state.position.global_step:08d}"
        temporary = self.folder / f".writing-{target.name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".writing-*"):
            shutil.rmtree(stale)
        try:
            self._write_folder(temporary, state, value)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)  # it may have taken the last of the room
            raise
        if target.exists():  # the end of an epoch at a step that was saved already; valid until it is replaced
            replaced = self.folder / f"{target.name}.old"
            # one left by a kill is what this attempt began from, the target then being damaged
            shutil.rmtree(target) if replaced.exists() else target.rename(replaced)
        temporary.rename(target)
        sync_folder(self.folder)
        try:
            self._prune(state.position.global_step)
        except OSError as error:  # the new one is there all the same
            logger.warning("older checkpoints cannot be removed: %s", error)
        return target

    def _write_folder(self, temporary: Path, state: TrainingState, value: float | None) -> None:
        """Write all files of a checkpoint, and force them to the disk."""
        temporary.mkdir()
        _write(temporary / "model.pt", state.model)
        _write(temporary / "training.pt", {"update": state.update, "recording": state.recording})
        place = {**asdict(state.position), "best": state.best and asdict(state.best), "value": value}
        _write(temporary / "position.json", place | {"identity": asdict(state.identity)})
        files = {name: _fingerprint(temporary / name) for name in FILES}
        _write(temporary / "manifest.json", {"format": FORMAT, "files": files})
        sync_folder(temporary)

    def all(self) -> list[Path]:
        """Return all checkpoints, sound and damaged, the latest first."""
        found = [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8,}(\.old)?", path.name)]
        return sorted(found, key=_step_of, reverse=True)

    def load(self, step: int) -> TrainingState:
        """Return the checkpoint of an optimizer step. Raises CheckpointError if there is none, or it is damaged."""
        return load_checkpoint(self.folder / f"step-{step:08d}")

    def load_latest(self) -> TrainingState | None:
        """Return the latest checkpoint that verifies; damaged ones are named in a warning and passed over.

        None if there is none. Raises CheckpointError if there are some, and none can be used: to begin anew would
        remove them.
        """
        found = self.all()
        for path in found:
            try:
                return load_checkpoint(path)
            except CheckpointError as error:
                logger.warning("%s; trying the one before", error)
        if found:
            raise CheckpointError(
                f"none of the {len(found)} checkpoints in {self.folder} can be used: put back what was "
                "lost of them, or choose another run.name to begin anew"
            )
        return None

    def _prune(self, saved_step: int) -> None:
        # what claims to be of a later step was damaged and passed over, or this step could not have been trained
        by_step = [path for path in self.all() if _step_of(path)[0] <= saved_step and path.suffix != ".old"]
        best = sorted(by_step, key=self._rank, reverse=True)[: self.config.keep_best]
        kept = {*by_step[: self.config.keep], *best}
        for path in self.all():
            if path not in kept:
                shutil.rmtree(path)

    def _rank(self, path: Path) -> tuple[float, int]:
        """Return a key that sorts the best last; of equals the first, as the best weights in model/ are."""
        try:
            value = float(json.loads((path / "position.json").read_bytes())["value"])
        except (OSError, ValueError, KeyError, TypeError):  # TypeError: without an evaluation it is null
            value = math.nan
        sign = -1 if self.config.metric == "eval/loss" else 1
        # NaN compares to nothing, so it must not get into a sort
        return -math.inf if math.isnan(value) else sign * value, -_step_of(path)[0]


def load_checkpoint(path: Path) -> TrainingState:
    """Read one checkpoint onto the CPU. Raises CheckpointError if a file is missing, damaged or not ours."""
    try:
        _verify(path)
        position = json.loads((path / "position.json").read_bytes())
        training = _load_tensors(path / "training.pt")
        return TrainingState(
            Position(position["epoch"], position["samples_seen"], position["global_step"]),
            Best(**position["best"]) if position["best"] else None,
            RunIdentity(**position["identity"]),
            _load_tensors(path / "model.pt"),
            training["update"],
            training["recording"],
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({type(error).__name__}: {error})") from error


def _verify(path: Path) -> None:
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        version, files = manifest["format"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} has no readable manifest ({error})") from error
    if version != FORMAT:
        raise CheckpointError(f"checkpoint {path}: manifest of format {version}; this version reads format {FORMAT}")
    for name in FILES:
        if files.get(name) != _fingerprint(path / name):
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is not what its manifest states")


def _load_tensors(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # tensors and plain values, never code
    except Exception as error:  # torch's own text advises to load it all the same
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"holds code ({kind[1]})" if kind else "is damaged, or holds more than tensors and plain values"
        raise CheckpointError(f"checkpoint file {path} {what}: refused") from error


def _write(path: Path, content: Any) -> None:
    """Write tensors (`.pt`) or JSON, and force it to the disk."""
    if path.suffix == ".pt":
        # in memory first: into a file without room torch raises something else than OSError
        memory = io.BytesIO()
        torch.save(content, memory)
        write_synced(path, lambda file: file.write(memory.getbuffer()))
    else:
        write_synced(path, json.dumps(content, indent=1))


def _fingerprint(path: Path) -> dict[str, Any]:
    if not path.is_file():  # a pipe, say, on which one would wait for ever
        raise CheckpointError(f"{path} is missing, or no plain file")
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _step_of(path: Path) -> tuple[int, bool]:
    """Return a key that sorts by step, and a replaced checkpoint before the one that replaces it."""
    return int(path.stem.removeprefix("step-")), path.suffix != ".old"
