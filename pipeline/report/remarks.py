"""What a reader of a comparison has to know before believing it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from pipeline.report.comparison import Run


class Remark(NamedTuple):
    level: Literal["warning", "note"]
    text: str


def find_remarks(runs: Sequence[Run]) -> list[Remark]:
    """Warnings first."""
    found = [*_incomparable(runs), *_states(runs), *_nonfinite(runs), *_closeness(runs), *_code(runs)]
    return sorted(found, key=lambda remark: remark.level == "note")


def are_comparable(runs: Sequence[Run]) -> bool:
    """Whether all were evaluated on as many images of the same dataset."""
    return len({_evaluated_on(run) for run in runs if run.dataset}) <= 1


def _evaluated_on(run: Run) -> tuple[object, object]:
    return run.dataset.get("name"), run.dataset.get("num_eval")


def _incomparable(runs: Sequence[Run]) -> Iterator[Remark]:
    runs = [run for run in runs if run.dataset]
    if not are_comparable(runs):
        groups = _grouped(runs, lambda run: f"{run.dataset['num_eval']:,} images of {run.dataset['name']}")
        yield Remark("warning", f"Accuracies and losses cannot be compared: evaluated were {groups}.")
    elif len({run.dataset.get("digest") for run in runs}) > 1:
        sizes = {run.params.get("data.image_size") for run in runs}
        if len(sizes) > 1:
            groups = _grouped(runs, lambda run: f"data.image_size={run.params.get('data.image_size')}")
            yield Remark("note", f"The images were scaled to different sizes: {groups}.")
        else:
            groups = _grouped(runs, lambda run: f"digest {run.dataset.get('digest')}")
            yield Remark("warning", f"Accuracies and losses cannot be compared: the data differ, {groups}.")
    if len({run.params.get("loss") for run in runs}) > 1:
        groups = _grouped(runs, lambda run: str(run.params.get("loss")))
        yield Remark("warning", f"Losses cannot be compared, they are computed differently: {groups}.")


def _states(runs: Sequence[Run]) -> Iterator[Remark]:
    for run in runs:
        where = f"after step {run.num_steps:,}" if run.num_steps else "before its first record"
        match run.state:
            case "running" if run.is_alive:
                yield Remark("warning", f"{run.name} is being trained now: its figures are those of this moment.")
            case "running":
                text = "no training holds its folder here: it was killed, or runs on another machine"
                yield Remark("warning", f"{run.name} says that it is running ({where}), but {text}.")
            case "preempted":
                yield Remark("warning", f"{run.name} was stopped on request {where} and has not been continued.")
            case "failed":
                yield Remark("warning", f"{run.name} failed {where}.")
            case "finished":
                pass
            case other:
                yield Remark("warning", f"{run.name} records no known state ({other}).")
        if not run.curve("eval/accuracy"):
            yield Remark("warning", f"{run.name} has no evaluation yet.")


def _nonfinite(runs: Sequence[Run]) -> Iterator[Remark]:
    for run in runs:
        if run.num_nonfinite:
            counts = ", ".join(f"{key} {count:,} times" for key, count in sorted(run.num_nonfinite.items()))
            yield Remark("warning", f"{run.name} had values that were NaN or infinite, which no curve shows: {counts}.")


def _closeness(runs: Sequence[Run]) -> Iterator[Remark]:
    """Whether the best two differ by more than chance, taking their errors as independent (they seldom are)."""
    ranked = [(run.accuracy, run.name) for run in runs if run.accuracy is not None and run.accuracy.total]
    if len(ranked) < 2 or not are_comparable(runs):
        return
    (best, best_name), (second, second_name) = sorted(ranked, key=lambda pair: -pair[0].share)[:2]
    names, difference = f"The best two, {best_name} and {second_name},", best.hits - second.hits
    if difference == 0:
        yield Remark("note", f"{names} have the same number of images right at their ends.")
        return
    variance = sum(p.share * (1 - p.share) / p.total for p in (best, second))
    errors = (best.share - second.share) / math.sqrt(variance) if variance else math.inf
    if errors < 2:
        yield Remark(
            "note",
            f"{names} differ by {difference} of {best.total:,} images at their ends, {errors:.1f} standard errors of "
            "such a difference: too little to say which is better. More seeds would.",
        )


def _code(runs: Sequence[Run]) -> Iterator[Remark]:
    commits = {run.tags["mlflow.source.git.commit"] for run in runs if "mlflow.source.git.commit" in run.tags}
    if len(commits) > 1:
        yield Remark("note", f"The runs are of {len(commits)} different commits, see the table.")
    changed = [run.name for run in runs if run.tags.get("git.dirty") == "true"]
    if changed:
        names = "all runs" if len(changed) == len(runs) > 1 else ", ".join(changed)
        yield Remark("note", f"Trained with changes that are in no commit: {names}.")


def _grouped(runs: Sequence[Run], describe: Callable[[Run], str]) -> str:
    """`10 images of a (run 1, run 2) and 20 images of b (run 3)`."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        groups.setdefault(describe(run), []).append(run.name)
    counts = Counter({key: len(names) for key, names in groups.items()})
    return " and ".join(f"{key} ({', '.join(groups[key])})" for key, _ in counts.most_common())
