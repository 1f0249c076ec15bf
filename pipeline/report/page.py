"""The page: what is read and drawn, put into one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report import charts
from pipeline.report.comparison import Proportion, Run, differing_params
from pipeline.report.links import Store
from pipeline.report.pictures import Picture, collect_pictures
from pipeline.report.remarks import are_comparable, find_remarks

HERE = Path(__file__).parent
NUM_COLOURS = 7
"""Classes .c0 to .c6 of report.css."""
DASHES = ("", "8 4", "2 3", "10 3 2 3", "16 4")
"""Of lines; their number has no common divisor with that of the colours, so that 35 lines differ."""
PHASES = ("data", "host_to_device", "forward", "backward", "communication", "update", "graph", "other")
"""Of a step, in its order: those of `pipeline.base.timing`, which imports torch."""
MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",
    "M-3.6-3.6H3.6V3.6H-3.6Z",
    "M0-4.8L4.6 3.4H-4.6Z",
    "M0-5L5 0L0 5L-5 0Z",
)
DASH = "\N{EN DASH}"
NOTHING = "\N{EM DASH}"


@dataclass(frozen=True)
class Row:
    """A run as it is told apart and shown."""

    run: Run
    colour: int
    dashes: str
    marker: str
    pictures: Sequence[Picture]
    is_best: bool


@dataclass(frozen=True)
class Whiskers:
    """Intervals of several accuracies on one scale, in % of its width."""

    low: float
    high: float

    def place(self, share: float) -> float:
        return 100 * (share - self.low) / (self.high - self.low)


def render(runs: Sequence[Run], stores: Sequence[Store], *, at: datetime) -> str:
    """The page as text. All that comes from the run folders is escaped."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "percent": percent,
        "interval": interval,
        "number": number,
        "duration": duration,
        "moment": moment,
        "epochs": epochs,
        "relative": lambda path: os.path.relpath(path),
    }
    script = (HERE / "report.js").read_text()
    return environment.get_template("report.html.j2").render(
        title=_title(runs),
        subtitle=_subtitle(runs),
        rows=_rows(runs),
        remarks=find_remarks(runs),
        differing=differing_params(runs),
        all_params=sorted({key for run in runs for key in run.params}),
        all_tags=sorted({key for run in runs for key in run.tags}),
        charts=charts.draw_charts(runs),
        geometry=charts,
        whiskers=_whiskers(runs),
        phases=_phases(runs),
        slowest_step=max((sum(run.phase_ms.values()) for run in runs), default=0.0),
        stores=stores,
        at=at.strftime("%Y-%m-%d %H:%M"),
        style=Markup((HERE / "report.css").read_text()),
        script=Markup(script),
        # the browser runs this script alone, whatever else might find its way into the page
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        nothing=NOTHING,
    )


def _rows(runs: Sequence[Run]) -> list[Row]:
    accuracies = [run.accuracy.share for run in runs if run.accuracy] if are_comparable(runs) else []
    best = max(accuracies) if len(accuracies) > 1 else None
    return [
        Row(
            run=run,
            colour=i % NUM_COLOURS,
            dashes=DASHES[i % len(DASHES)],
            marker=MARKERS[i % len(MARKERS)],
            pictures=collect_pictures(run),
            is_best=run.accuracy is not None and run.accuracy.share == best,
        )
        for i, run in enumerate(runs)
    ]


def _title(runs: Sequence[Run]) -> str:
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"


def _subtitle(runs: Sequence[Run]) -> list[str]:
    """What is compared: the data, the networks, and in what the runs differ."""
    data = dict.fromkeys(_describe_data(run) for run in runs if run.dataset)
    networks = dict.fromkeys(run.params["model.name"] for run in runs if "model.name" in run.params)
    differing = differing_params(runs)
    parts = [*data, ", ".join(networks)]
    if len(runs) > 1:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        parts.append(f"they differ in {', '.join(differing[:4])}{more}" if differing else "with the same settings")
    return [part for part in parts if part]


def _describe_data(run: Run) -> str:
    name, num_train, num_eval = (run.dataset[key] for key in ("name", "num_train", "num_eval"))
    return f"{name}, {num_train:,} training and {num_eval:,} evaluation images"


def _phases(runs: Sequence[Run]) -> list[str]:
    found = dict.fromkeys(phase for run in runs for phase in run.phase_ms)
    return sorted(found, key=lambda phase: PHASES.index(phase) if phase in PHASES else len(PHASES))


def _whiskers(runs: Sequence[Run]) -> Whiskers | None:
    intervals = [run.accuracy.interval for run in runs if run.accuracy and run.accuracy.total]
    if not intervals:
        return None
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    margin = 0.04 * (high - low)
    return Whiskers(low - margin, high + margin)


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.2%}"


def interval(proportion: Proportion) -> str:
    low, high = proportion.interval
    return f"{100 * low:.1f}{DASH}{100 * high:.1f}%"


def number(value: float | None, digits: int = 4) -> str:
    """With so many significant digits, whole numbers in full."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) or value == int(value) else f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """`8.3 s`, `4 min 05 s` or `3 h 12 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds % 60):02} s"
    return f"{int(minutes / 60)} h {int(minutes % 60):02} min"


def moment(timestamp_ms: int) -> str:
    """Local time of the machine that makes the report."""
    return datetime.fromtimestamp(timestamp_ms / 1000).strftime("%Y-%m-%d %H:%M:%S")


def epochs(run: Run) -> str:
    """Trained of planned."""
    done = run.num_epochs
    if done is None:
        return NOTHING
    text = f"{done:.0f}" if abs(done - round(done)) < 0.005 else f"{done:.2f}"
    goal = run.params.get("train.epochs")
    return text if goal in (None, text) else f"{text} of {goal}"
