"""Recorded runs, and pages as a browser takes them apart."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

from pipeline.__main__ import main
from pipeline.run.folder import RunFolder
from pipeline.run.journal import Journal
from pipeline.run.records import Record

EPOCHS, STEPS = 4, 50


def record_run(
    path: Path,
    params: dict[str, Any] | None = None,
    *,
    states: tuple[str, ...] = ("running", "finished"),
    accuracy: float = 0.9,
    num_eval: int = 200,
    dataset: str = "digits",
) -> RunFolder:
    """Record a run of four epochs of 50 steps; `accuracy` is the last one, each before was 0.05 lower."""
    folder = RunFolder(path)
    journal = Journal(folder.journal)
    settings = {"run.name": path.name, "data.dataset": dataset, "optim.lr": 0.5, "loss": "nll", "train.epochs": EPOCHS}
    origin = {"run_id": path.name, "name": path.name, "experiment": "test", "tracking_uri": "unused"}
    append(journal, "run", **origin, timestamp_ms=0)
    append(journal, "params", values=settings | {"steps_per_epoch": STEPS} | (params or {}))
    append(journal, "tags", values={"world_size": "2", "device": "cpu", "host": "here"})
    append(journal, "dataset", name=dataset, digest="d", source="s", num_train=1600, num_eval=num_eval)
    append(journal, "status", state=states[0], timestamp_ms=1_000)
    for step in range(10, EPOCHS * STEPS + 1, 10):
        journal.metrics({"train/loss": 10 / step, "perf/images_per_second": 1000.0, "time/forward_ms": 2.5}, step)
        if step % STEPS == 0:
            before = EPOCHS - step // STEPS
            journal.metrics({"eval/accuracy": accuracy - 0.05 * before, "eval/loss": 1 / step}, step)
    for state in states[1:]:
        append(journal, "status", state=state, timestamp_ms=2_000)
    journal.close()
    return folder


def append(journal: Journal, kind: str, **fields: Any) -> None:
    journal.append(cast(Record, {"kind": kind, **fields}))


def make_report(tmp_path: Path, *folders: RunFolder) -> str:
    out = tmp_path / "report.html"
    assert main(["report", *(str(folder.path) for folder in folders), "--out", str(out)]) == 0
    return out.read_text()


class Tables(HTMLParser):
    """The tables of a page by id, as rows of texts; and every address that the page asks a browser to load."""

    def __init__(self, page: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self._id = ""
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        if tag != "a":
            self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset") and value]
        if tag == "table":
            self._id = attributes.get("id") or ""
            self.tables[self._id] = []
        elif tag == "tr":
            self.tables[self._id].append([])
        elif tag in ("td", "th"):
            self.tables[self._id][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[self._id][-1][-1] += data
