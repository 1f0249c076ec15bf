"""The sign of life that a training gives: what nothing has been heard of for long stands still."""

from __future__ import annotations


class Pulse:
    """Beats once for each step, each batch of an evaluation and each save."""

    def __init__(self) -> None:
        self.num_beats = 0

    def beat(self) -> None:
        self.num_beats += 1
