"""Every setting: its type, bounds, default and help, and whether a resumed run may change it (by default not)."""

import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from pipeline.config.arguments import NAME_PATTERN, read_plain, read_text

FORMAT = 2
"""Version of the keys and their meaning: the `format` of a run folder's config.yaml."""
Arguments = dict[str, Any]
"""Type of an open key: arguments of what another key names, whose signature says which there are and reads the text."""


def fixed(default: Any, description: str, **rules: Any) -> Any:
    """Return a field that a resumed run may not change, like any field without a mark."""
    return Field(default, description=description, **rules)


def free(default: Any, description: str, **rules: Any) -> Any:
    """Return a field that a resumed run may change.

    Free is what people change between two attempts at the same training: where it runs, how it is recorded, how long it
    goes on and how fast it learns.
    """
    return fixed(default, description, json_schema_extra={"resume": "may change"}, **rules)


def last_bits(default: Any, description: str, **rules: Any) -> Any:
    """Return a field that a resumed run may change unless train.reproducible promises the last bits."""
    return fixed(default, description, json_schema_extra={"resume": "unless reproducible"}, **rules)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        """Return what a text stands for where the type of its field is known."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        value = read_text(value, annotation)
        return read_plain(value) if annotation == Arguments else value


def _expand(path: str) -> str:
    """Return a path as a shell would have expanded it, which leaves `run.dir=~/runs` as it is."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise ValueError("there is no such user") from error


PathText = Annotated[str, AfterValidator(_expand)]


class RunConfig(Section):
    name: str | None = free(None, "run folder; null: the batch job's, else config name and time", pattern=NAME_PATTERN)
    dir: PathText = free("runs", "folder in which run folders are made", min_length=1)
    seed: int = fixed(0, "fixes initial weights, order of samples and dropout", ge=0, lt=2**63)
    resume: Literal["auto", "never", "must"] = free(
        "auto", "auto: continue a named run; never: refuse an existing folder; must: fail without a checkpoint"
    )
    max_attempts: int = free(10, "attempts in a row that may fail or be killed without a new checkpoint", ge=1)


class DataConfig(Section):
    dataset: str = fixed("digits", "one of Convoy's, or package.module:function; digits needs no download")
    arguments: Arguments = fixed({}, "arguments of the dataset's source")
    root: PathText = free("data", "folder that holds the datasets, in torchvision's layout", min_length=1)
    download: bool = free(True, "fetch the dataset if it is not in data.root")
    image_size: int | None = fixed(None, "side in pixels to resize to; null: the dataset's own", ge=4, le=1024)
    mean: tuple[float, ...] | None = fixed(None, "of pixels in [0, 1], by channel; null: the dataset's", min_length=1)
    std: tuple[float, ...] | None = fixed(None, "of pixels in [0, 1], by channel; null: the dataset's", min_length=1)
    # a curve over two augmentations is of neither
    augment: Arguments = fixed({}, "of training images: crop (pixels of padding around them), flip (mirror half)")
    global_batch_size: int = fixed(32, "samples per optimizer step, over all ranks and accumulation steps", ge=1)
    eval_batch_size: int = free(500, "samples per rank in one evaluation pass; does not change the result", ge=1)
    placement: Literal["auto", "device", "workers"] = free(
        "auto", "device: held there; workers: streamed by DataLoader"
    )
    workers: int = free(2, "DataLoader processes per rank, with placement=workers", ge=0, le=256)


class ModelConfig(Section):
    name: str = fixed("convnet", "one of Convoy's, or package.module:function; sizes and classes follow from the data")
    arguments: Arguments = fixed({}, "arguments of the model's builder")


class OptimConfig(Section):
    name: Literal["sgd", "adam", "adamw", "rmsprop", "adadelta"] = fixed("adadelta", "the optimizer")
    lr: float = free(1.0, "highest learning rate; the schedule scales it", gt=0)
    # momentum decides, as the name does, what an optimizer keeps for each weight, and so what a checkpoint has of it
    momentum: float = fixed(0.0, "of sgd and rmsprop", ge=0, lt=1)
    nesterov: bool = fixed(False, "Nesterov's form of momentum, with sgd")
    weight_decay: float = free(0.0, "decoupled with adamw, else added to the gradient", ge=0)
    schedule: Literal["constant", "step", "cosine", "one_cycle"] = free("cosine", "learning rate over the steps")
    warmup: int = free(0, "optimizer steps of linear rise (of one_cycle: along a cosine, and 0 means 30% of all)", ge=0)
    step_epochs: int = free(1, "epochs between two falls of schedule=step", ge=1)
    step_gamma: float = free(0.7, "factor of each fall of schedule=step", gt=0, le=1)


class TrainConfig(Section):
    epochs: int = free(20, "passes over the training data", ge=1)
    device: Literal["auto", "cpu", "cuda"] = last_bits("auto", "auto: a GPU per rank where torch sees one")
    backend: Literal["auto", "gloo", "nccl"] = free("auto", "auto: nccl on GPUs, gloo on CPUs")
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = last_bits(
        "auto", "auto: bf16 where a GPU has it, else fp32; fp16 scales the loss; fp64 for checks"
    )
    # the same global batches in other parts, for a GPU with less memory
    accumulate: int = free(1, "micro-batches per optimizer step; the global batch stays as set", ge=1)
    clip_norm: float | None = free(None, "largest gradient norm; null: no clipping", gt=0)
    channels_last: bool = last_bits(True, "memory format of images and weights")
    compile: bool = free(False, "compile the model with torch.compile; takes a minute at the start")
    cuda_graph: Literal["auto", "never"] = free("auto", "auto: replay the step as one on GPUs if shapes are fixed")
    compress: Literal["auto", "bf16", "never"] = free("auto", "gradients as bf16; auto: with precision bf16 over nccl")
    threads: int | None = last_bits(None, "CPU threads per rank; null: cores / ranks of the node", ge=1, le=1024)
    reproducible: bool = fixed(False, "the same bits in the weights on any number of ranks, for more time per step")
    virtual_ranks: int = last_bits(8, "parts of a global batch with reproducible; the most ranks", ge=1, le=1024)
    deterministic: bool = free(False, "the same bits in each repetition on GPUs too, where torch has such kernels")
    max_nonfinite: int = free(20, "steps in a row whose gradients are not finite, all skipped, before giving up", ge=1)
    hang_timeout: float = free(300.0, "seconds without a sign of life after which a rank is ended", ge=1)
    log_every: int = free(10, "optimizer steps between two records of train/*, perf/* and time/*", ge=1)
    profile: int = free(0, "steps of rank 0 to trace with torch's profiler; 0: none", ge=0, le=1000)


class CheckpointConfig(Section):
    every_steps: int | None = free(None, "optimizer steps between checkpoints; null: at the end of epochs only", ge=1)
    every_minutes: float | None = free(None, "minutes between checkpoints besides; null: by steps only", gt=0)
    keep: int = free(2, "most recent checkpoints kept", ge=1)
    keep_best: int = free(1, "best checkpoints kept besides", ge=0)
    # the best so far is known by one of them alone
    metric: Literal["eval/accuracy", "eval/loss"] = fixed("eval/accuracy", "by which a checkpoint, and model/, is best")


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message='Field name "register"')  # the metaclass's method is not hidden by it

    class TrackingConfig(Section):
        enabled: bool = free(True, "false: only the journal is written; `sync` can publish it later")
        uri: str | None = free(
            None, "MLflow server or store; null: MLFLOW_TRACKING_URI, else ./mlflow.db", min_length=1
        )
        experiment: str | None = free(
            None, "MLflow experiment; null: MLFLOW_EXPERIMENT_NAME, else convoy", min_length=1, max_length=250
        )
        register: str | None = free(
            None,
            "registered model that gets a version of this run; champion if it beats that; null: none",
            min_length=1,
            max_length=250,
            pattern=r"^[^/:'\\]+$",
        )
        system_every: float = free(10.0, "seconds between samples of CPU, memory, network and GPUs; 0: none", ge=0)
        close_timeout: float = free(120.0, "seconds the command waits at its end for the rest to be published", ge=0)


class Config(Section):
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: Literal["nll", "cross_entropy", "mse"] = fixed("nll", "nll takes log-probabilities, the others logits")
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    def flat(self) -> dict[str, Any]:
        """Return dotted key -> value in the order of declaration; each argument under an open key has its own key."""
        flat: dict[str, Any] = {}
        for key in FIELDS:
            value = self.get(key)
            flat |= {f"{key}.{name}": part for name, part in value.items()} if key in OPEN_KEYS else {key: value}
        return flat

    def get(self, key: str) -> Any:
        """Return the value of a dotted key; raises KeyError for an argument that is not set."""
        value: Any = self
        for part in key.split(".", 2):  # an argument may have a dot in its name
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        return value

    def to_yaml(self) -> str:
        return yaml.safe_dump({"format": FORMAT} | self.model_dump(mode="json"), sort_keys=False)


FIELDS: dict[str, FieldInfo] = {}
for _name, _field in Config.model_fields.items():
    if isinstance(_field.annotation, type) and issubclass(_field.annotation, Section):
        FIELDS |= {f"{_name}.{part}": field for part, field in _field.annotation.model_fields.items()}
    else:
        FIELDS[_name] = _field
SECTIONS = tuple(dict.fromkeys(key.partition(".")[0] for key in FIELDS if "." in key))
OPEN_KEYS = tuple(key for key, field in FIELDS.items() if field.annotation == Arguments)


def field_of(key: str) -> FieldInfo | None:
    """Return the field that declares a dotted key, or an argument under an open key; None for an unknown key."""
    open_key = next((known for known in OPEN_KEYS if key.startswith(f"{known}.")), key)
    return FIELDS.get(open_key)


def may_change(key: str, *, reproducible: bool) -> bool:
    """Return whether a resumed run may have another value of a key; `reproducible` as train.reproducible is set."""
    field = field_of(key)
    mark = field.json_schema_extra.get("resume") if field and isinstance(field.json_schema_extra, dict) else None
    return mark == "may change" or (mark == "unless reproducible" and not reproducible)
