"""What a run has as files, from its folder to MLflow: config, figures, slides of predictions, models."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image

from pipeline.base.credentials import without_credentials
from pipeline.figures.of_run import draw_evaluation, draw_filters, draw_history, draw_samples
from pipeline.run.folder import RunFolder
from pipeline.run.published import Progress
from pipeline.tracking.description import describe_run
from pipeline.tracking.model_registry import file_digest, log_model, register, tie_to_metrics

Record = dict[str, Any]
LoadModel = Callable[[Path, Record], Any]
"""(run folder, `model` record) -> the network in eval mode, taking float32 pixels in 0..255."""

TAG_LENGTH = 8000
logger = logging.getLogger("convoy")


class Uploads:
    """Of one run. Methods raise what the server makes them raise; then they may be called again."""

    KINDS = ("predictions", "evaluation", "model", "artifact", "status")
    """Of records that come with files."""

    def __init__(self, folder: RunFolder, uri: str, progress: Progress, load_model: LoadModel, counts: Counter[str]):
        self._folder = folder
        self._uri = uri
        self._progress = progress
        self._load_model = load_model
        self._counts = counts

    def publish(self, client: MlflowClient, record: Record) -> None:
        match record["kind"]:
            case "predictions":
                self._log_predictions(client, record)
            case "evaluation":
                self._log_figures(client, partial(draw_evaluation, self._folder, record))
            case "model":
                self._log_model(client, record)
            case "artifact":
                self._log_file(client, self._folder.path / record["path"], str(Path(record["path"]).parent))
            case "status" if record["state"] == "running":  # each attempt may have other settings
                self._log_file(client, self._folder.config, "")

    def describe(self, client: MlflowClient, state: str) -> None:
        """The run as it is now: its curves, and in a few words."""
        self._log_figures(client, partial(draw_history, self._folder))
        description = without_credentials(describe_run(self._folder.journal, str(self._folder.path)))
        client.set_tag(self._run_id, "mlflow.note.content", description[:TAG_LENGTH])
        self._progress.store(described=state)

    @property
    def _run_id(self) -> str:
        return str(self._progress.get("mlflow_run_id"))

    def _log_artifact(self, client: MlflowClient, path: Path, place: str) -> None:
        client.log_artifact(self._run_id, str(path), place or None)
        self._counts["files"] += 1

    def _log_file(self, client: MlflowClient, path: Path, place: str) -> None:
        if not path.is_file():
            logger.warning("%s is gone: not logged", path.relative_to(self._folder.path))
            return
        self._log_artifact(client, path, place)

    def _log_figures(self, client: MlflowClient, draw: Callable[[], list[Path]]) -> None:
        """A figure that cannot be drawn must not keep what stands behind it in the journal from being published."""
        try:
            figures = draw()
        except Exception as error:
            logger.warning("a figure cannot be drawn: %s: %s", type(error).__name__, error)
            return
        for figure in figures:
            self._log_artifact(client, figure, "figures")

    def _log_predictions(self, client: MlflowClient, record: Record) -> None:
        """As a slide of the predictions, once: MLflow gives each upload a name of its own."""
        names = [Path(file.path).name for file in client.list_artifacts(self._run_id, "images")]
        # of its two files the last; MLflow separates with + or, in earlier versions, %
        if any(re.fullmatch(rf"predictions[+%]step[+%]{record['step']}[+%].*\.webp", name) for name in names):
            return
        try:
            image = Image.open(draw_samples(self._folder, record)).convert("RGB")
        except Exception as error:
            logger.warning("a figure cannot be drawn: %s: %s", type(error).__name__, error)
            return
        client.log_image(self._run_id, image, key="predictions", step=record["step"])
        self._counts["files"] += 1

    def _log_model(self, client: MlflowClient, record: Record) -> None:
        weights = self._folder.path / record["path"]
        if not weights.is_file() or file_digest(weights) != record["sha256"]:
            logger.warning("%s is gone, or was replaced by a later one: not logged", record["path"])
            return
        try:
            model = self._load_model(self._folder.path, record)
            self._log_figures(client, partial(draw_filters, self._folder, model))
            model_id = log_model(self._folder, client, self._uri, self._run_id, record, model)
            tie_to_metrics(self._folder, client, self._run_id, record, model_id)
            self._counts["models"] += 1
            self._progress.store(model_id=model_id)
            if record.get("register"):
                outcome = register(self._folder, client, self._run_id, record, model_id)
                logger.info("%s", outcome)
                self._progress.store(model_outcome=outcome)
        except (MlflowException, OSError):
            raise  # the server; tried again
        except Exception as error:
            logger.warning("the model cannot be logged, its weights are in %s: %s", record["path"], error)
