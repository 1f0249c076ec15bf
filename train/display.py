"""The training as a person sees it while it runs: a progress bar on a terminal, plain lines elsewhere."""

import os
import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from pipeline.base.logs import logger
from pipeline.learning.metrics import Evaluation, Straggler
from pipeline.parallel.rank import Rank

RECORDS_PER_TIMES = 10
"""Lines of records between two lines of times."""
NOTABLE_IMBALANCE = 0.1


class Display:
    """The display of a training. This one shows nothing: all ranks but the first have it."""

    def begin_epoch(self, epoch: int, samples_seen: int) -> None:
        """Show that an epoch begins, or goes on behind `samples_seen` samples."""

    def advance(self, count: int) -> None:
        """Show that a step has trained `count` more samples."""

    def record(self, step: int, metrics: Mapping[str, float], straggler: Straggler | None) -> None:
        """Show a record, and the rank that the others wait for."""

    def end_epoch(self) -> None:
        """Show that the steps of an epoch are over."""

    def evaluated(self, epoch: int, evaluation: Evaluation, seconds: float) -> None:
        """Show an evaluation, and how long it took."""

    def saved(self, step: int, seconds: float) -> None:
        """Show that a checkpoint was saved, and how long it took."""


class LineDisplay(Display):
    """A line per record, and one per evaluation."""

    def __init__(self, num_epochs: int, total_steps: int):
        self._num_epochs = num_epochs
        self._total_steps = total_steps
        self._epoch = 0
        self._records = 0

    def begin_epoch(self, epoch: int, samples_seen: int) -> None:
        self._epoch = epoch

    def record(self, step: int, metrics: Mapping[str, float], straggler: Straggler | None) -> None:
        logger.info(
            "epoch %d/%d  step %d/%d  loss %.4f  accuracy %.2f%%  lr %.3g  %s images/s",
            self._epoch + 1,
            self._num_epochs,
            step,
            self._total_steps,
            metrics["train/loss"],
            100 * metrics["train/accuracy"],
            metrics["train/lr"],
            f"{metrics['perf/images_per_second']:,.0f}",
        )
        self._records += 1
        if self._records % RECORDS_PER_TIMES == 1:
            logger.info("%s", describe_times(metrics, straggler))

    def evaluated(self, epoch: int, evaluation: Evaluation, seconds: float) -> None:
        logger.info("%s", _describe(epoch, self._num_epochs, evaluation, seconds))

    def saved(self, step: int, seconds: float) -> None:
        logger.info("step %d saved in %.2f s", step, seconds)


class BarDisplay(Display):
    """A bar per epoch that counts images, with loss, images/s and time left; evaluations and times remain as lines."""

    def __init__(self, num_epochs: int, num_samples: int):
        self._num_epochs = num_epochs
        self._num_samples = num_samples
        self._bar: tqdm[Any] = tqdm(disable=True)
        self._times = ""

    def begin_epoch(self, epoch: int, samples_seen: int) -> None:
        self._bar = tqdm(
            total=self._num_samples,
            initial=samples_seen,
            desc=f"epoch {epoch + 1}/{self._num_epochs}",
            unit=" images",
            leave=False,
            dynamic_ncols=True,
        )

    def advance(self, count: int) -> None:
        self._bar.update(count)

    def record(self, step: int, metrics: Mapping[str, float], straggler: Straggler | None) -> None:
        self._bar.set_postfix(loss=f"{metrics['train/loss']:.4f}", refresh=False)
        self._times = describe_times(metrics, straggler)

    def end_epoch(self) -> None:
        self._bar.close()

    def evaluated(self, epoch: int, evaluation: Evaluation, seconds: float) -> None:
        tqdm.write(_describe(epoch, self._num_epochs, evaluation, seconds))
        if self._times:
            tqdm.write(self._times)

    def saved(self, step: int, seconds: float) -> None:
        self._bar.set_postfix(saved=f"step {step}", refresh=False)


def _describe(epoch: int, num_epochs: int, evaluation: Evaluation, seconds: float) -> str:
    return (
        f"epoch {epoch + 1}/{num_epochs}  validation loss {evaluation.loss:.4f}  "
        f"accuracy {evaluation.accuracy:.2%} ({evaluation.num_correct:,}/{evaluation.count:,}), "
        f"evaluated in {seconds:.1f} s"
    )


def describe_times(metrics: Mapping[str, float], straggler: Straggler | None) -> str:
    """Return a line that says where the time of a step goes, and which rank keeps the others waiting."""
    times = {name[len("time/") : -len("_ms")]: ms for name, ms in metrics.items() if name.endswith("_ms")}
    total = sum(times.values())
    parts = [f"{phase.replace('_', ' ')} {ms / total:.0%}" for phase, ms in times.items() if ms > 0.005 * total]
    text = f"  a step takes {total:.3g} ms: {', '.join(parts)}"
    if straggler and straggler.imbalance > NOTABLE_IMBALANCE:
        lead = f"{straggler.imbalance:.0%} above the mean, most of it in {straggler.phase.replace('_', ' ')}"
        text += f"; slowest is rank {straggler.rank}, {lead}"
    return text


def build_display(rank: Rank, num_epochs: int, num_samples: int, total_steps: int) -> Display:
    """Return rank 0's display: a bar on a terminal, lines elsewhere; the other ranks show nothing."""
    if not rank.is_main:
        return Display()
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return BarDisplay(num_epochs, num_samples)
    return LineDisplay(num_epochs, total_steps)
