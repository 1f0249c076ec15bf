"""Where MLflow shows the runs of a comparison."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from pipeline.report.comparison import Published, Run

LOCAL_SERVER = "http://127.0.0.1:5000"
"""Where a bare `mlflow server` answers."""
TRAINING = "workflowType=machine_learning"
"""Without it MLflow shows its pages for language models."""


@dataclass(frozen=True)
class Store:
    """An MLflow store that has some of the runs."""

    uri: str
    num_runs: int
    server_command: str | None
    """To be started first; None if the store is a server itself."""
    pages: list[tuple[str, str]]
    """(what is seen there, address)"""


def find_stores(runs: Sequence[Run]) -> list[Store]:
    by_uri: dict[str, list[Published]] = {}
    for run in runs:
        for published in run.published:
            by_uri.setdefault(published.uri, []).append(published)
    return [_describe(uri, published) for uri, published in by_uri.items()]


def _describe(uri: str, published: Sequence[Published]) -> Store:
    is_server = uri.startswith(("http://", "https://"))
    base = uri.rstrip("/") if is_server else LOCAL_SERVER
    command = None if is_server else f"mlflow server --backend-store-uri {shlex.quote(uri)}"
    return Store(uri, len(published), command, _pages(base, published))


def _pages(base: str, published: Sequence[Published]) -> list[tuple[str, str]]:
    experiments = list(dict.fromkeys(run.experiment_id for run in published))
    pages = []
    if len(published) > 1:
        ids = ",".join(f'"{run.run_id}"' for run in published)
        selection = f"runs={quote(f'[{ids}]', safe='')}&experiments={quote(json.dumps(experiments), safe='')}"
        pages.append(("settings and results side by side", f"{base}/#/compare-runs?{selection}&{TRAINING}"))
    for run in published if len(published) == 1 else ():
        pages.append(("the run", f"{_page(base, run.experiment_id)}/{_part(run.run_id)}?{TRAINING}"))
    for experiment in experiments:
        charts = f"{_page(base, experiment)}?{TRAINING}&compareRunsMode=CHART"
        pages.append(("curves of its experiment, overlaid", charts))
    return pages


def _page(base: str, experiment_id: str) -> str:
    return f"{base}/#/experiments/{_part(experiment_id)}/runs"


def _part(text: str) -> str:
    return quote(text, safe="")
