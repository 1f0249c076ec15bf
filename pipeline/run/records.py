"""The records of a journal, one type per kind. Each line of a journal is one of them, with its version as `v`."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Lt
from pydantic import AfterValidator, Field, FiniteFloat, TypeAdapter
from typing_extensions import TypedDict


def _check_inside(path: str) -> str:
    if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
        raise ValueError(f"{path} is not a path in the run folder")
    return path


Count = Annotated[int, Ge(0), Lt(2**63)]
PathInside = Annotated[str, AfterValidator(_check_inside)]
"""Relative to the run folder, and not out of it."""
State = Literal["running", "finished", "preempted", "failed"]


class SweepInfo(TypedDict):
    """The content of sweep.json: what makes a folder the folder of a sweep."""

    run_id: str
    timestamp_ms: Count
    name: str
    settings: list[str]  # key=value of all its runs, besides those in its file
    names: list[str]  # of the runs of its file
    numbered: list[str]  # names of all runs it ever had: the place in this list is a run's number
    jobs: list[str]  # Slurm's ids of the arrays that train it
    text: str  # of its file


class RunRecord(TypedDict):
    """The first record of a journal, which occurs once."""

    kind: Literal["run"]
    run_id: str
    name: str
    experiment: str
    tracking_uri: str
    timestamp_ms: Count
    command: NotRequired[str]
    sweep: NotRequired[SweepInfo]  # that the run belongs to
    model: NotRequired[Mapping[str, Any]]  # the ModelSpec


class ParamsRecord(TypedDict):
    kind: Literal["params"]
    values: Mapping[str, Any]


class TagsRecord(TypedDict):
    """`attempt.<n>.<key>` belongs to the attempt n, counted from 1. Keys that are params are settings it changed."""

    kind: Literal["tags"]
    values: Mapping[str, str]


class DatasetRecord(TypedDict):
    kind: Literal["dataset"]
    name: str
    digest: str
    source: str
    num_train: Count
    num_eval: Count
    num_test: NotRequired[Count]


class MetricRecord(TypedDict):
    kind: Literal["metric"]
    key: str
    value: FiniteFloat
    step: Count
    timestamp_ms: Count


class PredictionsRecord(TypedDict):
    """Predictions at one evaluation for the images in evaluation/samples.npz."""

    kind: Literal["predictions"]
    step: Count
    predicted: Sequence[int]
    confidence: Sequence[float]


class EvaluationRecord(TypedDict):
    """The last evaluation."""

    kind: Literal["evaluation"]
    path: PathInside  # of the .npz file that its figures are drawn from
    step: Count
    class_names: Sequence[str]
    accuracy: NotRequired[float]
    count: NotRequired[int]
    recall: NotRequired[Mapping[str, float | None]]


class ArtifactRecord(TypedDict):
    """A file of the run folder, which is logged under the same path."""

    kind: Literal["artifact"]
    path: PathInside


class ModelRecord(TypedDict):
    """The weights to log; model/model.json says how to build the network."""

    kind: Literal["model"]
    path: PathInside
    sha256: str
    step: Count  # of the evaluation that the weights had
    metric: str  # by which they are the best
    dataset: str
    dataset_digest: str
    register: str | None  # name of the registered model, if it is to be registered
    description: NotRequired[Mapping[str, Any]]  # what model.json holds, for a run of version 1, which has none


class StatusRecord(TypedDict):
    kind: Literal["status"]
    state: State
    timestamp_ms: Count


_Description = RunRecord | ParamsRecord | TagsRecord | DatasetRecord | ModelRecord
_Event = MetricRecord | PredictionsRecord | EvaluationRecord | ArtifactRecord | StatusRecord
Record = _Description | _Event
RECORD: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])
"""Checks what is read of a file."""
