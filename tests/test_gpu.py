"""What only a GPU can show. `pytest tests/test_gpu.py` on a machine that has one; mlflow is not needed there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SYNTHETIC = (
    "data.dataset=synthetic",
    "data.synthetic_train_size=2048",
    "data.global_batch_size=64",
    "optim.schedule=constant",
    "train.epochs=2",
    "tracking.enabled=false",
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def train(folder: Path, name: str, *settings: str, ranks: int = 1) -> list[dict[str, float | str]]:
    """The metrics of a training that finished."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, str(ROOT / "train" / "main.py"), *SYNTHETIC, f"run.name={name}", *settings]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (folder / "runs" / name / "journal.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "metric"]


def losses(metrics: list[dict[str, float | str]]) -> list[float]:
    return [float(record["value"]) for record in metrics if record["key"] == "train/loss"]


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
def test_each_precision_learns(tmp_path: Path, precision: str) -> None:
    values = losses(train(tmp_path, precision, f"train.precision={precision}"))
    assert values[-1] < 0.5 * values[0]


def test_a_rank_takes_the_gpu_by_itself(tmp_path: Path) -> None:
    train(tmp_path, "auto")
    tags = (tmp_path / "runs" / "auto" / "journal.jsonl").read_text()
    assert '"device":"cuda"' in tags


def test_two_ranks_on_one_gpu_over_gloo_train_as_one(tmp_path: Path) -> None:
    exact = ("train.precision=fp64", "model.dropout=0", "model.dropout2d=0", "train.backend=gloo")
    one = losses(train(tmp_path, "one", *exact))
    two = losses(train(tmp_path, "two", *exact, ranks=2))
    assert one == pytest.approx(two, abs=1e-9)


def test_streamed_data_train_as_resident_data(tmp_path: Path) -> None:
    resident = losses(train(tmp_path, "resident", "data.placement=device", "train.precision=fp64"))
    streamed = losses(train(tmp_path, "streamed", "data.placement=workers", "train.precision=fp64"))
    assert resident == pytest.approx(streamed, abs=1e-9)


def test_more_ranks_than_gpus_are_explained(tmp_path: Path) -> None:
    ranks = torch.cuda.device_count() + 1
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, str(ROOT / "train" / "main.py"), *SYNTHETIC]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "two ranks on one GPU cannot use NCCL" in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
