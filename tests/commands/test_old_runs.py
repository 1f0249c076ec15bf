"""A run folder of an earlier version, with a journal of version 1 and .pt files: all is published, a report reads it.

`old_run` was made by that version: net_conv10_20 on 16x16 images of the synthetic dataset, trained for an epoch, then
for another one with a lower learning rate. Checkpoints, final weights and most of the system metrics are left out.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from pipeline.__main__ import main
from pipeline.models.networks import net_conv10_20
from tests.tracking.history import differences, find_runs, recorded_history, stored_history

FIGURES = {f"figures/{name}.png" for name in ("confusion_matrix", "filters", "learning_curves", "samples", "wrong")}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return shutil.copytree(Path(__file__).with_name("old_run"), tmp_path / "old")


def test_it_is_published_with_its_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert main(["sync", str(run), "--uri", uri]) == 0
    assert "2  published to" in capsys.readouterr().out
    client = MlflowClient(uri)
    (found,) = find_runs(client, run)
    run_id = found.info.run_id
    assert found.info.status == "FINISHED"
    assert differences(recorded_history(run), stored_history(client, run_id)) == []
    assert found.data.params["data.synthetic_classes"] == "4"
    assert found.data.tags["attempt.2.optim.lr"] == "0.05"
    assert "optim.lr `1.0`, then `0.05`" in found.data.tags["mlflow.note.content"]
    assert {file.path for file in client.list_artifacts(run_id, "figures")} == FIGURES
    images = {file.path for file in client.list_artifacts(run_id, "images") if file.path.endswith(".webp")}
    assert len(images) == 2  # of each evaluation
    (version,) = client.search_model_versions("name = 'kept'")
    assert version.tags["value"] == "1.0"
    assert_answers_like_the_weights(uri, "models:/kept@champion", run / "model" / "best.pt")
    assert {path.name for path in (run / "model").iterdir()} == {"best.pt"}
    assert main(["sync", str(run), "--uri", uri]) == 0
    assert "already published" in capsys.readouterr().out


def assert_answers_like_the_weights(uri: str, model_uri: str, weights: Path) -> None:
    model = net_conv10_20(1, 16, 4).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 16, 16)).astype(np.float32)
    with torch.no_grad():
        expected = model((torch.from_numpy(pixels) / 255 - 0.498) / 0.2049)
    mlflow.set_tracking_uri(uri)
    logged = mlflow.pyfunc.load_model(model_uri)
    np.testing.assert_allclose(logged.predict(pixels), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_a_report_reads_it(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert main(["report", str(run), "--out", str(page)]) == 0
    text = page.read_text()
    assert "net_conv10_20" in text
    assert "0.05" in text
    assert "100.00%" in text
