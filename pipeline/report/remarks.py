"""Remarks that a reader of a comparison needs before believing it."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from pipeline.report.comparison import Run


class Remark(NamedTuple):
    level: Literal["warning", "note"]
    text: str


def find_remarks(runs: Sequence[Run]) -> list[Remark]:
    """Return all remarks, warnings first."""
    troubles = [Remark("warning", f"{run.name} {trouble}.") for run in runs for trouble in _troubles(run)]
    found = [*_comparability(runs), *troubles, *_significance(runs), *_code(runs)]
    return sorted(found, key=lambda remark: remark.level == "note")


def are_comparable(runs: Sequence[Run]) -> bool:
    """Return whether all were evaluated on as many images of the same dataset."""
    return not _differences([run for run in runs if run.dataset], _describe_evaluation)


def _describe_evaluation(run: Run) -> str:
    return f"{run.dataset['num_eval']:,} images of {run.dataset['name']}" if run.dataset else ""


def _comparability(runs: Sequence[Run]) -> Iterator[Remark]:
    with_data = [run for run in runs if run.dataset]
    if groups := _differences(with_data, _describe_evaluation):
        yield Remark("warning", f"Accuracies and losses cannot be compared, the validation data differ: {groups}.")
    elif digests := _differences(with_data, lambda run: f"digest {run.dataset['digest'] if run.dataset else ''}"):
        if sizes := _differences(with_data, lambda run: f"data.image_size={run.params.get('data.image_size')}"):
            yield Remark("note", f"The images were scaled to different sizes: {sizes}.")
        else:
            yield Remark("warning", f"Accuracies and losses cannot be compared, the data differ: {digests}.")
    if losses := _differences(runs, lambda run: str(run.params.get("loss"))):
        yield Remark("warning", f"Losses cannot be compared, they are computed differently: {losses}.")


def _troubles(run: Run) -> Iterator[str]:
    """Yield what must be known about one run, as ends of sentences."""
    where = f"after step {run.num_steps:,}" if run.num_steps else "before its first record"
    match run.state:
        case "running" if run.is_alive:
            yield "is still training: its results are those of this moment"
        case "running":
            text = "no training holds its folder here: it was killed, or runs on another machine"
            yield f"says that it is running ({where}), but {text}"
        case "preempted":
            yield f"was stopped on request {where} and has not been continued"
        case "failed":
            yield f"failed {where}"
        case "finished":
            pass
        case other:
            yield f"records no known state ({other})"
    if not run.curve("eval/accuracy"):
        yield "has no evaluation yet"
    if run.num_nonfinite:
        counts = ", ".join(f"{key} {count:,} times" for key, count in sorted(run.num_nonfinite.items()))
        yield f"had values that were NaN or infinite, which no curve shows: {counts}"


def _significance(runs: Sequence[Run]) -> Iterator[Remark]:
    """Say if the best two differ by no more than chance, taking their errors as independent (they seldom are)."""
    ranked = [(run.accuracy, run.name) for run in runs if run.accuracy and run.accuracy.total]
    if len(ranked) < 2 or not are_comparable(runs):
        return
    (best, best_name), (second, second_name) = sorted(ranked, key=lambda pair: -pair[0].share)[:2]
    names, difference = f"The best two, {best_name} and {second_name},", best.correct - second.correct
    variance = sum(accuracy.share * (1 - accuracy.share) / accuracy.total for accuracy in (best, second))
    errors = (best.share - second.share) / math.sqrt(variance) if variance else math.inf
    if difference == 0:
        yield Remark("note", f"{names} have the same number of correct predictions at their ends.")
    elif errors < 2:
        chance = f"{errors:.1f} standard errors of such a difference: too little to say which is better"
        images = f"{difference} of {best.total:,} images at their ends"
        yield Remark("note", f"{names} differ by {images}, {chance}. More seeds would.")


def _code(runs: Sequence[Run]) -> Iterator[Remark]:
    commits = {run.tags["mlflow.source.git.commit"] for run in runs if "mlflow.source.git.commit" in run.tags}
    if len(commits) > 1:
        yield Remark("note", f"The runs were made by {len(commits)} different commits, see the table.")
    changed = [run.name for run in runs if run.tags.get("git.dirty") == "true"]
    if changed:
        names = "all runs" if len(changed) == len(runs) > 1 else ", ".join(changed)
        yield Remark("note", f"Trained with uncommitted changes: {names}.")


def _differences(runs: Sequence[Run], describe: Callable[[Run], str]) -> str:
    """Return e.g. `10 images of a (run 1, run 2) and 20 images of b (run 3)`, the largest group first; empty if all
    runs are described alike."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        groups.setdefault(describe(run), []).append(run.name)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return " and ".join(f"{key} ({', '.join(names)})" for key, names in ordered) if len(groups) > 1 else ""
