"""Datasets by name: ours, by asking the modules in `sources`, or any function that can be imported."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping

from pipeline.config.arguments import resolve
from pipeline.data import sources
from pipeline.data.samples import Dataset


def known_sources() -> Mapping[str, Callable[..., Dataset]]:
    """Return the functions that the modules in `sources` offer, each module in a mapping SOURCES."""
    modules = [importlib.import_module(f"{sources.__name__}.{m.name}") for m in pkgutil.iter_modules(sources.__path__)]
    return {name: function for module in modules for name, function in getattr(module, "SOURCES", {}).items()}


def source(name: str) -> Callable[..., Dataset]:
    """Return the function `(root: Path, seed: int, **arguments)` that lists dataset `name` and reads nothing.

    `name` is one of `known_sources()`, or `package.module:function`. Raises ValueError if there is no such function.
    """
    if ":" in name:
        return resolve(name)
    known = known_sources()
    if name not in known:
        hint = "".join(f"did you mean {near}? " for near in difflib.get_close_matches(name, known, 1))
        accepted = f"accepted: {', '.join(known)}, or package.module:function for your own"
        raise ValueError(f"data.dataset = {name}: unknown; {hint}{accepted}")
    return known[name]
