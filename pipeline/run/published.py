"""How far a run folder is published, to each store apart: published.json in the folder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from pipeline.base.credentials import without_credentials
from pipeline.base.files import read_json, write_atomically
from pipeline.base.logs import logger
from pipeline.run.folder import RunFolder
from pipeline.run.records import Count, PathInside

EARLIER_NAMES = {"shown": "mlflow_state", "described": "described_state", "killed": "killed_attempt"}


class StoreProgress(TypedDict, total=False):
    """The content of published.json for one store."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    mlflow_run_id: str | None
    mlflow_experiment_id: str | None
    offsets: dict[PathInside, Count]
    files_left: list[tuple[PathInside, Count]]


STORE_PROGRESS = TypeAdapter(StoreProgress)


class Progress:
    """Progress of one folder in one store. If the file is lost, all is published again, which changes nothing."""

    def __init__(self, folder: RunFolder, uri: str):
        self._folder = folder
        self._path = folder.path / "published.json"
        self.store_uri = without_credentials(uri)
        try:
            values = STORE_PROGRESS.validate_python(read_json(self._path).get(self.store_uri, {}))
        except ValidationError as error:
            logger.warning("%s is damaged, all is published again: %s", self._path, error.errors()[0]["msg"])
            values = {}
        self._values: dict[str, Any] = {EARLIER_NAMES.get(key, key): value for key, value in values.items()}

    def get(self, key: str) -> Any:
        """Return a value, or None if it is unknown.

        mlflow_run_id, mlflow_experiment_id, model_id and model_outcome (what the registry made of it); state: of the
        last status record that is published; mlflow_state: that the MLflow run has; described_state: for which its
        description and curves were made; killed_attempt: number of the last attempt that was found dead.
        """
        return self._values.get(key)

    def update(self, **changes: Any) -> None:
        """Change values. Entries of other stores stay."""
        self._values |= changes
        known = read_json(self._path) | {self.store_uri: self._values}
        write_atomically(self._path, json.dumps(known, indent=1) + "\n")

    def forget(self) -> None:
        self._values = {}

    def offset(self, path: Path) -> int:
        """Return the number of bytes of `path` that are published, but for `files_left`.

        0 if it cannot be right: a machine that failed can have taken the end of `path` with it.
        """
        offset = int(self._values.get("offsets", {}).get(self._name(path), 0))
        if offset == 0:
            return 0
        with path.open("rb") as file:
            file.seek(offset - 1)
            return offset if file.read(1) == b"\n" else 0

    def advance(self, path: Path, offset: int, with_file: int | None = None) -> None:
        """Store that all before `offset` is published; of the record at `with_file` all but its file."""
        left, file = self._values.get("files_left", []), (self._name(path), with_file)
        if with_file is not None and file not in left:
            left = [*left, file]
        self.update(offsets=self._values.get("offsets", {}) | {self._name(path): offset}, files_left=left)

    @property
    def files_left(self) -> list[tuple[Path, int]]:
        """File and offset of the records whose files are not published yet."""
        return [(self._folder.path / name, offset) for name, offset in self._values.get("files_left", [])]

    def file_is_published(self, path: Path, offset: int) -> None:
        left = self._values.get("files_left", [])
        self.update(files_left=[each for each in left if each != (self._name(path), offset)])

    def paths(self) -> Iterator[Path]:
        """Yield the files that are published record by record: the journal, and the system metrics of each node."""
        yield self._folder.journal
        yield from sorted((self._folder.path / "system").glob("*.jsonl"))

    def is_complete(self) -> bool:
        """Return whether all complete records are published, and the MLflow run has ended."""
        has_ended = self.get("mlflow_state") not in (None, "running")
        return has_ended and not self.files_left and not any(map(self._has_more, self.paths()))

    def _has_more(self, path: Path) -> bool:
        with path.open("rb") as file:
            file.seek(self.offset(path))
            return file.readline().endswith(b"\n")

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._folder.path))
