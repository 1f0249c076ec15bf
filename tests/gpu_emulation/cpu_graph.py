"""A CUDA graph emulated on the CPU: operations are recorded once and replayed on the same memory, without Python.

As with a real graph, a number of Python is baked in, a tensor is read anew at each replay, and to read a value on the
host while recording is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pipeline.config import Config
from pipeline.data.samples import Dataset
from pipeline.learning.update import _step_without_effect_unless
from pipeline.parallel.rank import Rank
from train.execution import Execution, choose_execution

WITH_CAPTURABLE_FORM = ("torch.optim.adadelta", "torch.optim.rmsprop")
"""Modules that refuse it for tensors that are not on a GPU."""
HOST_READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select")
"""Operations whose result or shape depends on values, for which the host has to wait."""


@dataclass(frozen=True)
class Operation:
    function: Any
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    result: Any

    def replay(self) -> None:
        """Compute the same again, into the memory of the first result."""
        again = self.function(*self.arguments, **self.named)
        for old, new in zip(tree_leaves(self.result), tree_leaves(again), strict=True):
            if isinstance(new, Tensor):
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)
            elif hasattr(new, "wait"):  # what a collective returns
                new.wait()


class CpuGraph(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records all operations inside; they are carried out too, so that what they changed is put back at the end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        # DDP's map of the parameters in use is int32, and lies on the host beside a GPU too
        if func.overloadpacket.__name__ in HOST_READS and args[0].dtype != torch.int32:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        self._before += [(tensor, tensor.detach().clone()) for tensor in written(func, args, named)]
        result = func(*args, **named)
        if not func.is_view:
            # detached: of the autograd graph the memory is kept, and nothing else
            self.operations.append(Operation(func, args, named, tree_map(_detach, result)))
        return result

    @torch.no_grad()
    def put_back(self) -> None:
        for tensor, value in reversed(self._before):
            tensor.detach().copy_(value)
        self._before = []

    @torch.no_grad()
    def replay(self) -> None:
        for operation in self.operations:
            operation.replay()


def written(function: Any, arguments: Sequence[Any], named: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes to, by its schema."""
    found: list[Tensor] = []
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = named.get(argument.name) if argument.kwarg_only else arguments[index]
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def capture(compute: Callable[[], Tensor], stream: object) -> tuple[Callable[[], None], Tensor]:
    """Return what `train.steps.captured.capture` returns; nothing is changed meanwhile, as nothing runs on a GPU."""
    graph = CpuGraph()
    with graph:
        result = compute()
    graph.put_back()
    return graph.replay, result


def choose_captured(config: Config, rank: Rank, dataset: Dataset) -> Execution:
    """Return what `choose_execution` returns, but to capture the step."""
    return replace(choose_execution(config, rank, dataset), is_captured=True)


@contextmanager
def capturing_on_the_cpu() -> Iterator[None]:
    """Have the trainings that are built inside capture their steps, though they compute on the CPU."""
    replacements: dict[str, Callable[..., Any]] = {
        "train.build.choose_execution": choose_captured,
        "pipeline.parallel.replicas.new_stream": lambda device: object(),
        "pipeline.parallel.replicas.on_stream": nullcontext,
        "train.steps.captured.on_stream": nullcontext,
        "train.steps.captured.capture": capture,
        "pipeline.learning.update._step_if": _step_as_on_a_gpu,
    }
    for module in WITH_CAPTURABLE_FORM:
        replacements[f"{module}._get_capturable_supported_devices"] = lambda *_, **__: ["cpu"]
    with ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(mock.patch(name, replacement))
        yield


def _step_as_on_a_gpu(is_finite: Tensor, optimizer: Optimizer, gradients: Sequence[Tensor]) -> None:
    """Let the device decide whether to step, as on a GPU; on the CPU the host does, for whom nothing is quicker."""
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, (~is_finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    else:
        _step_without_effect_unless(is_finite, optimizer, gradients)
