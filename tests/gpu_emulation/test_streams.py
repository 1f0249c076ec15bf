"""Streamed batches are copied while others are computed, and neither waits for too little: seen by stand-ins for CUDA's
streams and events, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

from pipeline.base.timing import PhaseTimer
from pipeline.data.inputs import Prepare
from pipeline.data.loaders import Gather, StreamedLoader
from pipeline.data.order import Order
from pipeline.models.normalize import Normalize

Call = tuple[str, str, object]
"""What a stream does, and with what."""


@dataclass
class Streams:
    """Keeps what is queued on which stream."""

    calls: list[Call] = field(default_factory=list)
    current: str = "computing"
    num_events: int = 0

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before


@dataclass
class Stream:
    streams: Streams
    name: str

    def wait_event(self, event: Event) -> None:
        self.streams.calls.append((self.name, "waits for", event.number))


@dataclass
class Event:
    streams: Streams
    number: int = -1

    def record(self) -> None:
        self.number = self.streams.num_events
        self.streams.num_events += 1
        self.streams.calls.append((self.streams.current, "copied", self.number))


def test_a_batch_is_waited_for_and_kept_by_the_stream_that_computes_it_while_the_next_is_copied() -> None:
    streams = Streams()
    gather = Gather(torch.zeros(10, 1, 4, 4, dtype=torch.uint8), torch.zeros(10, dtype=torch.int64))
    prepare = Prepare(nn.Identity(), nn.Identity(), Normalize((0.5,), (0.5,)))
    loader = StreamedLoader(gather, Order(10, global_batch_size=4), prepare, 0, PhaseTimer())
    loader._copying = Stream(streams, "copying")  # type: ignore[assignment]

    def record_stream(tensor: Tensor, stream: Stream) -> None:
        streams.calls.append((stream.name, "keeps", tuple(tensor.shape)))

    with (
        mock.patch("torch.cuda.Event", partial(Event, streams)),
        mock.patch("torch.cuda.stream", streams.use),
        mock.patch("torch.cuda.current_stream", return_value=Stream(streams, "computing")),
        mock.patch("torch.Tensor.record_stream", record_stream),
    ):
        for batch in loader.batches(0):
            streams.calls.append((streams.current, "computes", batch.start))

    def taking(number: int, size: int, start: int) -> list[Call]:
        kept: list[tuple[int, ...]] = [(size, 1, 4, 4), (size,), (size,)]  # pixels, labels, indices
        return [
            ("computing", "waits for", number),
            *(("computing", "keeps", shape) for shape in kept),
            ("computing", "computes", start),
        ]

    assert streams.calls == [
        ("copying", "copied", 0),
        ("copying", "copied", 1),
        *taking(0, 4, 0),
        ("copying", "copied", 2),
        *taking(1, 4, 4),
        *taking(2, 2, 8),
    ]
