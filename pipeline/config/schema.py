"""Every setting of a run: its type, unit, default and check."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from pipeline.base.credentials import without_credentials

NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class RunConfig(Section):
    name: str | None = Field(
        None,
        pattern=f"^{NAME_PATTERN.pattern}$",
        description="folder of the run; null: Slurm's job id, else config name and time (always a new run)",
    )
    dir: str = Field("runs", min_length=1, description="folder in which run folders are made")
    seed: int = Field(0, ge=0, lt=2**63, description="fixes initial weights, order of samples and dropout")
    resume: Literal["auto", "never", "must"] = Field(
        "auto",
        description="auto: continue the named run's last checkpoint if there is one; never: refuse an existing "
        "folder; must: fail without a checkpoint",
    )
    max_attempts: int = Field(
        10, ge=1, description="attempts in a row that may fail or be killed without a new checkpoint"
    )


class DataConfig(Section):
    dataset: Literal["digits", "mnist", "fashion_mnist", "kmnist", "cifar10", "synthetic"] = Field(
        "digits", description="digits needs no download; synthetic is for benchmarks and tests"
    )
    root: str = Field("data", min_length=1, description="folder that holds the datasets, in torchvision's layout")
    download: bool = Field(True, description="fetch the dataset if it is not in data.root")
    image_size: int | None = Field(
        None, ge=4, le=1024, description="side in pixels to which images are resized; null: the dataset's own"
    )
    mean: tuple[float, ...] | None = Field(
        None, min_length=1, description="per channel, of pixels in [0, 1], subtracted; null: the dataset's own"
    )
    std: tuple[float, ...] | None = Field(
        None, min_length=1, description="per channel, of pixels in [0, 1], divided by; null: the dataset's own"
    )
    random_crop: int = Field(
        0, ge=0, le=64, description="pixels of padding around a training image, of which its own size is cropped"
    )
    random_flip: bool = Field(False, description="mirror every other training image left to right, at random")
    global_batch_size: int = Field(
        32, ge=1, description="samples per optimizer step, over all ranks and accumulation steps"
    )
    eval_batch_size: int = Field(
        500, ge=1, description="samples per rank in one evaluation forward pass; does not change the result"
    )
    placement: Literal["auto", "device", "workers"] = Field(
        "auto", description="device: uint8 images held on the rank's device; workers: streamed by DataLoader"
    )
    workers: int = Field(2, ge=0, le=256, description="DataLoader processes per rank, with placement=workers")
    synthetic_train_size: int = Field(4096, ge=1, description="training images of the synthetic dataset")
    synthetic_eval_size: int = Field(1024, ge=1, description="evaluation images of the synthetic dataset")
    synthetic_channels: int = Field(1, ge=1, le=64, description="channels of the synthetic images")
    synthetic_classes: int = Field(10, ge=2, le=10000, description="classes of the synthetic dataset")


class ModelConfig(Section):
    name: Literal["convnet", "lenet_3x3", "lenet_5x5", "net_conv10_20"] = Field(
        "convnet", description="the network; input channels, size and classes follow from the dataset"
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="probability of dropping a hidden unit; null: the network's own"
    )
    dropout2d: float | None = Field(
        None, ge=0, lt=1, description="probability of dropping a feature map; null: the network's own"
    )


class OptimConfig(Section):
    name: Literal["sgd", "adam", "adamw", "rmsprop", "adadelta"] = Field("adadelta", description="the optimizer")
    lr: float = Field(1.0, gt=0, description="highest learning rate; the schedule scales it")
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd and rmsprop")
    nesterov: bool = Field(False, description="Nesterov's form of momentum, with sgd")
    weight_decay: float = Field(0.0, ge=0, description="decoupled with adamw, else added to the gradient")
    schedule: Literal["constant", "step", "cosine", "one_cycle"] = Field(
        "cosine", description="learning rate over the optimizer steps"
    )
    warmup: int = Field(
        0, ge=0, description="optimizer steps of linear rise (of one_cycle: along a cosine, and 0 means 30% of all)"
    )
    step_epochs: int = Field(1, ge=1, description="epochs between two falls of schedule=step")
    step_gamma: float = Field(0.7, gt=0, le=1, description="factor of each fall of schedule=step")


class TrainConfig(Section):
    epochs: int = Field(20, ge=1, description="passes over the training data")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU per rank where torch sees one")
    backend: Literal["auto", "gloo", "nccl"] = Field("auto", description="auto: nccl on GPUs, gloo on CPUs")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = Field(
        "auto", description="auto: bf16 on GPUs that have it, else fp32; fp16 scales the loss; fp64 for checks"
    )
    accumulate: int = Field(1, ge=1, description="micro-batches per optimizer step; the global batch stays as set")
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm; null: no clipping")
    channels_last: bool = Field(True, description="memory format of images and weights")
    compile: bool = Field(False, description="compile the network with torch.compile; takes a minute at the start")
    cuda_graph: Literal["auto", "never"] = Field(
        "auto", description="auto: replay the whole step as one on GPUs where its shapes are fixed; never: eager"
    )
    compress: Literal["auto", "bf16", "never"] = Field(
        "auto", description="gradients sent as bf16 between GPUs; auto: with precision bf16 over nccl"
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads per rank; null: cores of the node / ranks of the node"
    )
    reproducible: bool = Field(
        False, description="the same bits in the weights on any number of ranks, for more time per step"
    )
    virtual_shards: int = Field(
        8, ge=1, le=1024, description="parts of a global batch with reproducible; the most ranks there can be"
    )
    deterministic: bool = Field(
        False, description="the same bits in each repetition on GPUs too, where torch has deterministic kernels"
    )
    max_nonfinite: int = Field(
        20, ge=1, description="steps in a row with gradients that are not finite, all skipped, before giving up"
    )
    hang_timeout: float = Field(300.0, ge=1, description="seconds without a sign of life after which a rank is ended")
    log_every: int = Field(10, ge=1, description="optimizer steps between two records of train/*, perf/* and time/*")
    profile: int = Field(0, ge=0, le=1000, description="steps of rank 0 to trace with torch's profiler; 0: none")


class CheckpointConfig(Section):
    every_steps: int | None = Field(
        None, ge=1, description="optimizer steps between checkpoints; null: at the end of each epoch only"
    )
    every_minutes: float | None = Field(
        None, gt=0, description="minutes between checkpoints besides; null: by steps only"
    )
    keep: int = Field(2, ge=1, description="most recent checkpoints kept")
    keep_best: int = Field(1, ge=0, description="best checkpoints kept besides")
    metric: Literal["eval/accuracy", "eval/loss"] = Field(
        "eval/accuracy", description="what makes a checkpoint, and model/best.pt, the best"
    )


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message='Field name "register"')  # the metaclass's method is not hidden by it

    class TrackingConfig(Section):
        enabled: bool = Field(True, description="false: only the journal is written; `sync` can publish it later")
        uri: str | None = Field(
            None, min_length=1, description="MLflow server or store; null: MLFLOW_TRACKING_URI, else ./mlflow.db"
        )
        experiment: str = Field("convoy", min_length=1, max_length=250, description="MLflow experiment of the run")
        register: str | None = Field(
            None,
            min_length=1,
            max_length=250,
            pattern=r"^[^/:'\\]+$",
            description="registered model that gets a version of this run; champion if it beats that; null: none",
        )
        system_every: float = Field(
            10.0,
            ge=0,
            description="seconds between samples of CPU, memory, disk, network and GPUs of each node; 0: none",
        )
        close_timeout: float = Field(
            120.0, ge=0, description="seconds the command waits at its end for the rest to be published"
        )


class Config(Section):
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: Literal["nll", "cross_entropy", "mse"] = Field(
        "nll", description="nll takes log-probabilities; cross_entropy and mse (against one-hot) take scores"
    )
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    def flat(self) -> dict[str, Any]:
        """Dotted key -> value, in the order of declaration."""
        return {key: self.get(key) for key in FIELDS}

    def get(self, key: str) -> Any:
        value: Any = self
        for part in key.split("."):
            value = getattr(value, part)
        return value

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _collect_fields(section: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    fields: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            fields |= _collect_fields(field.annotation, f"{prefix}{name}.")
        else:
            fields[prefix + name] = field
    return fields


FIELDS: Mapping[str, FieldInfo] = _collect_fields(Config)
SECTIONS = tuple(dict.fromkeys(key.partition(".")[0] for key in FIELDS if "." in key))


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config; `keys` are all the settings that take part in it."""

    keys: tuple[str, ...]
    message: str


def find_contradictions(config: Config) -> Iterable[Problem]:
    """What no single key shows; what needs knowledge of datasets or networks is checked where that is known."""
    optim, data, train = config.optim, config.data, config.train
    if optim.nesterov and (optim.name != "sgd" or optim.momentum == 0):
        yield Problem(
            ("optim.nesterov", "optim.name", "optim.momentum"),
            f"optim.nesterov = true: needs optim.name=sgd and optim.momentum > 0, not optim.name={optim.name} with "
            f"optim.momentum={optim.momentum:g}",
        )
    if optim.momentum > 0 and optim.name not in ("sgd", "rmsprop"):
        yield Problem(
            ("optim.momentum", "optim.name"),
            f"optim.momentum = {optim.momentum:g}: {optim.name} has none; accepted with sgd and rmsprop, else 0",
        )
    if train.accumulate > data.global_batch_size:
        yield Problem(
            ("train.accumulate", "data.global_batch_size"),
            f"train.accumulate = {train.accumulate}: more micro-batches than the {data.global_batch_size} samples of "
            "data.global_batch_size",
        )
    if train.reproducible and (train.compile or train.precision == "fp16"):
        key, way = ("train.compile", "false") if train.compile else ("train.precision", "bf16, fp32 or fp64")
        yield Problem(
            (key, "train.reproducible"),
            f"{key} = {str(config.get(key)).lower()}: what it does depends on which shards a rank has; accepted with "
            f"train.reproducible: {way}",
        )
    if train.reproducible and train.accumulate > 1:
        yield Problem(
            ("train.accumulate", "train.reproducible"),
            f"train.accumulate = {train.accumulate}: a reproducible step computes its shards one after the other as it "
            "is; accepted: 1, and a larger train.virtual_shards for less memory",
        )
    if (data.mean is None) != (data.std is None):
        yield Problem(("data.mean", "data.std"), "data.mean and data.std: set both, or neither (the dataset's own)")
    if data.std is not None and min(data.std, default=1.0) <= 0:
        yield Problem(("data.std",), f"data.std = {list(data.std)}: accepted: numbers > 0")
    if train.backend == "nccl" and train.device == "cpu":
        yield Problem(("train.backend", "train.device"), "train.backend = nccl: works on GPUs only; use gloo")
    if train.compress == "bf16" and (train.backend == "gloo" or train.device == "cpu"):
        yield Problem(
            ("train.compress", "train.backend", "train.device"),
            "train.compress = bf16: works on GPUs over nccl only; use auto or never",
        )
    if train.precision == "fp16" and train.device == "cpu":
        yield Problem(("train.precision", "train.device"), "train.precision = fp16: needs a GPU; use bf16 or fp32")
    if 0 < config.tracking.system_every < 0.1:
        yield Problem(
            ("tracking.system_every",),
            f"tracking.system_every = {config.tracking.system_every:g}: accepted: 0 for none, or at least 0.1 seconds",
        )
    yield from _check_uri(config.tracking.uri)


def _check_uri(uri: str | None) -> Iterable[Problem]:
    schemes = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
    if uri is None:
        return
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        yield Problem(("tracking.uri",), f"tracking.uri = {uri}: is no URI ({error})")
        return
    if without_credentials(uri) != uri:
        yield Problem(
            ("tracking.uri",),
            "tracking.uri: holds a user name, password or other secret, which would be written into the run folder; "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or all of MLFLOW_TRACKING_URI) instead",
        )
    elif parts.scheme.partition("+")[0] not in schemes and uri != "databricks":
        yield Problem(("tracking.uri",), f"tracking.uri = {uri}: accepted: a URI that starts with {', '.join(schemes)}")
