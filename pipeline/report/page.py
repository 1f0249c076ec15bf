"""The page: what is read and drawn, put into one HTML file that needs nothing else."""

import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.base.phases import PHASES
from pipeline.figures.of_run import draw_evaluation
from pipeline.report.charts import colour_of, draw_charts, embed
from pipeline.report.comparison import Run, Store, differing_params
from pipeline.report.remarks import are_comparable, find_remarks
from pipeline.run.folder import RunFolder

COLOURS = ("#56b4e9", "#9fd3f5", "#f0e442", "#3bb795", "#e8702a", "#e69f00", "#d68fb6", "#b4bac2")
PHASE_COLOURS = dict(zip(PHASES, COLOURS, strict=True))
NOTHING = "\N{EM DASH}"
PICTURES = {
    "confusion_matrix": "Confusion matrix",
    "wrong": "Most confidently wrong",
    "samples": "First validation images",
    "filters": "First filters",
    "learning_curves": "Learning curves",
}
"""File name -> title, in the order in which they are shown; others come after them."""
PNG = b"\x89PNG\r\n\x1a\n"


def render(runs: Sequence[Run], stores: Sequence[Store], *, at: datetime) -> str:
    """Return the page. All that comes from the run folders is escaped."""
    loader = PackageLoader(__package__, "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    formats = (format_percent, format_place, format_number, format_duration, format_time, format_epochs)
    environment.filters |= {function.__name__.removeprefix("format_"): function for function in formats}
    return environment.get_template("report.html.j2").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        subtitle=_subtitle(runs),
        rows=_rows(runs),
        remarks=find_remarks(runs),
        differing=differing_params(runs),
        all_params=sorted({key for run in runs for key in run.params}),
        all_tags=sorted({key for run in runs for key in run.tags}),
        charts=draw_charts(runs),
        interval_axis=_interval_axis(runs),
        phases=_phases(runs),
        slowest_step=max(sum(run.phase_ms.values()) for run in runs),
        stores=stores,
        at=at.strftime("%Y-%m-%d %H:%M"),
        folders=[os.path.relpath(run.folder.path) for run in runs],
        nothing=NOTHING,
    )


def _rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return each run as it is told apart and shown."""
    shares = [run.accuracy.share for run in runs if run.accuracy] if are_comparable(runs) else []
    best = max(shares) if len(shares) > 1 else None
    return [
        {
            "run": run,
            "number": i + 1,
            "colour": colour_of(i),
            "pictures": _embed_all(run.folder.figures.glob("[!.]*.png")) or _draw_evaluation(run),
            "is_best": run.accuracy is not None and run.accuracy.share == best,
        }
        for i, run in enumerate(runs)
    ]


def _embed_all(paths: Iterable[Path]) -> dict[str, str]:
    """Return title -> address, without files that are gone by now and such as are no pictures."""
    order = {name: place for place, name in enumerate(PICTURES)}
    found = {}
    for path in sorted(paths, key=lambda path: (order.get(path.stem, len(order)), path.stem)):
        with suppress(OSError):
            if (content := path.read_bytes()).startswith(PNG):
                found[PICTURES.get(path.stem, path.stem.replace("_", " ").capitalize())] = embed(content, "png")
    return found


def _draw_evaluation(run: Run) -> dict[str, str]:
    """Return figures of the last evaluation, drawn outside of the run folder; none if its file cannot be read."""
    if run.evaluation is None:
        return {}
    with tempfile.TemporaryDirectory() as temporary, suppress(Exception):  # whatever a damaged file makes of it
        path = str(run.folder.path / run.evaluation["path"])
        return _embed_all(
            draw_evaluation(RunFolder(Path(temporary) / run.folder.name), {**run.evaluation, "path": path})
        )
    return {}


def _subtitle(runs: Sequence[Run]) -> list[str]:
    """Return what is compared: the data, the models, and in what the runs differ."""
    data = [run.dataset for run in runs if run.dataset]
    parts = [f"{d['name']}, {d['num_train']:,} training and {d['num_eval']:,} validation images" for d in data]
    parts.append(", ".join(dict.fromkeys(run.params["model.name"] for run in runs if "model.name" in run.params)))
    if len(runs) > 1:
        differing = differing_params(runs)
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        parts.append(f"they differ in {', '.join(differing[:4])}{more}" if differing else "with the same settings")
    return [part for part in dict.fromkeys(parts) if part]


def _phases(runs: Sequence[Run]) -> dict[str, str]:
    """Return the phases that any run recorded and their colours, in the order of a step."""
    found = {phase for run in runs for phase in run.phase_ms}
    known = {phase: colour for phase, colour in PHASE_COLOURS.items() if phase in found}
    return known | dict.fromkeys(sorted(found - set(known)), PHASE_COLOURS["other"])


def _interval_axis(runs: Sequence[Run]) -> tuple[float, float] | None:
    """Return the ends of the common axis of the accuracies' confidence intervals."""
    ends = [end for run in runs if run.accuracy and run.accuracy.total for end in run.accuracy.interval]
    if not ends:
        return None
    margin = 0.04 * (max(ends) - min(ends))
    return min(ends) - margin, max(ends) + margin


def format_percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.2%}"


def format_place(share: float, axis: tuple[float, float]) -> float:
    """Return the place of an accuracy on an axis, in % of its length."""
    low, high = axis
    return round(100 * (share - low) / (high - low), 2)


def format_number(value: float | None, digits: int = 4) -> str:
    """Return a number with so many significant digits, whole numbers in full."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) or value == int(value) else f"{value:.{digits}g}"


def format_duration(seconds: float) -> str:
    """Return hours:minutes:seconds."""
    return str(timedelta(seconds=round(seconds)))


def format_time(timestamp_ms: int) -> str:
    """Return a time in the zone of the machine that makes the report."""
    return datetime.fromtimestamp(timestamp_ms / 1000).strftime("%Y-%m-%d %H:%M:%S")


def format_epochs(run: Run) -> str:
    """Return epochs trained, of those planned."""
    if not run.steps_per_epoch:
        return NOTHING
    done, planned = f"{round(run.num_steps / run.steps_per_epoch, 2):g}", run.params.get("train.epochs")
    return done if planned in (None, done) else f"{done} of {planned}"
