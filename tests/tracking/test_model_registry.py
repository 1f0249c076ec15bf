"""The logged model: once, tied to its evaluation, and champion only where it is better."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from pipeline.models.bundle import TRUST_VARIABLE, Bundle
from pipeline.models.catalog import ModelSpec
from pipeline.run.folder import RunFolder
from pipeline.run.journal import Journal
from pipeline.run.published import Progress
from pipeline.tracking.publisher import Publisher, follow
from tests.records import run_record

NAME = "digits classifier"
MODEL = f"{__name__}:linear"


class Run:
    """A run folder whose journal holds one evaluated model, which is quick to export."""

    def __init__(self, root: Path, name: str, **metrics: float):
        self.folder = RunFolder(root / "runs" / name)
        self.folder.path.mkdir(parents=True)
        self.folder.config.write_text("run: {}\n")
        self.bundle = Bundle(self.folder.model, ModelSpec(MODEL, {}, 1, 4, 3), ("a", "b", "c"), (0.5,), (0.5,))
        self.bundle.write()
        torch.manual_seed(len(name) + ord(name[0]))
        self.bundle.save("best", self.bundle.spec.build().state_dict(), 7)
        self.journal = Journal(self.folder.journal)
        self.journal.append(run_record(name))
        self.journal.status("running")
        self.journal.metrics(metrics, 7)
        self.journal.metrics({"eval/accuracy": 0.123}, 9)  # the last evaluation, which is not that of the model

    def record(self, *, register: str | None = NAME, metric: str = "eval/accuracy", digest: str = "d1") -> None:
        self.journal.append(
            {
                "kind": "model",
                "path": "model/best.safetensors",
                "sha256": hashlib.sha256(self.bundle.path("best").read_bytes()).hexdigest(),
                "step": 7,
                "metric": metric,
                "dataset": "digits",
                "dataset_digest": digest,
                "register": register,
            }
        )

    def publish(self, uri: str) -> Publisher:
        publisher = Publisher(self.folder, uri)
        publisher.drain()
        return publisher


def linear(channels: int, image_size: int, num_classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * image_size**2, num_classes))


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_a_model_is_logged_once_and_shows_the_evaluation_it_had(tmp_path: Path, uri: str) -> None:
    run = Run(tmp_path, "one", **{"eval/accuracy": 0.75, "eval/loss": 0.5})
    run.record(register=None)
    run.publish(uri)
    (run.folder.path / "published.json").unlink()
    run.publish(uri)
    client = MlflowClient(tracking_uri=uri)
    (logged,) = client.search_logged_models([client.get_experiment_by_name("test").experiment_id])
    assert (logged.name, logged.status.name) == ("tests-tracking-test_model_registry-linear", "READY")
    metrics = {metric.key: (metric.value, metric.step) for metric in client.get_logged_model(logged.model_id).metrics}
    assert metrics == {"eval/accuracy": (0.75, 7), "eval/loss": (0.5, 7)}
    history = client.get_metric_history(logged.source_run_id, "eval/accuracy")
    assert sorted((point.step, point.value) for point in history) == [(7, 0.75), (9, 0.123)]
    assert client.search_registered_models() == []


@pytest.mark.parametrize(
    ("metric", "first", "second", "champion"),
    [
        ("eval/accuracy", 0.75, 0.8, "2"),
        ("eval/accuracy", 0.75, 0.75, "1"),
        ("eval/accuracy", 0.75, 0.7, "1"),
        ("eval/loss", 0.5, 0.4, "2"),
        ("eval/loss", 0.5, 0.6, "1"),
    ],
)
def test_the_champion_gives_way_only_to_a_better_one(
    tmp_path: Path, uri: str, metric: str, first: float, second: float, champion: str
) -> None:
    for name, value in (("one", first), ("two", second)):
        run = Run(tmp_path, name, **{metric: value})
        run.record(metric=metric)
        run.publish(uri)
    client = MlflowClient(tracking_uri=uri)
    assert client.get_model_version_by_alias(NAME, "champion").version == int(champion)
    assert len(client.search_model_versions(f"name = '{NAME}'")) == 2


def test_registering_again_changes_nothing(tmp_path: Path, uri: str) -> None:
    run = Run(tmp_path, "one", **{"eval/accuracy": 0.75})
    run.record()
    run.publish(uri)
    (run.folder.path / "published.json").unlink()
    run.publish(uri)
    (version,) = MlflowClient(tracking_uri=uri).search_model_versions(f"name = '{NAME}'")
    assert version.tags["value"] == "0.75"


@pytest.mark.parametrize("other", [{"metric": "eval/loss"}, {"digest": "d2"}])
def test_what_cannot_be_compared_does_not_become_champion(
    tmp_path: Path,
    uri: str,
    other: dict[str, str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("convoy"), "propagate", True)
    first = Run(tmp_path, "one", **{"eval/accuracy": 0.1})
    first.record()
    first.publish(uri)
    second = Run(tmp_path, "two", **{"eval/accuracy": 0.9, "eval/loss": 0.1})
    second.record(**other)
    with caplog.at_level("INFO", logger="convoy"):
        second.publish(uri)
    assert "champion stays version 1: it cannot be compared" in caplog.text
    assert MlflowClient(tracking_uri=uri).get_model_version_by_alias(NAME, "champion").version == 1


def test_a_model_whose_metric_is_not_finite_is_registered_and_no_champion(tmp_path: Path, uri: str) -> None:
    run = Run(tmp_path, "one", **{"eval/loss": float("nan")})
    run.record(metric="eval/loss")
    run.publish(uri)
    client = MlflowClient(tracking_uri=uri)
    assert len(client.search_model_versions(f"name = '{NAME}'")) == 1
    assert client.get_registered_model(NAME).aliases == {}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("best.safetensors", None, "best.safetensors is gone; mend that and sync again, or remove the folder model/"),
        ("best.safetensors", b"other bytes", "best.safetensors is not as it was written; mend that and sync again"),
        ("model.json", None, "model.json cannot be read: No such file"),
        ("model.json", b"{}", "model.json is damaged"),
    ],
)
def test_a_model_that_cannot_be_read_is_not_called_published_and_a_later_sync_has_it(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture, name: str, content: bytes | None, reason: str
) -> None:
    run = Run(tmp_path, "one", **{"eval/accuracy": 0.75})
    run.record()
    run.journal.status("finished")
    file = run.folder.model / name
    sound = file.read_bytes()
    file.unlink() if content is None else file.write_bytes(content)
    publisher = Publisher(run.folder, uri)
    assert not follow(publisher, lambda: False)
    assert reason in caplog.text
    assert not Progress(run.folder, uri).is_complete()
    assert MlflowClient(tracking_uri=uri).search_registered_models() == []
    (mlflow_run,) = MlflowClient(tracking_uri=uri).search_runs(["1"])
    assert mlflow_run.info.status == "FINISHED"  # all else is there
    file.write_bytes(sound)
    again = Publisher(run.folder, uri)
    assert follow(again, lambda: False)
    assert again.counts["models"] == 1
    assert Progress(run.folder, uri).is_complete()


def test_a_model_that_a_later_training_replaced_is_not_missed(tmp_path: Path, uri: str) -> None:
    run = Run(tmp_path, "one", **{"eval/accuracy": 0.75})
    run.record()
    run.journal.status("finished")
    run.journal.status("running")
    run.bundle.save("best", {key: value + 1 for key, value in run.bundle.load_weights("best").items()}, 7)
    run.record()
    run.journal.status("finished")
    publisher = Publisher(run.folder, uri)
    assert follow(publisher, lambda: False)
    assert publisher.counts["models"] == 1


def test_a_model_that_may_not_be_imported_waits_for_a_sync_that_may(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, "one", **{"eval/accuracy": 0.75})
    run.record()
    run.journal.status("finished")
    monkeypatch.delenv(TRUST_VARIABLE)
    assert not follow(Publisher(run.folder, uri), lambda: False)
    assert f"{TRUST_VARIABLE}=1" in caplog.text
    assert "tracking does not work" not in caplog.text
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    assert follow(Publisher(run.folder, uri), lambda: False)


def test_a_lost_model_is_missed_though_an_equal_one_was_recorded_before(tmp_path: Path, uri: str) -> None:
    run = Run(tmp_path, "one", **{"eval/accuracy": 0.75})
    run.record()
    run.journal.status("running")
    run.record()
    run.journal.status("finished")
    run.bundle.path("best").unlink()
    assert not follow(Publisher(run.folder, uri), lambda: False)


def test_a_run_whose_folder_of_models_was_removed_is_published_without_them(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path, "one", **{"eval/accuracy": 0.75})
    run.record()
    run.journal.status("finished")
    shutil.rmtree(run.folder.model)
    assert follow(Publisher(run.folder, uri), lambda: False)
    assert "model was removed: the model is not logged" in caplog.text
    assert Progress(run.folder, uri).is_complete()


def no_model(channels: int, image_size: int, num_classes: int) -> torch.nn.Module:
    raise AssertionError("Torch not compiled with CUDA enabled")


class Unexportable(torch.nn.Linear):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1)
        return super().forward(flat if bool(flat.sum() > 1e9) else 2 * flat)  # depends on values: cannot be traced


def unexportable(channels: int, image_size: int, num_classes: int) -> torch.nn.Module:
    return Unexportable(channels * image_size**2, num_classes)


@pytest.mark.parametrize(
    ("model", "is_published", "message"),
    [
        ("no_model", False, "does not fit .*AssertionError: Torch not compiled with CUDA enabled"),
        ("unexportable", True, "the model cannot be logged, its weights are in model/best.safetensors: "),
    ],
)
def test_a_model_that_cannot_be_built_or_exported_holds_up_nothing(
    tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture, model: str, is_published: bool, message: str
) -> None:
    run = Run(tmp_path, "one", **{"eval/accuracy": 0.75})
    replace(run.bundle, spec=ModelSpec(f"{__name__}:{model}", {}, 1, 4, 3)).write()
    if model == "unexportable":
        run.bundle.save("best", unexportable(1, 4, 3).state_dict(), 7)
    run.record()
    run.journal.append({"kind": "artifact", "path": "config.yaml"})
    run.journal.status("finished")
    publisher = Publisher(run.folder, uri)
    assert follow(publisher, lambda: False) is is_published
    assert re.search(message, caplog.text)
    assert publisher.counts["files"] >= 2  # what comes behind the model
    (mlflow_run,) = MlflowClient(tracking_uri=uri).search_runs(["1"])
    assert mlflow_run.info.status == "FINISHED"
