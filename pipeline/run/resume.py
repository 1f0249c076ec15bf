"""Whether a run may be continued with the settings given, and what differs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from pipeline.config import FIELDS, Config
from pipeline.run.folder import RunError, RunFolder

# A run is these: under other values its checkpoints and curves would be of something else.
IDENTITY = (
    "run.seed",
    "data.dataset",
    "data.image_size",
    "data.mean",
    "data.std",
    "data.global_batch_size",
    "data.synthetic_train_size",
    "data.synthetic_eval_size",
    "data.synthetic_channels",
    "data.synthetic_classes",
    "model.name",
    "model.dropout",
    "model.dropout2d",
    "loss",
    "optim.name",
    "train.reproducible",
    "checkpoint.metric",
)
IDENTITY_IF_REPRODUCIBLE = ("train.virtual_shards", "train.threads")
"""Which change the last bits."""


def check_resumable(
    folder: RunFolder,
    config: Config,
    *,
    has_checkpoint: bool,
    launch_id: str | None = None,
    is_requeued: bool = False,
) -> None:
    """Raises RunError if `run.resume` or the folder's own config forbids going on in it.

    What the same launch began before an elastic restart may always go on, and so may a job that Slurm starts again.
    """
    resume = config.run.resume
    if resume == "must" and not has_checkpoint:
        raise RunError(
            f"run.resume = must: there is no usable checkpoint in {folder.checkpoints}; correct run.name or run.dir, "
            "or set run.resume=auto to begin anew"
        )
    if not folder.journal.exists():
        return
    if resume == "never" and not _is_same_launch(folder.status().get("launch_id"), launch_id, is_requeued):
        raise RunError(
            f"run.resume = never: {folder.path} holds a run already; choose another run.name, or set run.resume=auto "
            "to continue it"
        )
    changed = [
        f"{key} was {before}, is {now}" for key, before, now in changes(folder, config) if key in identity(config)
    ]
    if changed:
        raise RunError(
            f"run {folder.name} is another training: {'; '.join(changed)}. Choose another run.name, or go back to the "
            f"values of {folder.config}"
        )


def _is_same_launch(known: str | None, launch_id: str | None, is_requeued: bool) -> bool:
    """Of the launches of one job, <job>-<number>, each has an id of its own."""
    if known is None or launch_id is None:
        return False
    return known == launch_id or (is_requeued and known.rpartition("-")[0] == launch_id.rpartition("-")[0])


def is_finished(status: Mapping[str, Any], config: Config) -> bool:
    """Whether nothing is left to train."""
    return bool(status.get("state") == "finished" and status.get("epoch", 0) >= config.train.epochs)


def identity(config: Config) -> tuple[str, ...]:
    return IDENTITY + (IDENTITY_IF_REPRODUCIBLE if config.train.reproducible else ())


def check_same_training(
    folder: RunFolder, config: Config, saved: Mapping[str, Any], saved_digest: str, digest: str
) -> None:
    """Raises RunError if a checkpoint, with its config and digest of its dataset, is of another training than this."""
    now = json.loads(json.dumps({key: config.get(key) for key in identity(config)}))  # as it was saved
    known = [key for key in now if key in saved]
    changed = [f"{key} was {saved[key]}, is {now[key]}" for key in known if saved[key] != now[key]]
    if digest != saved_digest:
        changed.append(f"{config.data.dataset} has other images or labels (digest {saved_digest}, now {digest})")
    if changed:
        raise RunError(
            f"the checkpoints in {folder.checkpoints} are of another training: {'; '.join(changed)}. Choose another "
            "run.name, or go back to what it was"
        )


def changes(folder: RunFolder, config: Config) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of all that differs from the config the folder was last run with."""
    if not folder.config.exists():  # killed at its very beginning
        return []
    try:
        content = yaml.safe_load(folder.config.read_text())
        saved = Config.model_validate({name: _known(name, section) for name, section in content.items()})
    except (ValueError, AttributeError, yaml.YAMLError) as error:
        raise RunError(
            f"{folder.config} is not a config of this version, mend it or choose another run.name: {error}"
        ) from error
    return [(key, saved.get(key), value) for key, value in config.flat().items() if saved.get(key) != value]


def _known(name: str, section: Any) -> Any:
    """A section without the keys of other versions."""
    return {k: v for k, v in section.items() if f"{name}.{k}" in FIELDS} if isinstance(section, dict) else section
