"""Whether all ranks run the same program with the same settings: asked before anything is read or written."""

import hashlib
import json
import platform
import socket
import sys
from pathlib import Path

import torch

from pipeline.config import Config
from pipeline.config.arguments import resolve, show
from pipeline.parallel.rank import Rank, RemoteError
from pipeline.run.folder import RunError

ROOT = Path(__file__).resolve().parents[2]
MAY_DIFFER = ("data.root", "data.workers")
"""Keys that each node may have set for itself: the data are compared when they are loaded."""


def check_alike(rank: Rank, config: Config) -> None:
    """Collective. Raise RunError on rank 0 if a rank differs from it, with what differs and where; else RemoteError.

    Ranks with other settings or code would train to the end, each something else, and record nonsense.
    """
    own = describe_program(config)
    digest = hashlib.sha256(json.dumps(own).encode()).hexdigest()
    if len(set(rank.gather(digest))) == 1:
        return
    (first, host), *others = rank.gather((own, socket.gethostname()))
    for number, (other, where) in enumerate(others, 1):
        if differing := [key for key in {**first, **other} if first.get(key) != other.get(key)]:
            parts = "; ".join(f"{key} is {other.get(key, 'unset')}, not {first.get(key, 'unset')}" for key in differing)
            reason = f"rank {number} on {where} differs from rank 0 on {host}: {parts}"
            if rank.is_main:
                raise RunError(f"{reason}. Start all ranks by the same command, with the same code and packages")
            raise RemoteError(reason)


def describe_program(config: Config) -> dict[str, str]:
    """Return what has to be the same on all ranks: name -> value, or digest of a file."""
    settings = {key: show(value) for key, value in config.flat().items() if key not in MAY_DIFFER}
    found = [*(ROOT / "train").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py")]
    # what editors and file managers leave beside them is hidden
    sources = sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(ROOT).parts))
    program = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "the digest of Convoy's code": _digest(*sources),
    }
    for key in ("data.dataset", "model.name"):
        module, is_own, _ = settings[key].partition(":")
        if is_own:
            resolve(settings[key])  # imports the module
            if file := getattr(sys.modules.get(module), "__file__", None):
                program[f"the digest of {Path(file).name} ({key})"] = _digest(Path(file))
    return settings | program


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]
