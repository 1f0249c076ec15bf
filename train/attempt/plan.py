"""The plan of a training, without starting it: `--dry-run`."""

import json
import os
import sys
from pathlib import Path

from pipeline.data.build import list_dataset
from pipeline.data.samples import DataError, Dataset
from pipeline.learning.update import choose_precision
from pipeline.models.catalog import ModelSpec, describe_layers
from pipeline.parallel.start import choose_device, num_threads
from pipeline.run.folder import RunError, RunFolder, batch_run_name, is_being_trained, wait_until_free
from pipeline.run.resume import changes, check_same_training, is_finished
from train.attempt.claim import Invocation, load_state
from train.build import build_schedule, build_spec


def show_plan(call: Invocation) -> int:
    """Print the plan on rank 0; return the exit code, 1 if a training could not start here."""
    if call.launch.rank > 0:
        return 0
    try:
        print(describe_plan(call))
    except (DataError, RunError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def describe_plan(call: Invocation) -> str:
    """Return resolved config, model, data, steps and run folder as text; its last line is JSON for scripts.

    Raises DataError or RunError for what would keep a training from starting here.
    """
    config, launch = call.config, call.launch
    dataset = list_dataset(config.data, config.run.seed)
    schedule = build_schedule(config, dataset)
    device = choose_device(launch, config.train.device, config.train.backend)
    batch_size = min(config.data.global_batch_size, len(dataset.train))
    folder = _folder(call)
    return "\n".join(
        (
            config.to_yaml(),
            _describe_model(build_spec(config, dataset)),
            f"data: {_describe_data(dataset)}; {_check_files(call, dataset)}",
            f"steps: {schedule.steps_per_epoch:,} an epoch of {batch_size} images each, "
            f"{schedule.total_steps:,} in all",
            f"ranks: {launch.world_size}, each on {device.type} in "
            f"{choose_precision(config.train.precision, device)} with "
            f"{num_threads(config.train, launch)} thread(s)",
            f"run: {_check_run(call, RunFolder(folder))}",
            f"run folder: {folder}",
            json.dumps({"run_folder": str(folder)}),
        )
    )


def _describe_data(dataset: Dataset) -> str:
    sizes = {"training": dataset.train, "validation": dataset.validation, "test": dataset.test}
    splits = " and ".join(f"{len(samples):,} {name}" for name, samples in sizes.items() if samples is not None)
    shape = f"{dataset.channels}x{dataset.image_size}x{dataset.image_size}"
    return f"{dataset.name}, {splits} images of {shape} in {len(dataset.classes)} classes; {dataset.origin}"


def _check_files(call: Invocation, dataset: Dataset) -> str:
    data = call.config.data
    if dataset.files is None:
        return "made when it starts"
    if data.download and dataset.files.missing():
        return f"not in {data.root} yet, will be downloaded"
    dataset.files.prepare(download=False)
    return "here and sound"


def _folder(call: Invocation) -> Path:
    name = call.config.run.name or batch_run_name(os.environ) or f"{call.config_name}-<date>-<time>"
    return Path(call.config.run.dir).absolute() / name


def _check_run(call: Invocation, folder: RunFolder) -> str:
    config, launch = call.config, call.launch
    if not folder.path.exists():
        load_state(call, folder)
        return "new"
    if launch.may_be_early:
        # ranks that are cut off from the others end by themselves; here nobody waits for this one
        wait_until_free(folder, config.train.hang_timeout + 60)
    if is_being_trained(folder):
        raise RunError(
            f"run {folder.name} is being trained right now: wait for it, stop it, or choose another run.name"
        )
    state = load_state(call, folder)
    if state is not None:  # whose dataset is not read here
        identity = state.identity
        check_same_training(folder, config, identity.config, identity.dataset_digest, identity.dataset_digest)
    status, step = folder.status(), state.position.global_step if state else 0
    if is_finished(status, config):
        return "finished, and left as it is; raise train.epochs to go on, or choose another run.name"
    before = status.get("state", "new").replace("running", "killed")
    changed = "".join(
        f"\n  from here on with {key}={now}, which was {was}" for key, was, now in changes(folder, config)
    )
    return f"{before}, continues behind step {step:,}{changed}"


def _describe_model(spec: ModelSpec) -> str:
    model = spec.build()
    lines = [f"model: {spec.name}", f"  {'layer':<12} {'kind':<12} {'output':<14} {'parameters':>10}"]
    for row in describe_layers(model, spec.channels, spec.image_size):
        shape = "x".join(str(size) for size in row.output_shape)
        lines.append(f"  {row.name:<12} {row.kind:<12} {shape:<14} {row.num_parameters:>10,}")
    total = sum(parameter.numel() for parameter in model.parameters())
    return "\n".join((*lines, f"  {'total':<40} {total:>10,}", ""))
