"""Datasets by name: found without a list, named in one place, and anybody's function beside ours."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sklearn.datasets  # noqa: F401  before anything is refused

import pipeline
import train
from pipeline.data import sources
from pipeline.data.catalog import known_sources, source
from pipeline.data.samples import Dataset
from tests.data.helpers import listed, loaded, pixels, tensors

ROOT = Path(pipeline.__path__[0]).parent
OWN = """
from pathlib import Path
import torch
from pipeline.data.samples import Dataset, PixelSamples

def splits(root: Path, seed: int, sides: int = 5, kind: torch.dtype = torch.uint8) -> Dataset:
    def samples(size):
        return PixelSamples.of(torch.full((size, 3, sides, sides), seed, dtype=torch.uint8), torch.arange(size) % 2)
    return Dataset(name="own", train=samples(6), validation=samples(4), classes=("a", "b"), channels=3,
                   image_size=sides, mean=(0.5,) * 3, std=(0.5,) * 3, origin=str(root))

def nothing(root, seed): ...
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "my_flowers.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    yield "my_flowers"
    sys.modules.pop("my_flowers", None)


def test_a_module_with_sources_is_found_by_lying_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planets.py").write_text("def planets(root, seed): ...\nSOURCES = {'planets': planets}\n")
    before = list(known_sources())
    monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(tmp_path)])
    try:
        assert list(known_sources()) == [*before, "planets"]
        assert source("planets").__name__ == "planets"
    finally:
        sys.modules.pop("pipeline.data.sources.planets", None)


def test_the_name_of_a_dataset_stands_in_its_own_file_alone() -> None:
    """But for the default of data.dataset."""
    files: dict[str, set[str]] = {name: set() for name in known_sources()}
    for folder in (*pipeline.__path__, *train.__path__):
        for path in Path(folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and node.value in files:
                    files[node.value].add(str(path.relative_to(ROOT)))
    assert files.pop("digits") - {"pipeline/config/schema.py"} == {"pipeline/data/sources/digits.py"}
    assert files.pop("synthetic") == {"pipeline/data/sources/synthetic.py"}
    assert all(found == {"pipeline/data/sources/published.py"} for found in files.values()), files


def test_an_unknown_name_is_refused_with_the_nearest_and_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"data.dataset = minst: unknown; did you mean mnist\? accepted: .*fashion_mn"):
        source("minst")


@pytest.mark.parametrize("name", known_sources())
def test_listing_reads_nothing_and_tells_sizes_classes_and_normalisation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **more: object) -> object:
        raise AssertionError("listing reads")

    monkeypatch.setattr("pathlib.Path.is_file", refuse)
    monkeypatch.setattr("numpy.fromfile", refuse)
    monkeypatch.setattr("sklearn.datasets.load_digits", refuse)
    monkeypatch.setattr("numpy.random.default_rng", refuse)
    dataset = listed(name)
    assert (dataset.name, dataset.test, dataset.digest) == (name, None, "")
    assert len(dataset.train) > len(dataset.validation) > 0
    assert len(dataset.classes) == len(set(dataset.classes)) == 10
    assert len(dataset.mean) == len(dataset.std) == dataset.channels
    assert "\n" not in dataset.origin
    assert dataset.files is None or "validation is the published test split" in dataset.origin
    assert not Path("/dev/null/absent").exists()


def test_image_size_and_normalisation_of_the_config_replace_those_of_the_dataset() -> None:
    dataset = listed("mnist", image_size=32, mean=(0.5,), std=(0.25,))
    assert (dataset.image_size, dataset.mean, dataset.std) == (32, (0.5,), (0.25,))


def test_arguments_are_checked_against_the_signature_of_the_source() -> None:
    assert len(listed("synthetic", arguments={"train_size": "64"}).train) == 64
    for arguments, message in (
        ({"train_size": 0}, "train_size = 0: accepted: .*>= 1"),
        ({"train_sizes": 64}, "train_sizes = 64: unknown.*did you mean .*train_size"),
        ({"seed": 1}, "seed = 1: cannot be set"),
    ):
        with pytest.raises(ValueError, match=message):
            listed("synthetic", arguments=arguments)


def test_a_function_of_the_current_folder_is_a_dataset(own_module: str) -> None:
    dataset = loaded(listed(f"{own_module}:splits", seed=7, arguments={"sides": 9}))
    assert pixels(dataset.train).shape == (6, 3, 9, 9)
    assert int(pixels(dataset.train)[0, 0, 0, 0]) == 7
    assert dataset.origin == "/dev/null/absent"
    assert [tensor.shape[-1] for tensor in tensors(loaded(listed(f"{own_module}:splits", image_size=4)))] == [
        4,
        6,
        4,
        4,
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_flowers:nothing", "returned NoneType, accepted: pipeline.data.samples.Dataset"),
        ("my_flowers:roses", "my_flowers:roses cannot be imported"),
        ("my_weeds:splits", "my_weeds:splits cannot be imported"),
    ],
)
def test_what_is_no_source_is_refused(own_module: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listed(name)


def test_asking_for_the_names_imports_neither_torchvision_nor_scikit_learn() -> None:
    code = (
        "import sys; from pipeline.data.catalog import known_sources; known_sources(); "
        "sys.exit(bool({'torchvision', 'sklearn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def numbered(root: Path, seed: int) -> Dataset:
    return replace(listed("digits"), classes=tuple(range(10)))  # type: ignore[arg-type]


def test_names_of_classes_that_are_no_text_become_text() -> None:
    assert listed(f"{__name__}:numbered").classes == tuple("0123456789")
