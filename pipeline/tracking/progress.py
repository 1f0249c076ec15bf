"""How far a run folder is published, to each store apart: published.json in the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.run_folder import RunFolder, without_credentials


class Progress:
    """Of one folder and one store. Lost or damaged it is empty, and all is published again, which changes nothing."""

    def __init__(self, folder: RunFolder, uri: str):
        self._folder = folder
        self._path = folder.path / "published.json"
        self._store = without_credentials(uri)
        self._values: dict[str, Any] = self._read().get(self._store, {})

    def get(self, key: str) -> Any:
        """None if unknown.

        mlflow_run_id, mlflow_experiment_id; state: of the last status record; shown: the state that MLflow shows.
        """
        return self._values.get(key)

    def offset(self, path: Path) -> int:
        """In bytes: what stands before it is published."""
        return int(self._values.get("offsets", {}).get(self._name(path), 0))

    def advance(self, path: Path, offset: int) -> None:
        self.store(offsets=self._values.get("offsets", {}) | {self._name(path): offset})

    def store(self, **changes: Any) -> None:
        """Atomically; entries of other stores stay."""
        self._values |= changes
        known = self._read() | {self._store: self._values}
        temporary = self._path.with_name(".writing-published.json")
        temporary.write_text(json.dumps(known, indent=1) + "\n")
        temporary.replace(self._path)

    def forget(self) -> None:
        self._values = {}

    def files(self) -> Iterator[Path]:
        """All that is published record by record: the journal, and what was sampled on each node."""
        yield self._folder.journal
        yield from sorted((self._folder.path / "system").glob("*.jsonl"))

    def is_complete(self) -> bool:
        """Whether all complete records are published, and the run is shown as ended."""
        return self.get("shown") not in (None, "running") and not any(self._has_more(path) for path in self.files())

    def _has_more(self, path: Path) -> bool:
        with path.open("rb") as file:
            file.seek(self.offset(path))
            return b"\n" in file.read()

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._folder.path))

    def _read(self) -> dict[str, Any]:
        try:
            known: dict[str, Any] = json.loads(self._path.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return known
