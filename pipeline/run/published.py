"""How far a run folder is published, to each store apart: published.json in the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.base.credentials import without_credentials
from pipeline.run.folder import RunFolder


class Progress:
    """Of one folder and one store. Lost or damaged it is empty, and all is published again, which changes nothing."""

    def __init__(self, folder: RunFolder, uri: str):
        self._folder = folder
        self._path = folder.path / "published.json"
        self.store_uri = without_credentials(uri)
        self._values: dict[str, Any] = self._read().get(self.store_uri, {})

    def get(self, key: str) -> Any:
        """None if unknown.

        mlflow_run_id, mlflow_experiment_id, model_id and model_outcome (what the registry made of it); state: of the
        last status record; shown: the state that MLflow shows; described: the state its description and curves are of;
        killed: number of the last attempt that was found dead.
        """
        return self._values.get(key)

    def offset(self, path: Path) -> int:
        """In bytes: what stands before it is published, but for `files_left`.

        0 if it cannot be: a machine that failed can have taken the end of `path` with it.
        """
        offset = int(self._values.get("offsets", {}).get(self._name(path), 0))
        if offset == 0:
            return 0
        with path.open("rb") as file:
            file.seek(offset - 1)
            return offset if file.read(1) == b"\n" else 0

    @property
    def files_left(self) -> list[tuple[Path, int]]:
        """File and offset of the records whose files are not published yet."""
        return [(self._folder.path / name, offset) for name, offset in self._values.get("files_left", [])]

    def advance(self, path: Path, offset: int, with_file: int | None = None) -> None:
        """All before `offset` is published; the record at `with_file` is not, but for its file."""
        left = self._values.get("files_left", [])
        if with_file is not None and [self._name(path), with_file] not in left:
            left = [*left, [self._name(path), with_file]]
        self.store(offsets=self._values.get("offsets", {}) | {self._name(path): offset}, files_left=left)

    def file_is_published(self, path: Path, offset: int) -> None:
        left = self._values.get("files_left", [])
        self.store(files_left=[each for each in left if each != [self._name(path), offset]])

    def store(self, **changes: Any) -> None:
        """Atomically; entries of other stores stay."""
        self._values |= changes
        known = self._read() | {self.store_uri: self._values}
        temporary = self._path.with_name(".writing-published.json")
        temporary.write_text(json.dumps(known, indent=1) + "\n")
        temporary.replace(self._path)

    def forget(self) -> None:
        self._values = {}

    def paths(self) -> Iterator[Path]:
        """All that is published record by record: the journal, and what was sampled on each node."""
        yield self._folder.journal
        yield from sorted((self._folder.path / "system").glob("*.jsonl"))

    def is_complete(self) -> bool:
        """Whether all complete records are published, and the run is shown as ended."""
        ended = self.get("shown") not in (None, "running") and not self.files_left
        return ended and not any(self._has_more(path) for path in self.paths())

    def _has_more(self, path: Path) -> bool:
        with path.open("rb") as file:
            file.seek(self.offset(path))
            return file.readline().endswith(b"\n")

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._folder.path))

    def _read(self) -> dict[str, Any]:
        try:
            known: dict[str, Any] = json.loads(self._path.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}
        return known
