"""The beginning of an attempt on rank 0: what it finds and is given, recorded before the first step."""

import os
import shlex
import sys
import uuid
from dataclasses import asdict, replace
from typing import IO

import numpy as np
import torch

from pipeline.base.credentials import without_credentials
from pipeline.base.files import sqlite_path, sqlite_uri, write_atomically
from pipeline.base.logs import logger
from pipeline.base.provenance import collect_provenance
from pipeline.config import Config
from pipeline.data.samples import Dataset
from pipeline.models.bundle import CONTENT, Bundle, BundleError
from pipeline.parallel.rank import Rank
from pipeline.run.checkpoint import CheckpointError, Checkpoints, TrainingState
from pipeline.run.folder import RunError, RunFolder
from pipeline.run.journal import now_ms
from pipeline.run.records import DatasetRecord, Record, RunRecord
from pipeline.run.resume import changes, check_same_training
from pipeline.run.sweep import read_sweep_folder
from train.attempt.claim import Claim, Invocation
from train.build import build_schedule, build_spec
from train.output import NUM_SNAPSHOT_IMAGES, FolderOutput


def begin_attempt(call: Invocation, claim: Claim, rank: Rank, dataset: Dataset) -> FolderOutput:
    """Record the beginning of an attempt; return where it writes.

    Raises RunError, before anything is written, if the checkpoint belongs to another training.
    """
    config, folder = call.config, claim.folder
    _check_same_training(claim, config, dataset)
    journal, position = claim.open_journal(), claim.position
    bundle = Bundle(folder.model, build_spec(config, dataset), dataset.classes, dataset.mean, dataset.std)
    _check_same_model(bundle, claim)
    bundle.write()
    run_id = journal.run_id or (claim.state.identity.run_id if claim.state else uuid.uuid4().hex)
    prefix = f"attempt.{journal.num_attempts + 1}." if journal.run_id else ""
    checkpoints, saved_step = Checkpoints(config.checkpoint, folder), position.global_step if claim.state else None
    output = FolderOutput(folder, journal, checkpoints, bundle, run_id, prefix, saved_step)
    _write_snapshot_images(folder, dataset)
    tags, where = _tags(call, rank), os.path.relpath(folder.path)
    if journal.run_id is None:
        tags |= {"journal": f"lost up to step {saved_step}"} if claim.state else {}
        journal.append(*_new_run(config, folder, dataset, bundle, run_id), {"kind": "tags", "values": tags})
        logger.info("run %s: %s", folder.name, where)
    else:
        changed = changes(folder, config)
        output.tags(tags | {key: now for key, _, now in changed})
        logger.info("run %s continues behind step %d: %s", folder.name, position.global_step, where)
        for key, before, now in changed:
            logger.info("  from here on with %s=%s, which was %s", key, now, before)
    write_atomically(folder.config, config.to_yaml())
    folder.update_status(
        run_id=run_id,
        launch_id=call.launch.run_id,
        tracking_uri=without_credentials(tracking_uri(config)),
        fruitless_attempts=claim.num_fruitless_attempts,
        began_at_step=position.global_step,
        epoch=position.epoch,
        global_step=position.global_step,
    )
    output.begin({"host": tags["host"], "ranks": tags["world_size"]})
    return output


def restore_best(output: FolderOutput, state: TrainingState) -> TrainingState:
    """Write the best weights again where their file is not of the step of the best evaluation: an attempt was killed
    before it wrote them, or somebody removed them. Return the state, without a best if its weights are lost."""
    if state.best is None or output.bundle.step_of("best") == state.best.global_step:
        return state
    step = state.best.global_step
    try:
        of_best = state if state.position.global_step == step else output.checkpoints.load(step)
    except CheckpointError:
        logger.warning("the best weights, of step %d, are lost: from here on the best of what follows counts", step)
        return replace(state, best=None)
    output.save_best(of_best.model, step)
    return state


def _check_same_training(claim: Claim, config: Config, dataset: Dataset) -> None:
    if claim.state is not None:
        identity = claim.state.identity
        check_same_training(claim.folder, config, identity.config, identity.dataset_digest, dataset.digest)


def _check_same_model(bundle: Bundle, claim: Claim) -> None:
    """Raise RunError if the model of the checkpoints had other classes or another normalisation."""
    if claim.state is None or not (bundle.folder / CONTENT).exists():
        return
    try:
        known = Bundle.open(bundle.folder)
    except BundleError:  # lost or damaged: it is written again
        return
    pairs = {part: (getattr(known, part), getattr(bundle, part)) for part in ("classes", "mean", "std")}
    if changed := [f"{part} was {before}, is {now}" for part, (before, now) in pairs.items() if before != now]:
        raise RunError(
            f"run {claim.folder.name} is another training: {'; '.join(changed)}. Choose another run.name, or go back "
            f"to what {bundle.folder / CONTENT} says"
        )


def _new_run(config: Config, folder: RunFolder, dataset: Dataset, bundle: Bundle, run_id: str) -> list[Record]:
    """Return the first records of a journal."""
    uri = without_credentials(tracking_uri(config))
    run: RunRecord = {
        "kind": "run",
        "run_id": run_id,
        "name": folder.name,
        "experiment": config.tracking.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "convoy",
        "tracking_uri": uri,
        # as one would type it again
        "command": without_credentials(shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])),
        "timestamp_ms": now_ms(),
        "model": asdict(bundle.spec),
    }
    if sweep := read_sweep_folder(folder.path.parent):
        run["sweep"] = sweep
    steps = build_schedule(config, dataset).steps_per_epoch
    params = config.flat() | {"tracking.uri": uri, "steps_per_epoch": steps}
    data: DatasetRecord = {
        "kind": "dataset",
        "name": dataset.name,
        "digest": dataset.digest,
        "source": dataset.origin,
        "num_train": len(dataset.train),
        "num_eval": len(dataset.validation),
    }
    if dataset.test is not None:
        data["num_test"] = len(dataset.test)
    return [run, {"kind": "params", "values": params}, data]


def _tags(call: Invocation, rank: Rank) -> dict[str, str]:
    return collect_provenance(os.environ, call.root) | {
        "world_size": str(rank.world_size),
        "backend": rank.backend,
        "device": rank.device.type,
        "threads_per_rank": str(rank.num_threads),
        "config": call.config_name,
    }


def _write_snapshot_images(folder: RunFolder, dataset: Dataset) -> None:
    """Write the validation images whose predictions are recorded at each evaluation."""
    samples, count = dataset.validation, min(NUM_SNAPSHOT_IMAGES, len(dataset.validation))
    images = torch.stack([samples.read(index) for index in range(count)]).numpy()
    labels, names = samples.labels[:count].numpy(), np.array(dataset.classes)

    def write(file: IO[bytes]) -> None:
        np.savez_compressed(file, images=images, labels=labels, class_names=names)

    write_atomically(folder.path / "evaluation" / "samples.npz", write)


def tracking_uri(config: Config) -> str:
    """Return tracking.uri, else MLFLOW_TRACKING_URI, else the SQLite file that a bare `mlflow server` opens here."""
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path, (_, mark, options) = sqlite_path(uri), uri.partition("?")
    return uri if path is None or uri.startswith("sqlite:////") else sqlite_uri(path) + mark + options
