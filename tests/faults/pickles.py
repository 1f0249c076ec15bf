"""Files that execute something when they are unpickled."""

from __future__ import annotations

import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Runs:
    """Unpickled, it calls `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def _code(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


MALICIOUS: dict[str, Callable[[Path], Any]] = {
    "shell": lambda marker: Runs(os.system, f"touch {marker}"),
    "eval": lambda marker: Runs(eval, _code(marker)),
    "exec in a value": lambda marker: {"weight": torch.zeros(2), "more": [Runs(exec, _code(marker))]},
    "another program": lambda marker: Runs(subprocess.call, ["touch", str(marker)]),
    "plain pickle": lambda marker: Runs(exec, _code(marker)),
}


def write_malicious(name: str, path: Path, marker: Path) -> None:
    """`marker` is created if the file is unpickled."""
    if name == "plain pickle":  # not torch's archive
        path.write_bytes(pickle.dumps(MALICIOUS[name](marker)))
    else:
        torch.save(MALICIOUS[name](marker), path)
