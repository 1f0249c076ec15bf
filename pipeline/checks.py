"""Problems that no single key shows: settings that contradict each other, the data, the model or the machine."""

import os
from collections.abc import Generator, Iterator
from urllib.parse import urlsplit

import torch
from torch import nn

from pipeline.base.credentials import without_credentials
from pipeline.base.launch import Launch
from pipeline.config import Config
from pipeline.config.arguments import Problem, check_arguments, show
from pipeline.data.augment import Augment
from pipeline.data.build import list_dataset
from pipeline.data.catalog import source
from pipeline.data.samples import Dataset
from pipeline.learning.losses import LOSSES
from pipeline.models.catalog import ModelSpec, builder, has_batch_statistics, output_of
from pipeline.parallel.start import choose_device

URI_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
LISTING = ("data.dataset", "data.arguments", "data.root")
"""The keys that decide which dataset is listed."""


def find_problems(config: Config, launch: Launch | None = None) -> Iterator[Problem]:
    """Yield all problems of a config whose single values are right. Lists the dataset, reads no pixels, starts nothing.

    What follows from a problem is left out: of a dataset that does not exist nothing else is said. Without `launch`
    the machine is not checked, for configs that are trained on another one.
    """
    yield from _check_optim(config)
    yield from _check_train(config)
    yield from _check_tracking(config)
    if launch is not None:
        yield from _check_machine(config, launch)
    dataset = yield from _check_data(config)
    yield from _check_model(config, dataset)


def _refuse(config: Config, reason: str, *keys: str) -> Problem:
    """Return the problem that the value of the first key does not fit those of the others."""
    return Problem(keys, f"{keys[0]} = {show(config.get(keys[0]))}: {reason}")


def _check_optim(config: Config) -> Iterator[Problem]:
    optim = config.optim
    if optim.nesterov and (optim.name != "sgd" or optim.momentum == 0):
        reason = f"needs optim.name=sgd and optim.momentum > 0, not {optim.name} with optim.momentum={optim.momentum:g}"
        yield _refuse(config, reason, "optim.nesterov", "optim.name", "optim.momentum")
    if optim.momentum > 0 and optim.name not in ("sgd", "rmsprop"):
        reason = f"{optim.name} has none; accepted with sgd and rmsprop, else 0"
        yield _refuse(config, reason, "optim.momentum", "optim.name")


def _check_train(config: Config) -> Iterator[Problem]:
    size, train = config.data.global_batch_size, config.train
    if train.accumulate > size:
        reason = f"more micro-batches than the {size} samples of data.global_batch_size"
        yield _refuse(config, reason, "train.accumulate", "data.global_batch_size")
    if train.reproducible and (train.compile or train.precision == "fp16"):
        key, way = ("train.compile", "false") if train.compile else ("train.precision", "bf16, fp32 or fp64")
        reason = f"its result depends on which virtual ranks a rank computes; accepted with train.reproducible: {way}"
        yield _refuse(config, reason, key, "train.reproducible")
    if train.reproducible and train.accumulate > 1:
        reason = "a reproducible step computes one virtual rank at a time; use 1; more virtual ranks need less memory"
        yield _refuse(config, reason, "train.accumulate", "train.reproducible")
    if train.backend == "nccl" and train.device == "cpu":
        yield _refuse(config, "works on GPUs only; use gloo", "train.backend", "train.device")
    if train.compress == "bf16" and (train.backend == "gloo" or train.device == "cpu"):
        reason = "works on GPUs over nccl only; use auto or never"
        yield _refuse(config, reason, "train.compress", "train.backend", "train.device")
    if train.precision == "fp16" and train.device == "cpu":
        yield _refuse(config, "needs a GPU; use bf16 or fp32", "train.precision", "train.device")


def _check_tracking(config: Config) -> Iterator[Problem]:
    tracking = config.tracking
    if 0 < tracking.system_every < 0.1:
        yield _refuse(config, "accepted: 0 for none, or at least 0.1 seconds", "tracking.system_every")
    if tracking.uri is not None and without_credentials(tracking.uri) != tracking.uri:
        reason = (
            "tracking.uri: holds a user name, password or other secret, which would be written into the run folder; "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or all of MLFLOW_TRACKING_URI) instead"
        )
        yield Problem(("tracking.uri",), reason)
        return
    name = "tracking.uri" if tracking.uri else "MLFLOW_TRACKING_URI"
    uri = tracking.uri or (os.environ.get(name) if tracking.enabled else None)
    if uri and not tracking.uri and _may_be_a_plugins(uri):
        return
    if uri and (problem := _find_uri_problem(uri)):
        yield Problem((name,), f"{name} = {without_credentials(uri)}: {problem}")


def _may_be_a_plugins(uri: str) -> bool:
    """Return whether a URI of the environment may be a plugin's, as clouds set it, or of an allowed file store."""
    scheme = uri.partition(":")[0]
    if scheme == "file" or ":" not in uri:
        return os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")
    return scheme not in URI_SCHEMES and ("://" in uri or scheme == "arn")


def _find_uri_problem(uri: str) -> str | None:
    """Return why a URI can never be that of an MLflow server or store; None if it can."""
    if uri == "databricks":
        return None
    if uri != uri.strip():
        return "accepted: a URI without blanks around it"
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        return f"is no URI ({error})"
    scheme = parts.scheme.partition("+")[0]
    if scheme not in URI_SCHEMES:
        return f"accepted: a URI that starts with {', '.join(URI_SCHEMES)}"
    if scheme in ("http", "https") and not parts.hostname:
        return f"names no host; accepted: {scheme}://host:port"
    if scheme == "sqlite" and (parts.netloc or not parts.path.strip("/")):
        return "names no file; accepted: sqlite:///relative/path.db or sqlite:////absolute/path.db"
    return None


def _check_machine(config: Config, launch: Launch) -> Iterator[Problem]:
    train = config.train
    if train.reproducible and launch.world_size > train.virtual_ranks:
        reason = f"fewer than the {launch.world_size} ranks of a reproducible training; start fewer ranks, or raise it"
        yield _refuse(config, reason, "train.virtual_ranks", "train.reproducible")
    try:
        device = choose_device(launch, train.device, train.backend)
    except ValueError as error:
        yield Problem(("train.device", "train.backend"), str(error))
        return
    if device.type == "cpu" and train.device == "auto":
        for key, value in (("train.precision", "fp16"), ("train.backend", "nccl"), ("train.compress", "bf16")):
            if config.get(key) == value:
                yield _refuse(config, "needs a GPU, and torch sees none here", key, "train.device")


def _check_data(config: Config) -> Generator[Problem, None, Dataset | None]:
    """Yield what is wrong with the data; return the dataset as listed, None if it cannot be."""
    data = config.data
    yield from check_arguments("data.augment", Augment, data.augment, ("seed", "device"), name="augmentation")
    if (data.mean is None) != (data.std is None):
        yield Problem(("data.mean", "data.std"), "data.mean and data.std: set both, or neither (the dataset's own)")
    if data.std is not None and min(data.std) <= 0:
        yield _refuse(config, "accepted: numbers > 0", "data.std")
    try:
        function = source(data.dataset)
    except ValueError as error:
        yield _unresolved(config, error, "data.dataset")
        return None
    wrong = list(check_arguments("data.arguments", function, data.arguments, ("root", "seed"), name=data.dataset))
    if wrong:
        yield from (Problem((*problem.keys, "data.dataset"), problem.message) for problem in wrong)
        return None
    try:
        dataset = list_dataset(data, config.run.seed)
    except Exception as error:  # the source may be anybody's
        yield _unresolved(config, error, *LISTING)
        return None
    for key, values in (("data.mean", dataset.mean), ("data.std", dataset.std)):
        if len(values) != dataset.channels:
            reason = f"accepted: {dataset.channels} number(s), one per channel of {dataset.name}"
            yield Problem((key, *LISTING), f"{key} = {list(values)}: {reason}")
    num_steps = config.train.epochs * -(-len(dataset.train) // data.global_batch_size)
    if config.optim.warmup >= num_steps:
        reason = f"as long as the training or longer; accepted: < {num_steps}, the number of optimizer steps"
        yield _refuse(config, reason, "optim.warmup", "train.epochs", "data.global_batch_size", *LISTING)
    return dataset


def _check_model(config: Config, dataset: Dataset | None) -> Iterator[Problem]:
    name, given = config.model.name, config.model.arguments
    try:
        function = builder(name)
    except ValueError as error:
        yield _unresolved(config, error, "model.name")
        return
    output = output_of(name)
    fitting = [loss for loss in LOSSES if output in (None, LOSSES[loss].expects)]
    if config.loss not in fitting:
        use = " or ".join(f"loss={loss}" for loss in fitting)
        reason = f"does not fit the {str(output).replace('_', '-')} of model.name={name}; use {use}"
        yield _refuse(config, reason, "loss", "model.name")
    sizes = ("channels", "image_size", "num_classes")
    wrong = list(check_arguments("model.arguments", function, given, sizes, name=name))
    yield from (Problem((*problem.keys, "model.name"), problem.message) for problem in wrong)
    if wrong or dataset is None:
        return
    spec = ModelSpec(name, given, dataset.channels, dataset.image_size, len(dataset.classes))
    try:
        model = _build_without_weights(spec)
    except Exception as error:  # the builder may be anybody's
        arguments = " ".join(f"model.arguments.{key}={value}" for key, value in given.items())
        model_words = f"model.name={name} cannot be built{' with ' * bool(arguments)}{arguments}"
        keys = ("data.image_size", "model.name", "model.arguments", *LISTING)
        size, kind = f"data.image_size = {dataset.image_size}", type(error).__name__
        # what a size that is too small is refused with, as far as anybody knows
        is_size = isinstance(error, ValueError | RuntimeError)
        yield Problem(keys, f"{size}: {model_words}: {error}" if is_size else f"{model_words} ({kind}: {error})")
        return
    if config.train.reproducible and has_batch_statistics(model):
        reason = f"{name} has batch statistics, which depend on the number of ranks; choose another model"
        yield _refuse(config, reason, "train.reproducible", "model.name", "model.arguments")


def _build_without_weights(spec: ModelSpec) -> nn.Module:
    try:
        with torch.device("meta"):
            return spec.build()
    except RuntimeError:  # it reads a tensor while it is built, say for rates of dropout: meta tensors hold no values
        return spec.build()


def _unresolved(config: Config, error: Exception, *keys: str) -> Problem:
    """Return the problem that the name in the first key leads to nothing, which its error may begin with."""
    name = config.get(keys[0])
    return _refuse(config, str(error).removeprefix(f"{keys[0]} = {name}: ").removeprefix(f"{name} "), *keys)
