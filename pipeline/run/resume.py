"""Whether a run may be continued with the settings given, and what differs."""

import json
from collections.abc import Mapping
from typing import Any

import yaml

from pipeline.base.launch import Launch
from pipeline.config import FIELDS, Config, may_change
from pipeline.config.arguments import load_plain, show
from pipeline.config.schema import FORMAT, field_of
from pipeline.run.folder import RunError, RunFolder


def check_format(folder: RunFolder) -> None:
    """Raise RunError if another version of Convoy, whose keys or files differ, began the run in the folder."""
    version = _read_config(folder).get("format", 1) if folder.config.exists() else FORMAT
    if version != FORMAT:
        other = "a later" if isinstance(version, int) and version > FORMAT else "an earlier"
        raise RunError(
            f"run {folder.name} was begun by {other} version of Convoy (format {version}), this one writes format "
            f"{FORMAT}: finish it with that version, or choose another run.name"
        )


def check_resumable(folder: RunFolder, config: Config, launch: Launch, *, has_checkpoint: bool) -> None:
    """Raise RunError if the folder's format, `run.resume`, its config or what is missing in it forbids going on in it.

    What the same launch began before an elastic restart may always go on, and so may a job that Slurm starts again.
    """
    check_format(folder)
    resume = config.run.resume
    if resume == "must" and not has_checkpoint:
        raise RunError(
            f"run.resume = must: there is no usable checkpoint in {folder.checkpoints}; correct run.name or run.dir, "
            "or set run.resume=auto to begin anew"
        )
    if not folder.journal.exists():
        return
    if resume == "never" and not _is_same_launch(folder.status().get("launch_id"), launch):
        raise RunError(
            f"run.resume = never: {folder.path} holds a run already; choose another run.name, or set run.resume=auto "
            "to continue it"
        )
    if changed := _forbidden(changes(folder, config), config):
        raise RunError(
            f"run {folder.name} is another training: {'; '.join(changed)}. Choose another run.name, or go back to the "
            f"values of {folder.config}"
        )
    status = folder.status()
    if is_finished(status, config):
        if other := [change for change in changes(folder, config) if change[0].startswith("optim.")]:
            raise RunError(
                f"run {folder.name} is finished, and was trained with other settings: "
                f"{'; '.join(map(_describe, other))}. Choose another run.name to train with these, or raise "
                "train.epochs to train on"
            )
    elif not has_checkpoint and (step := status.get("global_step", 0)):
        raise RunError(
            f"the checkpoints of run {folder.name}, which was saved at step {step}, are gone from "
            f"{folder.checkpoints}: put them back, or choose another run.name to begin anew"
        )


def _is_same_launch(known: str | None, launch: Launch) -> bool:
    """Return whether an id is that of a launch, or of one before it of the same requeued job: <job>-<number>."""
    if known is None or launch.run_id is None:
        return False
    if launch.is_requeued:
        return known.rpartition("-")[0] == launch.run_id.rpartition("-")[0]
    return known == launch.run_id


def is_finished(status: Mapping[str, Any], config: Config) -> bool:
    """Return whether the run ended as finished, with its test evaluation, and train.epochs did not grow since."""
    return bool(status.get("state") == "finished" and status.get("epoch", 0) >= config.train.epochs)


def check_same_training(
    folder: RunFolder, config: Config, saved: Mapping[str, Any], saved_digest: str, digest: str
) -> None:
    """Raise RunError if a checkpoint, with its config and digest of its dataset, is of another training than this."""
    changed = _forbidden(_differences(saved, config), config)
    if digest != saved_digest:
        changed += [f"{config.data.dataset} has other images or labels (digest {saved_digest}, now {digest})"]
    if changed:
        raise RunError(
            f"the checkpoints in {folder.checkpoints} are of another training: {'; '.join(changed)}. Choose another "
            "run.name, or go back to what it was"
        )


def changes(folder: RunFolder, config: Config) -> list[tuple[str, Any, Any]]:
    """Return (key, value before, value now) of all that differs from the config the folder was last run with."""
    if not folder.config.exists():  # killed at its very beginning
        return []
    known = {name: _known(name, section) for name, section in _read_config(folder).items() if name != "format"}
    try:
        return _differences(Config.model_validate(known).flat(), config)
    except ValueError as error:
        raise _damaged(folder, error) from error


def _differences(saved: Mapping[str, Any], config: Config) -> list[tuple[str, Any, Any]]:
    """Return (key, value before, value now) of what differs from a flat config that may lack keys of this version."""
    before, now = (json.loads(json.dumps(flat)) for flat in (saved, config.flat()))
    keys = [key for key in {**now, **before} if field_of(key) and (key in before or key not in FIELDS)]
    pairs = [(key, before.get(key, "not set"), now.get(key, "not set")) for key in keys]
    return [(key, old, new) for key, old, new in pairs if load_plain(old) != load_plain(new)]  # 0.10 is 0.1


def _forbidden(differences: list[tuple[str, Any, Any]], config: Config) -> list[str]:
    """Return the differences in keys that a resumed run may not change, in words."""
    reproducible = config.train.reproducible
    return [_describe(change) for change in differences if not may_change(change[0], reproducible=reproducible)]


def _describe(change: tuple[str, Any, Any]) -> str:
    key, before, now = change
    return f"{key} was {show(before)}, is {show(now)}"


def _read_config(folder: RunFolder) -> dict[str, Any]:
    try:
        content = yaml.safe_load(folder.config.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise _damaged(folder, error) from error
    if not isinstance(content, dict):
        raise _damaged(folder, "it holds no sections")
    return content


def _damaged(folder: RunFolder, reason: object) -> RunError:
    return RunError(f"{folder.config} is not a config of this version, mend it or choose another run.name: {reason}")


def _known(name: str, section: Any) -> Any:
    """Return a section without the keys of other versions."""
    return {k: v for k, v in section.items() if f"{name}.{k}" in FIELDS} if isinstance(section, dict) else section
