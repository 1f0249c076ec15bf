"""Arguments of functions: found by name, checked against the signature, read by the annotations."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Le
from torch import nn

from pipeline.config.arguments import check_arguments, convert_arguments, resolve

Size = Annotated[int, Ge(1)]


def make(  # type: ignore[no-untyped-def]
    root: Path,
    seed: int,
    size: Size = 64,
    rate: float = 0.5,
    flip: bool = False,
    tag: str = "",
    kind: Literal["a", "b", 18] = "a",
    crop: Annotated[int, Ge(0), Le(64)] | None = None,
    means: tuple[float, ...] = (),
    sides: Sequence[int] | None = None,
    table: Mapping[str, float] | None = None,
    folder: Path = Path(),
    either: int | str = 0,
    layer: Callable[..., nn.Module] | None = None,
    late: int = None,  # type: ignore[assignment]  # noqa: RUF013
    free=None,
) -> dict[str, Any]:
    return {}


PROVIDED = ("root", "seed")
GOOD = [
    ("size", "64", 64),
    ("size", 64, 64),
    ("size", " 64 ", 64),
    ("rate", "1e-3", 0.001),
    ("rate", ".5", 0.5),
    ("rate", 1, 1.0),
    ("flip", "true", True),
    ("flip", True, True),
    ("flip", "no", False),
    # text stays the text that was written
    ("tag", "2026-11-21", "2026-11-21"),
    ("tag", "007", "007"),
    ("tag", 64, "64"),
    ("tag", True, "true"),
    ("tag", None, "null"),
    ("tag", "1e5", "1e5"),
    ("tag", "[a, b]", "[a, b]"),
    ("kind", "b", "b"),
    ("kind", 18, 18),
    ("crop", "3", 3),
    ("crop", None, None),
    ("crop", "~", None),
    ("crop", "", None),
    ("means", "[0.5, 1e-3]", (0.5, 0.001)),
    ("means", "0.5", (0.5,)),
    ("means", [0.5, "1e-3"], (0.5, 0.001)),
    ("sides", "[3, 5]", [3, 5]),
    ("sides", [3, 5], [3, 5]),
    ("sides", None, None),
    ("table", {"a": 1, "b": "1e-3"}, {"a": 1.0, "b": 0.001}),
    ("table", "{a: 1}", {"a": 1.0}),
    ("folder", "~/photos", Path("~/photos")),
    ("either", 64, 64),
    ("either", "x", "x"),
    ("layer", None, None),
    ("late", None, None),
    ("late", "5", 5),
    # without an annotation: as YAML has it
    ("free", "64", 64),
    ("free", "1e-3", 0.001),
    ("free", "+.5", 0.5),
    ("free", "true", True),
    ("free", "yes", "yes"),
    ("free", "null", None),
    ("free", "~", None),
    ("free", "2026-11-21", "2026-11-21"),
    ("free", "007", "007"),
    ("free", "'64'", "64"),
    ("free", "[1, 1e-3, x]", [1, 0.001, "x"]),
    ("free", [1, "1e-3"], [1, 0.001]),
    ("free", "[1", "[1"),
    ("free", {"a": "2"}, {"a": 2}),
]


@pytest.mark.parametrize(("name", "value", "expected"), GOOD)
def test_a_value_is_read_by_the_annotation(name: str, value: object, expected: object) -> None:
    converted = convert_arguments(make, {name: value}, PROVIDED)[name]
    assert (converted, type(converted)) == (expected, type(expected))
    assert list(check_arguments("data.arguments", make, {name: value}, PROVIDED)) == []


WRONG = [
    ("size", "fast", "data.arguments.size = fast: accepted: a whole number >= 1"),
    ("size", "0", "data.arguments.size = 0: accepted: a whole number >= 1"),
    ("size", 2.5, "data.arguments.size = 2.5: accepted: a whole number >= 1"),
    ("size", True, "data.arguments.size = true: accepted: a whole number >= 1"),
    ("size", None, "data.arguments.size = null: accepted: a whole number >= 1"),
    ("size", [64], "data.arguments.size = [64]: accepted: a whole number >= 1"),
    ("rate", "nan", "data.arguments.rate = nan: accepted: a number"),
    ("rate", True, "data.arguments.rate = true: accepted: a number"),
    ("flip", "maybe", "data.arguments.flip = maybe: accepted: true or false"),
    ("tag", {"a": 1}, 'data.arguments.tag = {"a": 1}: accepted: text'),
    ("kind", "c", "data.arguments.kind = c: accepted: a | b | 18"),
    ("crop", "65", "data.arguments.crop = 65: accepted: a whole number >= 0 and <= 64, or null"),
    ("means", "[0.5, x]", "data.arguments.means = [0.5, x]: accepted: a list in brackets, each a number"),
    ("means", [True], "data.arguments.means = [true]: accepted: a list in brackets, each a number"),
    ("sides", "3.5", "data.arguments.sides = 3.5: accepted: a list in brackets, each a whole number, or null"),
    ("table", "3", "data.arguments.table = 3: accepted: names and their values, such as {size: 32}, or null"),
    ("either", [1], "data.arguments.either = [1]: accepted: a whole number or text"),
    ("layer", "relu", "data.arguments.layer = relu: accepted: callable, or null"),
    (
        "sise",
        5,
        "data.arguments.sise = 5: unknown; shapes takes size, rate, flip, tag, kind, crop, means, sides, table, ",
    ),
    ("sise", 5, "; did you mean data.arguments.size?"),
    ("seed", 5, "data.arguments.seed = 5: cannot be set, as it follows from other keys"),
    ("a.b", 5, "data.arguments.a.b = 5: unknown; shapes takes size"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_wrong_argument_is_refused_with_what_is_accepted(name: str, value: object, message: str) -> None:
    (problem,) = check_arguments("data.arguments", make, {name: value}, PROVIDED, name="shapes")
    assert message in problem.message
    assert problem.keys == (f"data.arguments.{name}",)
    with pytest.raises(ValueError, match=rf"arguments\.{name} = "):
        convert_arguments(make, {name: value}, PROVIDED)


def test_all_wrong_arguments_are_named_at_once() -> None:
    given = {"size": 0, "sise": 5, "flip": True, "rate": "x"}
    problems = list(check_arguments("model.arguments", make, given, PROVIDED))
    assert [problem.keys[0] for problem in problems] == [f"model.arguments.{name}" for name in ("size", "sise", "rate")]
    with pytest.raises(ValueError, match=r"size = 0.*; .*sise = 5: unknown; make takes.*; .*rate = x"):
        convert_arguments(make, given, PROVIDED)


def test_an_argument_without_a_default_must_be_given() -> None:
    def make(root: Path, seed: int, fold: Size, path) -> None:  # type: ignore[no-untyped-def]
        """Both have to be given."""

    messages = [problem.message for problem in check_arguments("data.arguments", make, {"path": "x"}, PROVIDED)]
    assert messages == ["data.arguments.fold: is missing, make needs it; accepted: a whole number >= 1"]
    messages = [problem.message for problem in check_arguments("data.arguments", make, {"fold": 1}, PROVIDED)]
    assert messages == ["data.arguments.path: is missing, make needs it; accepted: anything"]


def test_a_function_must_take_what_the_program_gives() -> None:
    def make(root: Path) -> None:
        """Takes no seed."""

    (problem,) = check_arguments("data.arguments", make, {}, PROVIDED)
    assert problem.message == "make takes no seed: it is called with root, seed and data.arguments"
    assert list(check_arguments("data.arguments", lambda **arguments: None, {}, PROVIDED)) == []


def test_a_function_that_takes_nothing_else_says_so() -> None:
    def make(root: Path, seed: int) -> None:
        """Takes no arguments."""

    (problem,) = check_arguments("data.arguments", make, {"size": 5}, PROVIDED)
    assert problem.message == "data.arguments.size = 5: unknown; make takes no arguments"


def test_any_name_fits_open_arguments() -> None:
    def make(size: Size = 1, **others: Any) -> None:
        """Passes the others on."""

    given = {"size": "3", "anything": "1e-3", "more": 2}
    assert convert_arguments(make, given, ()) == {"size": 3, "anything": 0.001, "more": 2}
    (problem,) = check_arguments("model.arguments", make, {"size": 0, "anything": 5}, ())
    assert problem.message == "model.arguments.size = 0: accepted: a whole number >= 1"


class Net(nn.Module):
    def __init__(self, channels: int, depth: Size = 2):
        super().__init__()


class Maker:
    def __call__(self, channels: int, depth: Size = 2) -> nn.Module:
        return Net(channels, depth)


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


@wrapped
def decorated(channels: int, depth: Size = 2) -> None:
    """Its signature is that of the function inside."""


@pytest.mark.parametrize(
    ("function", "provided"),
    [
        (Net, ("channels",)),
        (Maker(), ("channels",)),
        (Maker().__call__, ("channels",)),
        (decorated, ("channels",)),
        (partial(decorated, channels=1), ("channels",)),
        (partial(Net, 1), ()),
    ],
)
def test_whatever_can_be_called_has_its_signature_checked(
    function: Callable[..., Any], provided: tuple[str, ...]
) -> None:
    assert convert_arguments(function, {"depth": "3"}, provided) == {"depth": 3}
    problems = check_arguments("model.arguments", function, {"depth": "0", "heads": 3}, provided, name="own:net")
    assert [problem.message for problem in problems] == [
        "model.arguments.depth = 0: accepted: a whole number >= 1",
        "model.arguments.heads = 3: unknown; own:net takes depth",
    ]


def test_annotations_that_do_not_exist_at_run_time_count_as_none() -> None:
    def make(size: Elsewhere, flip: Nowhere = None) -> None:  # type: ignore[name-defined]  # noqa: F821
        """As with imports under TYPE_CHECKING."""

    assert convert_arguments(make, {"size": "64"}, ()) == {"size": 64}


def test_a_type_that_says_nothing_about_values_accepts_any() -> None:
    def make(layer: nn.Module) -> None:
        """pydantic has no schema for a module."""

    assert convert_arguments(make, {"layer": "64"}, ()) == {"layer": 64}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package in the current folder, which is not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [part for part in sys.path if part])
    folder = tmp_path / "my_flowers"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "data.py").write_text(
        "number = 5\nclass Splits:\n    @staticmethod\n    def make(): return 'made'\ndef splits(): return 'split'\n"
    )
    (folder / "broken.py").write_text("raise RuntimeError('no licence')\n")
    (folder / "lacking.py").write_text("import not_installed_anywhere\n")
    (folder / "unfinished.py").write_text("def (\n")
    yield folder.name
    for name in [name for name in sys.modules if name.partition(".")[0] == folder.name]:
        del sys.modules[name]


def test_a_function_is_found_in_the_current_folder(package: str) -> None:
    assert resolve(f"{package}.data:splits")() == "split"
    assert resolve(f"{package}.data:Splits.make")() == "made"


def test_a_function_is_found_among_installed_packages() -> None:
    assert resolve("pathlib:Path") is Path


def test_the_current_folder_hides_no_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "wave.py").write_text("open = None\n")
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    assert callable(resolve("wave:open"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("splits", "is not of the form package.module:function"),
        (":splits", "is not of the form package.module:function"),
        ("my_flowers.data:", "is not of the form package.module:function"),
        ("my_flowers.data:split", "has no attribute 'split'"),
        ("my_flowers.data:number", "my_flowers.data:number is no function, it is of type int"),
        ("my_flowers.date:splits", "No module named 'my_flowers.date'"),
        ("my_flower:splits", "No module named 'my_flower'"),
        ("my_flowers.broken:splits", "RuntimeError: no licence"),
        ("my_flowers.lacking:splits", "No module named 'not_installed_anywhere'"),
        ("my_flowers.unfinished:splits", "SyntaxError"),
        ("..data:splits", "cannot be imported"),
    ],
)
def test_a_name_that_leads_to_no_function_is_refused_with_the_reason(package: str, name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} ") as caught:
        resolve(name)
    assert reason in str(caught.value)
