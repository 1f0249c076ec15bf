"""The parts of a run that MLflow gets beside its records: files, figures, the model, a description in Markdown."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException
from PIL import Image

from pipeline.base.credentials import without_credentials
from pipeline.base.logs import logger
from pipeline.figures.of_run import draw_evaluation, draw_filters, draw_history, draw_snapshot
from pipeline.run.journal import iterate
from pipeline.run.records import ModelRecord, PredictionsRecord, Record
from pipeline.tracking.model_registry import log_model, register, tie_to_metrics
from pipeline.tracking.store import NOTE_TAG, MlflowRun

KINDS_WITH_FILES = ("predictions", "evaluation", "model", "artifact", "status")
TAG_LENGTH = 8000
OWN_NOTE_TAG = "convoy.note"
"""Digest of the description that was written here: another one is a person's, and stays."""
_NOT_PUBLISHED = "the model is not published"
_WAYS_OUT = "mend that and sync again, or remove the folder model/ to publish the run without it"
RECIPE = "data.dataset model.name loss optim.name optim.lr optim.schedule data.global_batch_size train.epochs run.seed"


class UploadError(Exception):
    """A file that the run folder lacks, or that cannot be read, is not published; a later sync tries again."""


def upload(run: MlflowRun, record: Record, offset: int) -> None:
    """Upload the files that come with the record at `offset` of the journal; may be repeated.

    Raises UploadError, or what MLflow raises.
    """
    match record["kind"]:
        case "predictions":
            _log_snapshot(run, record)
        case "evaluation":
            _log_figures(run, draw_evaluation, record)
        case "model":
            _log_model(run, record, offset)
        case "artifact":
            _log_file(run, run.folder.path / record["path"], str(Path(record["path"]).parent))
        case "status" if record["state"] == "running":  # each attempt may have other settings
            _log_file(run, run.folder.config)


def describe(run: MlflowRun) -> None:
    """Show the run as it is now: its curves, and a description in a few words, unless a person has written another."""
    _log_figures(run, draw_history)
    note = without_credentials(_description(run))[:TAG_LENGTH]
    tags = run.client.get_run(run.id).data.tags
    if NOTE_TAG not in tags or _digest(tags[NOTE_TAG]) == tags.get(OWN_NOTE_TAG):
        # in one request: with one of them alone, the next description would be taken for a person's
        run.client.log_batch(run.id, tags=[RunTag(OWN_NOTE_TAG, _digest(note)), RunTag(NOTE_TAG, note)])
    run.progress.update(described_state=run.progress.get("mlflow_state"))


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]


def _log_file(run: MlflowRun, path: Path, place: str | None = None) -> None:
    if not path.resolve().is_relative_to(run.folder.path.resolve()):
        logger.warning("%s is a link out of the run folder: not logged", path)
        return
    if not path.is_file():
        logger.warning("%s is gone: not logged", path.relative_to(run.folder.path))
        return
    run.client.log_artifact(run.id, str(path), None if place == "." else place)
    run.counts["files"] += 1


def _log_figures(run: MlflowRun, draw: Callable[..., Sequence[Path]], *drawn: Any) -> None:
    for figure in _draw(run, draw, *drawn):
        _log_file(run, figure, "figures")


def _draw(run: MlflowRun, draw: Callable[..., Sequence[Path]], *drawn: Any) -> Sequence[Path]:
    """Return figures; none if they cannot be drawn, which must not keep other records from being published."""
    try:
        return draw(run.folder, *drawn)
    except Exception as error:
        logger.warning("a figure cannot be drawn: %s: %s", type(error).__name__, error)
        return ()


def _log_snapshot(run: MlflowRun, record: PredictionsRecord) -> None:
    """Log what was predicted at one step as an image, once: MLflow gives each upload a name of its own."""
    names = [Path(file.path).name for file in run.client.list_artifacts(run.id, "images")]
    # of its two files the last; MLflow separates with + or, in earlier versions, %
    if any(re.fullmatch(rf"predictions[+%]step[+%]{record['step']}[+%].*\.webp", name) for name in names):
        return
    for figure in _draw(run, draw_snapshot, record):
        run.client.log_image(run.id, Image.open(figure).convert("RGB"), key="predictions", step=record["step"])
        run.counts["files"] += 1


def _log_model(run: MlflowRun, record: ModelRecord, offset: int) -> None:
    """Log the model of a training that has ended, unless a later training has replaced it."""
    from pipeline.models.bundle import TRUST_VARIABLE, Bundle, BundleError, OwnCodeError  # imports torch: 3 s

    weights = run.folder.path / record["path"]
    if not weights.parent.is_dir():
        logger.warning("%s was removed: the model is not logged", weights.parent)
        return
    if not weights.is_file() or sha256(weights.read_bytes()).hexdigest() != record["sha256"]:
        if _was_resumed(run, offset):
            logger.info("%s of step %d was replaced by a later training", record["path"], record["step"])
            return
        what = "is not as it was written" if weights.is_file() else "is gone"
        raise UploadError(f"{_NOT_PUBLISHED}: {weights} {what}; {_WAYS_OUT}")
    try:
        bundle = Bundle.open(weights.parent, record.get("description"))
        model = bundle.load(weights.stem, own_code=os.environ.get(TRUST_VARIABLE) == "1")
    except OwnCodeError as error:
        raise UploadError(f"{_NOT_PUBLISHED}: {error}") from error
    except BundleError as error:
        raise UploadError(f"{_NOT_PUBLISHED}: {error}; {_WAYS_OUT}") from error
    try:
        _log_figures(run, draw_filters, model)
        model_id = log_model(run, record, bundle.spec, model)
        tie_to_metrics(run, record, model_id)
        run.counts["models"] += 1
        run.progress.update(model_id=model_id)
        if record["register"]:
            outcome = register(run, record, model_id, record["register"])
            logger.info("%s", outcome)
            run.progress.update(model_outcome=outcome)
    except (MlflowException, OSError):
        raise  # the server; tried again
    except Exception as error:
        logger.warning("the model cannot be logged, its weights are in %s: %s", record["path"], error)


def _was_resumed(run: MlflowRun, offset: int) -> bool:
    """Return whether the run was trained on after what is recorded at `offset` of its journal."""
    later = (record for record, _ in iterate(run.folder.journal, offset, kinds=("status",)))
    return any(record["kind"] == "status" and record["state"] == "running" for record in later)


def _description(run: MlflowRun) -> str:
    """Return result, recipe, command and attempts."""
    kinds, keys = ("params", "tags", "model", "status"), ("eval/accuracy", "eval/loss")
    records = [record for record, _ in iterate(run.folder.journal, kinds=kinds, keys=keys)]
    params = {key: value for r in records if r["kind"] == "params" for key, value in r["values"].items()}
    tags = [item for record in records if record["kind"] == "tags" for item in record["values"].items()]
    started_ms = [r["timestamp_ms"] for r in records if r["kind"] == "status" and r["state"] == "running"]
    parts = [_describe_result(records), _describe_recipe(params, tags)]
    if "command" in run.record:
        parts.append(f"```\n{run.record['command']}\n```")
    parts += [_describe_attempts(started_ms, dict(tags)), f"Run folder: `{run.folder.path}`"]
    return "\n\n".join(part for part in parts if part)


def _describe_result(records: Sequence[Record]) -> str:
    evaluations: dict[int, dict[str, float]] = defaultdict(dict)
    for record in records:
        if record["kind"] == "metric":
            evaluations[record["step"]][record["key"]] = record["value"]
    state = next((record["state"] for record in reversed(records) if record["kind"] == "status"), "begun")
    if not evaluations:
        return f"**{state}**, not evaluated yet"
    last = max(evaluations)
    result = f"**{state}**: {_describe_evaluation(evaluations[last])} at step {last:,}, the last evaluation"
    best = next((record["step"] for record in reversed(records) if record["kind"] == "model"), None)
    if best in evaluations:
        result += f"  \nThe logged model is of step {best:,}: {_describe_evaluation(evaluations[best])}"
    return result


def _describe_evaluation(values: Mapping[str, float]) -> str:
    parts = [f"accuracy {values['eval/accuracy']:.2%}"] if "eval/accuracy" in values else []
    parts += [f"loss {values['eval/loss']:.4g}"] if "eval/loss" in values else []
    return ", ".join(parts) or "no finite result"


def _describe_recipe(params: Mapping[str, Any], tags: Sequence[tuple[str, str]]) -> str:
    """Return the main settings, and those that an attempt changed, with all the values they had."""
    values = {key: [params[key]] for key in RECIPE.split() if key in params}
    for tag, value in tags:
        of_attempt = re.fullmatch(r"attempt\.\d+\.(.+)", tag)
        if of_attempt and of_attempt[1] in params:
            values.setdefault(of_attempt[1], [params[of_attempt[1]]]).append(value)
    return ", ".join(f"{key} " + ", then ".join(f"`{value}`" for value in each) for key, each in values.items())


def _describe_attempts(started_ms: Sequence[int], tags: Mapping[str, str]) -> str:
    """Return a table if there was more than one attempt; else when it began."""
    moments = [f"{datetime.fromtimestamp(ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC" for ms in started_ms]
    if len(moments) < 2:
        return "".join(f"Begun {moment}" for moment in moments)
    rows = ["| attempt | begun | host | ranks | ended |", "| ---: | --- | --- | ---: | --- |"]
    for number, moment in enumerate(moments, 1):
        host, ranks, end = (tags.get(f"attempt.{number}.{what}", "") for what in ("host", "ranks", "end"))
        rows.append(f"| {number} | {moment} | {host} | {ranks} | {end} |")
    return "\n".join(rows)
