"""The bundle: complete from its model.json on, exact, and never half written; what is damaged is named."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.models.bundle import Bundle, BundleError, OwnCodeError
from pipeline.models.catalog import ModelSpec


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    spec = ModelSpec("net_conv10_20", {"dropout2d": 0.5}, 3, 16, 4)
    bundle = Bundle(tmp_path / "model", spec, ("a", "b", "c", "d"), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    bundle.write()
    return bundle


def test_it_is_read_as_it_was_written_before_there_are_weights(bundle: Bundle) -> None:
    assert Bundle.open(bundle.folder) == Bundle.open(str(bundle.folder)) == bundle
    assert json.loads((bundle.folder / "model.json").read_bytes())["format"] == 1
    assert [path.name for path in bundle.folder.iterdir()] == ["model.json"]
    with pytest.raises(BundleError, match=r"best.safetensors is missing: the run has not saved these weights yet"):
        bundle.load()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_weights_come_back_bit_for_bit_and_contiguous(bundle: Bundle, memory_format: torch.memory_format) -> None:
    model = bundle.spec.build().to(memory_format=memory_format)
    bundle.save("final", model.state_dict(), 7)
    loaded = bundle.load_weights("final")
    assert loaded.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value)
        assert loaded[name].is_contiguous()


def test_tensors_that_share_memory_and_other_types_are_saved_too(bundle: Bundle) -> None:
    flat = torch.arange(6.0)
    state = {"a": flat[:3], "b": flat[3:], "all": flat, "count": torch.tensor(7), "half": flat.to(torch.bfloat16)}
    bundle.save("best", state, 7)
    assert all(torch.equal(value, state[name]) for name, value in bundle.load_weights("best").items())


def test_the_loaded_model_takes_pixels_and_answers_as_the_network_evaluates(bundle: Bundle) -> None:
    model = bundle.spec.build().eval()
    bundle.save("best", model.state_dict(), 7)
    pixels = torch.randint(0, 256, (5, 3, 16, 16)).float()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (bundle.mean, bundle.std))
    loaded = bundle.load()
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels), model((pixels / 255 - mean) / std), rtol=1e-5, atol=1e-6)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def forget_digest(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [cut, flip, forget_digest])
def test_damaged_weights_are_named(bundle: Bundle, damage: Callable[[Path], None]) -> None:
    bundle.save("best", bundle.spec.build().state_dict(), 7)
    damage(bundle.path("best"))
    with pytest.raises(BundleError, match=r"model/best\.safetensors is damaged"):
        bundle.load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "model.json has format 2; this version reads format 1"),
        ({"spec": {"name": "convnet"}}, "model.json is damaged: TypeError"),
        ({"mean": 1}, "model.json is damaged: TypeError"),
        (None, "model.json is damaged: JSONDecodeError"),
    ],
)
def test_a_damaged_description_is_named(bundle: Bundle, changes: dict[str, Any] | None, message: str) -> None:
    path = bundle.folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes) if changes else "{")
    with pytest.raises(BundleError, match=message):
        Bundle.open(bundle.folder)


def test_a_missing_description_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"{tmp_path}/model.json cannot be read: No such file"):
        Bundle.open(tmp_path)


def test_weights_of_another_model_are_named(bundle: Bundle) -> None:
    bundle.save("best", nn.Linear(2, 2).state_dict(), 7)
    with pytest.raises(
        BundleError, match=r"best\.safetensors does not fit .*model\.json: RuntimeError: Error.*\s+Missing key"
    ):
        bundle.load()


def test_code_in_the_weights_of_an_earlier_version_is_refused(bundle: Bundle) -> None:
    torch.save({"fc1": nn.Linear(2, 2)}, bundle.folder / "best.pt")
    with pytest.raises(BundleError, match=r"best\.pt is damaged"):
        bundle.load()


def test_a_full_disk_leaves_the_weights_there_were(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle.save("best", {"a": torch.zeros(2)}, 7)

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            bundle.save("best", {"a": torch.ones(2)}, 7)
    assert torch.equal(bundle.load_weights("best")["a"], torch.zeros(2))
    assert {path.name for path in bundle.folder.iterdir()} == {"model.json", "best.safetensors"}


def test_code_that_a_bundle_names_is_not_imported_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere.py").write_text(
        "from pathlib import Path\nfrom torch import nn\nPath('imported').touch()\n"
        "def make(channels, image_size, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(4, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    bundle = Bundle(tmp_path / "model", ModelSpec("elsewhere:make", {}, 1, 2, 3), ("a", "b", "c"), (0.0,), (1.0,))
    bundle.write()
    bundle.save("best", {"1.weight": torch.zeros(3, 4), "1.bias": torch.zeros(3)}, 7)
    with pytest.raises(OwnCodeError, match="elsewhere:make is code outside of Convoy"):
        Bundle.open(bundle.folder).load()
    assert not (tmp_path / "imported").exists()
    model = Bundle.open(bundle.folder).load(own_code=True)
    assert model(torch.zeros(2, 1, 2, 2)).shape == (2, 3)


@pytest.mark.parametrize("damage", [cut, forget_digest, Path.unlink])
def test_weights_that_cannot_be_read_have_no_step(bundle: Bundle, damage: Callable[[Path], None]) -> None:
    bundle.save("best", bundle.spec.build().state_dict(), 7)
    assert bundle.step_of("best") == 7
    damage(bundle.path("best"))
    assert bundle.step_of("best") is None
