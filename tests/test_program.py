"""The program as its users start it: torchrun, a run folder, MLflow, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline.config import Config
from pipeline.data.build import list_dataset
from pipeline.data.samples import PixelSamples
from tests.servers import free_port, mlflow_server

ROOT = Path(__file__).parents[1]
MAIN = ROOT / "train" / "main.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
SIZES = ("data.arguments.image_size=12", "data.arguments.train_size=640", "data.arguments.validation_size=64")
TINY = ("data.dataset=synthetic", *SIZES)


def torchrun(folder: Path, *arguments: str, ranks: int = 2, script: Path = MAIN) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, f"--nproc_per_node={ranks}", str(script), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


def main(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(MAIN), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


def main_with_fault(folder: Path, fault: str) -> Path:
    """A script that is train/main.py, but for lines of code that run before each step."""
    script = folder / "main_with_fault.py"
    script.write_text(
        f"""
import os, pathlib, sys, time
sys.path[0] = {str(ROOT)!r}
from train.main import main
from train.steps.eager import EagerStep

step, rank = EagerStep.__call__, int(os.environ["RANK"])

def step_with_fault(self, batch, global_step):
{textwrap.indent(textwrap.dedent(fault), "    ")}
    return step(self, batch, global_step)

EagerStep.__call__ = step_with_fault
sys.exit(main())
"""
    )
    return script


def journal(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Digits:
    """The main job, run once for all tests that look at what it leaves."""

    folder: Path
    run: Path
    lines: list[str]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    folder = tmp_path_factory.mktemp("digits")
    done = torchrun(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (folder / "runs").iterdir()
    return Digits(folder, run, done.stdout.splitlines())


def client(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


def mlflow_runs(folder: Path) -> list[Any]:
    store = client(folder)
    return list(store.search_runs([store.get_experiment_by_name("convoy").experiment_id]))


def test_the_main_job_recognises_97_percent_of_the_digits(digits: Digits) -> None:
    accuracies = [r["value"] for r in journal(digits.run) if r.get("key") == "eval/accuracy"]
    assert len(accuracies) == 20
    assert accuracies[-1] >= 0.97


def test_its_first_and_last_lines_say_what_was_trained_on_and_how_to_look_at_it(digits: Digits) -> None:
    assert "embedded digits" in digits.lines[0]
    assert "embedded digits" in digits.lines[-1]
    assert "data.dataset=mnist" in digits.lines[-1]
    assert re.search(r"predicted \d \(.*%.*\), truth \d", digits.lines[-5])
    (run,) = mlflow_runs(digits.folder)
    (logged,) = client(digits.folder).search_logged_models([run.info.experiment_id])
    assert f"models:/{logged.model_id}" in digits.lines[-3]
    assert "mlflow server" in digits.lines[-2]
    assert f"/runs/{run.info.run_id}" in digits.lines[-2]


def test_it_leaves_one_finished_run_with_params_tags_and_dataset(digits: Digits) -> None:
    (run,) = mlflow_runs(digits.folder)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == digits.run.name
    config = yaml.safe_load((digits.run / "config.yaml").read_text())
    assert run.data.params["optim.lr"] == str(config["optim"]["lr"]) == "1.0"
    assert run.data.params["data.global_batch_size"] == "32"
    assert {"host", "torch", "mlflow.source.git.commit", "git.dirty"} <= run.data.tags.keys()
    assert (run.data.tags["world_size"], run.data.tags["backend"], run.data.tags["device"]) == ("2", "gloo", "cpu")
    records = journal(digits.run)
    assert run.info.start_time == records[0]["timestamp_ms"]
    assert run.info.end_time == records[-1]["timestamp_ms"]
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "digits"


def test_its_curves_in_mlflow_are_those_of_the_journal(digits: Digits) -> None:
    recorded: dict[str, list[tuple[int, float]]] = {}
    for record in journal(digits.run):
        if record["kind"] == "metric":
            recorded.setdefault(record["key"], []).append((record["step"], record["value"]))
    assert set(recorded) == {
        *("train/loss", "train/accuracy", "train/lr", "eval/loss", "eval/accuracy"),
        *("perf/images_per_second", "perf/epoch_seconds"),
        *(f"time/{phase}_ms" for phase in ("data", "forward", "backward", "communication", "update", "other")),
        *("time/slowest_rank", "time/imbalance", "time/evaluation_seconds", "time/save_seconds"),
        *(f"startup/{phase}_seconds" for phase in ("imports", "config", "ranks", "claim", "data", "run_folder")),
        *("startup/build_seconds", "startup/first_step_seconds", "startup/total_seconds"),
    }
    (run,) = mlflow_runs(digits.folder)
    for key, points in recorded.items():
        published = client(digits.folder).get_metric_history(run.info.run_id, key)
        assert sorted((p.step, p.value) for p in published) == sorted(points)


def test_it_leaves_figures(digits: Digits) -> None:
    (run,) = mlflow_runs(digits.folder)
    published = {artifact.path for artifact in client(digits.folder).list_artifacts(run.info.run_id, "figures")}
    names = ("learning_curves", "confusion_matrix", "samples", "wrong", "filters")
    assert published == {f"figures/{name}.png" for name in names}
    for name in names:
        assert (digits.run / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_its_model_loads_without_unpickling_and_answers_as_it_was_evaluated(
    digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    mlflow.set_tracking_uri(f"sqlite:///{digits.folder / 'mlflow.db'}")
    (run,) = mlflow_runs(digits.folder)
    (logged,) = client(digits.folder).search_logged_models([run.info.experiment_id])
    assert logged.source_run_id == run.info.run_id
    model = mlflow.pyfunc.load_model(f"models:/{logged.model_id}")
    best = best_evaluation(digits.run)
    predicted = next(r for r in journal(digits.run) if r["kind"] == "predictions" and r["step"] == best["step"])
    with np.load(digits.run / "evaluation" / "samples.npz") as samples:
        output = torch.from_numpy(model.predict(samples["images"].astype(np.float32)))
    assert output.argmax(1).tolist() == predicted["predicted"]
    torch.testing.assert_close(output.exp().amax(1), torch.tensor(predicted["confidence"]), rtol=0, atol=1e-4)


def best_evaluation(run: Path) -> dict[str, Any]:
    """The metric record of the first of the best accuracies."""
    accuracies = [r for r in journal(run) if r.get("key") == "eval/accuracy"]
    return max(accuracies, key=lambda record: record["value"])


def test_its_logged_model_is_that_of_the_best_evaluation(digits: Digits) -> None:
    (run,) = mlflow_runs(digits.folder)
    (logged,) = client(digits.folder).search_logged_models([run.info.experiment_id])
    metrics = {m.key: (m.step, m.value) for m in client(digits.folder).get_logged_model(logged.model_id).metrics}
    best = best_evaluation(digits.run)
    assert metrics["eval/accuracy"] == (best["step"], best["value"])


def test_its_model_served_over_http_answers_for_every_test_image_as_it_was_evaluated(digits: Digits) -> None:
    """Without unpickling, and 100 images a request: the accuracy of the answers is that of the best evaluation."""
    (run,) = mlflow_runs(digits.folder)
    (logged,) = client(digits.folder).search_logged_models([run.info.experiment_id])
    samples = list_dataset(Config().data, seed=0).validation
    assert isinstance(samples, PixelSamples)
    num_right = 0
    with served_model(digits.folder, logged.model_id) as url:
        for images, labels in zip(torch.split(samples.pixels, 100), torch.split(samples.labels, 100), strict=True):
            num_right += int((torch.tensor(ask(url, images.tolist())).argmax(1) == labels).sum())
    assert num_right / len(samples) == best_evaluation(digits.run)["value"]


@contextmanager
def served_model(folder: Path, model_id: str) -> Iterator[str]:
    port = free_port()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # mlflow calls uvicorn by its name
    settings = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}", "PATH": path}
    command = ["models", "serve", "-m", f"models:/{model_id}", "--env-manager", "local", "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *command, "--host", "127.0.0.1"],
        env={**os.environ, **settings, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for(lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}/health"))
        assert process.poll() is None, "it ended"
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(url: str, images: list[Any]) -> list[list[float]]:
    request = urllib.request.Request(
        url, data=json.dumps({"inputs": images}).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        predictions: list[list[float]] = json.loads(answer.read())["predictions"]
    return predictions


def test_snapshots_of_its_predictions_can_be_seen_over_the_training(digits: Digits) -> None:
    (run,) = mlflow_runs(digits.folder)
    images = client(digits.folder).list_artifacts(run.info.run_id, "images")
    steps = [int(re.split("[+%]", Path(image.path).name)[2]) for image in images if image.path.endswith(".webp")]
    assert sorted(steps) == [r["step"] for r in journal(digits.run) if r.get("key") == "eval/accuracy"]


def test_it_says_what_it_is_and_who_did_it(digits: Digits) -> None:
    (run,) = mlflow_runs(digits.folder)
    note = run.data.tags["mlflow.note.content"]
    assert "**finished**: accuracy 9" in note
    assert "```\n" in note and "train/main.py" in note
    assert (run.data.tags["attempt.1.ranks"], run.data.tags["attempt.1.end"]) == ("2", "finished")


def test_its_weights_load_without_code_and_have_unwrapped_names(digits: Digits) -> None:
    for name in ("final", "best"):
        weights = load_file(digits.run / "model" / f"{name}.safetensors")
        assert sorted(weights)[:2] == ["conv1.bias", "conv1.weight"]


def test_a_bare_mlflow_server_in_that_folder_shows_it(digits: Digits) -> None:
    with mlflow_server(digits.folder) as url:
        request = urllib.request.Request(
            f"{url}/api/2.0/mlflow/runs/search",
            data=json.dumps({"experiment_ids": ["1"]}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            (run,) = json.loads(answer.read())["runs"]
        assert run["info"]["status"] == "FINISHED"
        run_id = run["info"]["run_id"]
        figure = f"{url}/get-artifact?path=figures/learning_curves.png&run_uuid={run_id}"
        with urllib.request.urlopen(figure, timeout=30) as answer:
            assert answer.read() == (digits.run / "figures" / "learning_curves.png").read_bytes()
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert b"<html" in answer.read()


def test_mnist_trains_from_files_at_hand(mnist_root: Path, tmp_path: Path) -> None:
    """The whole path on real MNIST; the accuracy of the full recipe stands in its header."""
    settings = ("data.dataset=mnist", f"data.root={mnist_root}", "train.epochs=1", "tracking.enabled=false")
    done = torchrun(tmp_path, *settings, "model.name=net_conv10_20", "data.global_batch_size=256", "run.name=mnist")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "digits" not in done.stdout
    points = {r["key"]: r["value"] for r in journal(tmp_path / "runs" / "mnist") if r["kind"] == "metric"}
    assert points["eval/accuracy"] > 0.95


def test_a_training_stopped_by_a_signal_goes_on_in_the_same_mlflow_run(tmp_path: Path) -> None:
    """With DataLoader workers, which the signal to the process group reaches too."""
    settings = (*TINY, "train.epochs=8", "run.name=stopped", "data.placement=workers", "data.workers=1")
    command = [*TORCHRUN, "--nproc_per_node=2", str(MAIN), *settings]
    run = tmp_path / "runs" / "stopped"
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        _wait_for(lambda: run.is_dir() and any((run / "checkpoints").glob("step-*")))
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "preempted", output
    assert 0 < status["global_step"] < 160
    assert "to continue, the same command with run.name=stopped" in output
    wait_until_shown(run, "preempted")  # the training waits 10 s at most for its publisher
    assert [r.info.status for r in mlflow_runs(tmp_path)] == ["KILLED"]
    done = torchrun(tmp_path, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"continues behind step {status['global_step']}" in done.stdout
    (resumed,) = mlflow_runs(tmp_path)
    assert resumed.info.status == "FINISHED"
    points = client(tmp_path).get_metric_history(resumed.info.run_id, "train/loss")
    assert sorted(point.step for point in points) == list(range(10, 161, 10))


def wait_until_shown(run: Path, state: str) -> None:
    """In MLflow, by the publisher, which outlives a training for a moment; only then may others open the store."""
    published = run / "published.json"
    _wait_for(lambda: published.exists() and f'"mlflow_state": "{state}"' in published.read_text())


def _wait_for(condition: Any, timeout: float = 90.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.05)


def test_a_wrong_config_ends_with_2_and_under_torchrun_its_message_comes_once(tmp_path: Path) -> None:
    alone = main(tmp_path, "train.epoch=3")
    assert alone.returncode == 2
    assert "did you mean train.epochs?" in alone.stderr
    assert "Traceback" not in alone.stderr
    many = torchrun(tmp_path, "train.epoch=3", ranks=4)
    assert many.returncode == 1
    assert (many.stdout + many.stderr).count("did you mean train.epochs?") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    done = main(tmp_path, *TINY, "run.dir=/proc/runs")
    assert done.returncode == 1
    assert "set run.dir to a folder that can be" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_dataset_that_cannot_be_had_is_said_once_and_leaves_nothing(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "data.dataset=mnist", "data.download=false", "run.name=none")
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert output.count("train-images-idx3-ubyte") == 1
    assert "data/MNIST/raw" in output
    assert not (tmp_path / "runs").exists()


def test_an_exception_on_one_rank_ends_all_and_is_what_the_user_reads(tmp_path: Path) -> None:
    script = main_with_fault(
        tmp_path,
        f"""
        if rank == 2 and global_step == 15:
            time.sleep(2)  # so that the launcher's signal comes before the loss of the connection is seen
        if rank == 1 and global_step == 15:
            pathlib.Path({str(tmp_path / "cause")!r}).write_text(str(time.time()))
            raise ArithmeticError("the cause")
        """,
    )
    done = torchrun(tmp_path, *TINY, "run.name=failing", "train.hang_timeout=100", ranks=3, script=script)
    failed = json.loads((tmp_path / "cause").read_text())
    assert time.time() - failed < 15, "the others waited for a time-out"
    assert done.returncode == 1
    assert "ArithmeticError: the cause" in done.stderr
    root_cause = done.stderr[done.stderr.index("Root Cause") :]
    assert "ArithmeticError: the cause" in root_cause
    assert json.loads((tmp_path / "runs" / "failing" / "status.json").read_text())["state"] == "failed"
    wait_until_shown(tmp_path / "runs" / "failing", "failed")
    assert [run.info.status for run in mlflow_runs(tmp_path)] == ["FAILED"]


def test_a_killed_rank_is_restarted_by_torchrun_in_the_same_run(tmp_path: Path) -> None:
    script = main_with_fault(
        tmp_path,
        """
        if rank == 1 and global_step == 30 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), 9)
        """,
    )
    command = [*TORCHRUN, "--nproc_per_node=3", "--max-restarts=1", str(script), *TINY, "train.epochs=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continues behind step 20" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()  # found again without a name
    points = [r["step"] for r in journal(run) if r.get("key") == "train/loss"]
    assert points == [10, 20, 30, 40, 50, 60]
    assert [r.info.status for r in mlflow_runs(tmp_path)] == ["FINISHED"]


def start_node(command: list[str], folder: Path, name: str) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)


def test_a_job_that_loses_a_node_goes_on_with_the_others(tmp_path: Path) -> None:
    """Two launchers stand for two nodes of one rank each; one is killed with its rank, and the other goes on alone."""
    port = free_port()
    settings = (*TINY, "train.epochs=100", "run.name=shrinking", "tracking.enabled=false", "checkpoint.every_steps=10")
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=shrinking"]
    command = [*TORCHRUN[:-1], "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=2", *rendezvous, str(MAIN)]
    status = tmp_path / "runs" / "shrinking" / "status.json"

    def reached(step: int) -> bool:
        return status.exists() and json.loads(status.read_text()).get("global_step", 0) >= step

    with ExitStack() as stack:
        first = stack.enter_context(start_node([*command, *settings], tmp_path, "first"))
        time.sleep(3)  # so that it is the first that has the store
        second = stack.enter_context(start_node([*command, *settings], tmp_path, "second"))
        _wait_for(lambda: reached(20))
        world = [r["values"]["world_size"] for r in journal(status.parent) if "world_size" in r.get("values", {})]
        second.kill()  # its rank finds itself without a launcher, and leaves
        before = json.loads(status.read_text())["global_step"]
        _wait_for(lambda: reached(before + 200), timeout=150)
        first.terminate()
        first.wait(60)
    resumed = [r["values"] for r in journal(status.parent) if "attempt.2.world_size" in r.get("values", {})]
    assert world == ["2"]
    assert resumed[0]["attempt.2.world_size"] == "1"


def test_a_folder_whose_training_is_alive_is_refused_with_its_holder_named(tmp_path: Path) -> None:
    settings = (*TINY, "train.epochs=200", "run.name=busy", "tracking.enabled=false")
    command = [sys.executable, str(MAIN), *settings]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        _wait_for(lambda: (tmp_path / "runs" / "busy" / "journal.jsonl").exists())
        second, plan = main(tmp_path, *settings), main(tmp_path, *settings, "--dry-run")
        process.kill()
    assert (second.returncode, plan.returncode) == (1, 1)
    assert "being trained right now" in plan.stderr
    assert f"being trained right now by process {process.pid} on {os.uname().nodename}" in second.stdout
    assert "Traceback" not in second.stdout + second.stderr


def test_without_tracking_the_journal_has_everything_and_sync_publishes_it(tmp_path: Path) -> None:
    done = main(tmp_path, *TINY, "train.epochs=2", "run.name=quiet", "tracking.enabled=false")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "mlflow.db").exists()
    assert "python -m pipeline sync runs/quiet" in done.stdout
    sync = [sys.executable, "-m", "pipeline", "sync", "runs/quiet"]
    for _ in range(2):
        synced = subprocess.run(
            sync, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
        )
        assert synced.returncode == 0, synced.stderr
    (run,) = mlflow_runs(tmp_path)
    assert run.info.status == "FINISHED"
    assert len(client(tmp_path).get_metric_history(run.info.run_id, "train/loss")) == 4
