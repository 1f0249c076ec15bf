"""Checkpoints: folders that are complete or do not exist, verified before use, never unpickled.

    checkpoints/step-00000450/
        model.pt        state_dict of the unwrapped network
        training.pt     optimizer, loss scale, sums of the record in progress
        position.json   epoch, samples_seen, global_step, best evaluation so far, run id, config
        manifest.json   format, size and SHA-256 of each file above

The learning rate and all random streams are functions of the position and need no file.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

FORMAT = 2
_FOLDER = re.compile(r"step-(\d{8,})(\.old)?")
logger = logging.getLogger("convoy")


class CheckpointError(Exception):
    """A checkpoint is damaged or does not fit; the message names it."""


@dataclass(frozen=True)
class Position:
    """Where a training stands: behind `samples_seen` samples (over all ranks) of `epoch`, counted from 0."""

    epoch: int = 0
    samples_seen: int = 0
    global_step: int = 0


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, by checkpoint.metric."""

    value: float
    global_step: int


@dataclass(frozen=True)
class TrainingState:
    """All that a training needs to go on. `model` has unwrapped keys; tensors are on the CPU after loading."""

    position: Position
    best: Best | None
    run_id: str
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    meter: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> value, as the training was run with."""
    dataset_digest: str = ""


class Checkpoints:
    """The checkpoints of one run. Only rank 0 writes."""

    def __init__(self, folder: Path, *, keep: int, keep_best: int, higher_is_better: bool):
        self.folder = folder
        self._keep = keep
        self._keep_best = keep_best
        self._sign = 1 if higher_is_better else -1

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
        _sync_folder(self.folder)
        try:
            self._prune(state.position.global_step)
        except OSError as error:  # the new one is there all the same
            logger.warning("older checkpoints cannot be removed: %s", error)
        return target

    def _write_folder(self, temporary: Path, state: TrainingState, value: float | None) -> None:
        """All files of a checkpoint, forced to the disk."""
        temporary.mkdir()
        _write(temporary / "model.pt", state.model)
        _write(
            temporary / "training.pt",
            {"optimizer": state.optimizer, "scaler": state.scaler, "meter": state.meter},
        )
        position = {**asdict(state.position), "best": state.best and asdict(state.best), "run_id": state.run_id}
        identity = {"config": state.config, "dataset_digest": state.dataset_digest}
        _write(temporary / "position.json", {**position, "value": value, **identity})
        files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        _write(temporary / "manifest.json", {"format": FORMAT, "files": files})
        _sync_folder(temporary)

    def all(self) -> list[Path]:
        """Checkpoints, sound and damaged, the latest first."""
        found = [path for path in self.folder.glob("step-*") if _FOLDER.fullmatch(path.name)]
        return sorted(found, key=_step_of, reverse=True)

    def load_latest(self) -> TrainingState | None:
        """The latest checkpoint that verifies; damaged ones are named in a warning and passed over.

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
                f"none of the {len(found)} checkpoints in {self.folder} can be used: move them away to begin anew, or "
                "choose another run.name"
            )
        return None

    def _prune(self, saved_step: int) -> None:
        # what claims to be of a later step was damaged and passed over, or this step could not have been trained
        by_step = [path for path in self.all() if _step_of(path) <= (saved_step, 1) and path.suffix != ".old"]
        kept = set(by_step[: self._keep]) | set(sorted(by_step, key=self._rank, reverse=True)[: self._keep_best])
        for path in self.all():
            if path not in kept:
                shutil.rmtree(path)

    def _rank(self, path: Path) -> tuple[float, int]:
        """Sorts the best last; of equals the first, as model/best.pt has it."""
        try:
            value = json.loads((path / "position.json").read_bytes())["value"]
        except (OSError, ValueError, KeyError):
            value = None
        # NaN compares to nothing, so it must not get into a sort
        comparable = value is not None and value == value
        return self._sign * float(value) if comparable else float("-inf"), -_step_of(path)[0]


def load_checkpoint(path: Path) -> TrainingState:
    """Read one checkpoint onto the CPU. Raises CheckpointError if a file is missing, damaged or not ours."""
    _verify(path)
    try:
        return _load(path)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is none of ours ({type(error).__name__}: {error})") from error


def _load(path: Path) -> TrainingState:
    position = json.loads((path / "position.json").read_bytes())
    training = _load_tensors(path / "training.pt")
    return TrainingState(
        Position(position["epoch"], position["samples_seen"], position["global_step"]),
        Best(**position["best"]) if position["best"] else None,
        position["run_id"],
        _load_tensors(path / "model.pt"),
        training["optimizer"],
        training["scaler"],
        training["meter"],
        position["config"],
        position["dataset_digest"],
    )


def save_atomically(path: Path, content: Any) -> None:
    """Write tensors (`.pt`) or JSON so that `path` holds either what it held or all of the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing-{path.name}")
    try:
        _write(temporary, content)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
    _sync_folder(path.parent)


def _verify(path: Path) -> None:
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        version, files = manifest["format"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} has no readable manifest ({error})") from error
    if not {"model.pt", "training.pt", "position.json"} <= files.keys():
        raise CheckpointError(f"checkpoint {path} is damaged: its manifest names only {sorted(files)}")
    if version != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {version}; this version reads format {FORMAT}")
    for name, expected in files.items():
        try:
            sound = _fingerprint(path / name) == expected
        except OSError:
            sound = False
        if not sound:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is not what its manifest states")


def _load_tensors(path: Path) -> dict[str, Any]:
    try:
        # weights_only: a checkpoint can hold tensors and plain values, never code
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own text advises to load it all the same
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"holds code ({kind[1]})" if kind else "is damaged, or holds more than tensors and plain values"
        raise CheckpointError(f"checkpoint file {path} {what}: refused") from error
    return loaded


def _write(path: Path, content: Any) -> None:
    with path.open("wb") as file:
        if path.suffix == ".pt":
            # in memory first: into a file without room torch raises something else than OSError
            memory = io.BytesIO()
            torch.save(content, memory)
            file.write(memory.getbuffer())
        else:
            file.write(json.dumps(content, indent=1).encode())
        file.flush()
        os.fsync(file.fileno())


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _step_of(path: Path) -> tuple[int, int]:
    """Sorts by step, and a replaced checkpoint before the one that replaces it."""
    found = _FOLDER.fullmatch(path.name)
    assert found is not None
    return int(found[1]), 0 if found[2] else 1
