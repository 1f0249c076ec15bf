"""The datasets themselves: what is read, what is refused, and fetching among races, deaths and bad mirrors."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.server
import io
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.catalog import known_sources
from pipeline.data.samples import DataError, Dataset
from pipeline.data.sources import download, published
from pipeline.data.sources.download import PublishedFiles
from pipeline.data.sources.published import NAMES, IdxSource
from tests.data.helpers import are_equal, listed, loaded, pixels

IMAGES, LABELS = NAMES[:2]


def idx_bytes(values: np.ndarray[Any, Any]) -> bytes:
    header = np.array([0x0800 + values.ndim, *values.shape], dtype=">u4")
    return header.tobytes() + values.astype(np.uint8).tobytes()


def flip(content: bytes, position: int, bits: int = 1) -> bytes:
    return content[:position] + bytes([content[position] ^ bits]) + content[position + 1 :]


def assert_normalisation_is_measured(dataset: Dataset, tolerance: float) -> None:
    std, mean = torch.std_mean(pixels(dataset.train).double() / 255, dim=(0, 2, 3), correction=0)
    assert mean.tolist() == pytest.approx(dataset.mean, abs=tolerance)
    assert std.tolist() == pytest.approx(dataset.std, abs=tolerance)


def snapshot(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}


def refusal(function: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        function()
    return str(caught.value)


def files_of(dataset: Dataset) -> PublishedFiles:
    assert isinstance(dataset.files, PublishedFiles)
    return dataset.files


@dataclass(frozen=True)
class Tiny:
    """A dataset like MNIST, a few samples large, with checksums of its own."""

    root: Path
    contents: dict[str, bytes]
    checksums: dict[str, str]

    @property
    def dataset(self) -> Dataset:
        known: dict[str, Any] = {"mean": 0.5, "std": 0.5, "classes": "0123456789", "origin": "a test", "side": 6}
        return IdxSource("tiny", "MNIST", checksums=self.checksums, sizes=(20, 10), **known)(self.root, 0)

    @property
    def folder(self) -> Path:
        return files_of(self.dataset).folder

    def write(self, *, packed: bool = False) -> None:
        self.folder.mkdir(parents=True)
        for name, content in self.contents.items():
            path = self.folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(content, mtime=0) if packed else content)

    def prepare(self, *, download: bool = False) -> None:
        files_of(self.dataset).prepare(download=download)

    def load(self, *, download: bool = False) -> Dataset:
        return loaded(self.dataset, download=download)


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    generator = np.random.default_rng(0)
    arrays = [array for size in (20, 10) for array in (generator.integers(0, 256, (size, 6, 6)), np.arange(size) % 10)]
    contents = {name: idx_bytes(array) for name, array in zip(NAMES, arrays, strict=True)}
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return Tiny(tmp_path / "root", contents, checksums)


@pytest.fixture
def unsummed(tiny: Tiny) -> Tiny:
    """The same where, as of KMNIST, only the MD5 of the archives is known."""
    archives = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in tiny.contents.items()}
    return replace(tiny, checksums={name: hashlib.md5(archive).hexdigest() for name, archive in archives.items()})


class TestDigits:
    def test_have_the_announced_shapes_and_a_stratified_split(self) -> None:
        digits = loaded(listed("digits"))
        assert [pixels(samples).shape for samples in digits.splits.values()] == [(1437, 1, 28, 28), (360, 1, 28, 28)]
        for samples in digits.splits.values():
            counts = torch.bincount(samples.labels, minlength=10)
            assert counts.sum() == len(samples)
            assert counts.min() > 0.95 * counts.float().mean()

    def test_split_covers_each_image_once_and_spans_all_grey_levels(self) -> None:
        from sklearn.datasets import load_digits

        digits = loaded(listed("digits", arguments={"size": 8}))
        found = torch.cat([pixels(samples) for samples in digits.splits.values()]).flatten(1)
        expected = torch.from_numpy(load_digits().data * 255 / 16).round().to(torch.uint8)
        assert sorted(found.tolist()) == sorted(expected.tolist())

    def test_two_loads_are_equal_and_another_size_has_another_digest(self) -> None:
        first, second, small = (loaded(listed("digits", arguments={"size": size})) for size in (28, 28, 16))
        assert are_equal(first, second)
        shrunk = loaded(listed("digits", image_size=16))
        assert len({first.digest, small.digest, shrunk.digest}) == 3
        assert small.image_size == shrunk.image_size == 16
        assert not torch.equal(pixels(small.train), pixels(shrunk.train))

    def test_announced_mean_and_std_are_those_of_the_training_images(self) -> None:
        assert_normalisation_is_measured(loaded(listed("digits")), 5e-5)

    def test_say_that_they_are_small(self) -> None:
        assert "1,797 real 8x8 images" in listed("digits").note


class TestSynthetic:
    SIZES = {"channels": 3, "classes": 7, "image_size": 12, "train_size": 700, "validation_size": 140}  # noqa: RUF012

    def load(self, *, seed: int = 0, **changes: int) -> Dataset:
        return loaded(listed("synthetic", seed=seed, arguments=self.SIZES | changes))

    def test_has_the_shape_asked_for_and_balanced_labels(self) -> None:
        made = self.load()
        assert [pixels(samples).shape for samples in made.splits.values()] == [(700, 3, 12, 12), (140, 3, 12, 12)]
        assert torch.bincount(made.train.labels).tolist() == [100] * 7
        assert torch.bincount(made.validation.labels).tolist() == [20] * 7
        assert made.classes[6] == "class 6"

    def test_has_a_test_split_where_one_is_asked_for(self) -> None:
        made = self.load(test_size=140)
        assert self.load().test is None
        assert made.test is not None
        assert pixels(made.test).shape == (140, 3, 12, 12)
        assert not torch.equal(pixels(made.test), pixels(made.validation))
        assert torch.equal(pixels(made.train), pixels(self.load().train))

    def test_is_a_function_of_the_seed(self) -> None:
        assert self.load().digest == self.load().digest != self.load(seed=1).digest

    def test_bits_are_these_on_every_machine(self) -> None:
        made = self.load(channels=1, classes=2, image_size=4, train_size=2, validation_size=1)
        assert made.train.read(0).flatten().tolist() == [
            *(160, 182, 195, 221, 205, 226, 31, 208),
            *(68, 183, 188, 136, 219, 210, 78, 72),
        ]

    def test_training_images_do_not_depend_on_how_many_are_for_validation(self) -> None:
        assert torch.equal(pixels(self.load(validation_size=7).train), pixels(self.load().train))

    def test_validation_images_are_not_the_training_images(self) -> None:
        made = self.load(validation_size=700)
        seen = {image.numpy().tobytes() for image in pixels(made.train)}
        assert not any(image.numpy().tobytes() in seen for image in pixels(made.validation))

    def test_validation_is_classified_by_the_class_means_of_training(self) -> None:
        made = self.load()
        images, labels = pixels(made.train).flatten(1).float(), made.train.labels
        means = torch.stack([images[labels == index].mean(0) for index in range(7)])
        nearest = torch.cdist(pixels(made.validation).flatten(1).float(), means).argmin(1)
        assert (nearest == made.validation.labels).float().mean() > 0.99

    def test_announced_mean_and_std_are_about_right(self) -> None:
        assert_normalisation_is_measured(self.load(channels=2, classes=100, image_size=8, train_size=2000), 0.01)


class TestReading:
    def test_gives_the_images_and_labels_that_were_written(self, tiny: Tiny) -> None:
        tiny.write()
        tiny.prepare()
        found = tiny.load()
        assert pixels(found.train).shape == (20, 1, 6, 6)
        assert pixels(found.validation).shape == (10, 1, 6, 6)
        assert pixels(found.train).numpy().tobytes() == tiny.contents[IMAGES][16:]
        assert found.train.labels.tolist() == list(tiny.contents[LABELS][8:])

    @pytest.mark.parametrize("kind", ["tiny", "unsummed"])
    def test_packed_files_count_as_the_same_dataset(
        self, kind: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        plain: Tiny = request.getfixturevalue(kind)
        plain.write()
        packed = replace(plain, root=tmp_path / "packed")
        packed.write(packed=True)
        packed.prepare()
        assert are_equal(packed.load(), plain.load())

    @pytest.mark.parametrize("packed", [False, True])
    def test_each_file_is_read_once(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
        tiny.write(packed=packed)
        opened: Counter[str] = Counter()
        read = np.fromfile

        def counted(path: Path, dtype: Any) -> Any:
            opened[path.name.removesuffix(".gz")] += 1
            return read(path, dtype)

        monkeypatch.setattr(np, "fromfile", counted)
        tiny.load()
        assert opened == Counter(NAMES)

    def test_complete_root_is_left_untouched(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        tiny.write()
        before = snapshot(tiny.root)
        monkeypatch.setattr(download, "exclusive", None)  # not even a lock may be taken
        tiny.prepare(download=True)
        tiny.load(download=True)
        assert snapshot(tiny.root) == before


class TestDamage:
    """Where a checksum is known it tells; where none is, header, size and labels do."""

    def refuse(self, tiny: Tiny, name: str, content: bytes) -> str:
        """Return the message of prepare and of load, once the file holds `content`."""
        tiny.write()
        (tiny.folder / name).write_bytes(content)
        messages = {refusal(tiny.prepare), refusal(tiny.load), refusal(lambda: tiny.prepare(download=True))}
        (message,) = messages
        assert f"{tiny.folder / name} is damaged" in message
        assert "run again with data.download=true" in message
        return message

    @pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 16 + 20 * 36 - 1])
    def test_truncated_images_are_refused(self, unsummed: Tiny, length: int) -> None:
        message = self.refuse(unsummed, IMAGES, unsummed.contents[IMAGES][:length])
        assert f"{length} bytes" in message
        assert f"expected {16 + 20 * 36}" in message

    @pytest.mark.parametrize("length", [0, 7, 8, 27])
    def test_truncated_labels_are_refused(self, unsummed: Tiny, length: int) -> None:
        self.refuse(unsummed, LABELS, unsummed.contents[LABELS][:length])

    def test_file_with_one_byte_more_is_refused(self, unsummed: Tiny) -> None:
        self.refuse(unsummed, IMAGES, unsummed.contents[IMAGES] + b"\0")

    def test_page_of_a_captive_portal_is_refused(self, unsummed: Tiny) -> None:
        self.refuse(unsummed, IMAGES, b"<html>" + bytes(10 + 20 * 36))

    @pytest.mark.parametrize(("position", "found"), [(3, "00000802 00000014"), (7, "00000803 00000015")])
    def test_other_magic_number_or_dimensions_are_refused(self, unsummed: Tiny, position: int, found: str) -> None:
        message = self.refuse(unsummed, IMAGES, flip(unsummed.contents[IMAGES], position))
        assert found in message
        assert "00000803 00000014 00000006 00000006" in message

    def test_label_out_of_range_is_refused(self, unsummed: Tiny) -> None:
        content = unsummed.contents[LABELS]
        message = self.refuse(unsummed, LABELS, content[:11] + b"\x0a" + content[12:])
        assert "label 10, expected 0 to 9" in message

    @pytest.mark.parametrize("name", NAMES)
    def test_flipped_bit_is_refused_by_the_checksum(self, tiny: Tiny, name: str) -> None:
        message = self.refuse(tiny, name, flip(tiny.contents[name], 9 if "labels" in name else 99))
        assert "SHA-256" in message
        assert f"expected {tiny.checksums[name]}" in message

    def test_flipped_bit_is_refused_even_when_the_rest_is_absent(self, tiny: Tiny) -> None:
        tiny.write()
        (tiny.folder / IMAGES).write_bytes(flip(tiny.contents[IMAGES], 99))
        (tiny.folder / LABELS).unlink()
        assert "SHA-256" in refusal(lambda: tiny.prepare(download=True))

    @pytest.mark.parametrize("kind", ["tiny", "unsummed"])
    def test_damaged_packed_files_are_refused(self, kind: str, request: pytest.FixtureRequest) -> None:
        tiny: Tiny = request.getfixturevalue(kind)
        tiny.write(packed=True)
        path = tiny.folder / f"{IMAGES}.gz"
        whole = path.read_bytes()
        reserved_block_type = whole[:10] + b"\x07" + whole[11:]
        wrong_crc = flip(whole, len(whole) - 6)
        for content in (whole[:-9], b"", b"nonsense", reserved_block_type, wrong_crc, gzip.compress(b"other")):
            path.write_bytes(content)
            for function in (tiny.prepare, tiny.load):
                message = refusal(function)
                assert f"{path} is damaged" in message
                assert kind == "tiny" or "MD5" in message

    def test_file_that_cannot_be_read_is_named(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*arguments: object) -> object:
            raise PermissionError(13, "Permission denied")

        tiny.write()
        for name in ("numpy.fromfile", "pathlib.Path.is_file"):
            with monkeypatch.context() as patch:
                patch.setattr(name, refuse)
                assert f"{tiny.folder / IMAGES} cannot be read: Permission denied" in refusal(tiny.load)


@dataclass
class Mirror:
    """An HTTP server on this machine: serves `archives`, 404 for the rest; at `hold` it stops answering."""

    url: str = ""
    archives: dict[str, bytes] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    hold: str | None = None
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    delay_seconds: float = 0.0

    def answer(self, name: str) -> bytes | None:
        self.requests[name] += 1
        if name == self.hold:
            self.held.set()
            self.release.wait(30)
        self.release.wait(self.delay_seconds)
        return self.archives.get(name)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    state = Mirror()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = state.answer(self.path.lstrip("/"))
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(OSError):  # a client that was killed
                super().handle()

    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_address[1]}/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield state
        state.release.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def offered(tiny: Tiny, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """The tiny dataset, absent here, but to be had from the mirror."""
    from torchvision.datasets import MNIST

    mirror.archives = {f"{name}.gz": gzip.compress(content) for name, content in tiny.contents.items()}
    digests = [(name, hashlib.md5(archive).hexdigest()) for name, archive in mirror.archives.items()]
    monkeypatch.setattr(MNIST, "resources", digests)
    monkeypatch.setattr(MNIST, "mirrors", [mirror.url])
    return tiny


def refused_url() -> str:
    """Return an address of this machine where nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}/"


FOLDERS = {
    "mnist": "MNIST/raw",
    "fashion_mnist": "FashionMNIST/raw",
    "kmnist": "KMNIST/raw",
    "cifar10": "cifar-10-batches-py",
}


class TestAbsent:
    @pytest.fixture(autouse=True)
    def no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torchvision

        monkeypatch.setenv("no_proxy", "*")
        for name in ("MNIST", "FashionMNIST", "KMNIST"):
            monkeypatch.setattr(getattr(torchvision.datasets, name), "mirrors", [refused_url()])
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{refused_url()}cifar-10-python.tar.gz")

    @pytest.mark.parametrize("name", FOLDERS)
    @pytest.mark.parametrize("allowed", [False, True])
    def test_error_names_the_files_the_reason_and_the_ways_out(self, tmp_path: Path, name: str, allowed: bool) -> None:
        root = tmp_path / "root"
        dataset = listed(name, root=root)
        files = replace(files_of(dataset), fallback_folder=None)
        names = ("data_batch_1", "test_batch", "batches.meta") if name == "cifar10" else NAMES
        message = refusal(lambda: loaded(replace(dataset, files=files), download=allowed))
        assert set(names) <= set(files.missing())
        for expected in (f"data.dataset={name}:", str(root / FOLDERS[name]), *names, "data.root", "data.download=true"):
            assert expected in message
        assert ("apt-get install dataset-fashion-mnist" in message) == (name == "fashion_mnist")
        assert ("Connection refused" in message) == allowed
        assert ("http://127.0.0.1" in message) == allowed
        assert ("data.download=false" in message) == (not allowed)
        assert not any(f"data.dataset={other}" in message for other in known_sources() if other != name)
        assert not (root / FOLDERS[name]).exists()

    def test_reading_what_was_not_prepared_is_refused_too(self, tiny: Tiny) -> None:
        tiny.write()
        (tiny.folder / LABELS).unlink()
        message = refusal(lambda: tiny.dataset.train.labels)
        assert f"lacks {LABELS} " in message
        assert "prepared first" in message

    def test_root_that_cannot_be_made_is_part_of_the_error(self, tiny: Tiny) -> None:
        tiny.root.write_text("a file where the folder should be")
        assert "File exists" in refusal(lambda: tiny.prepare(download=True))

    def test_silent_mirror_is_given_up_soon(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision.datasets import MNIST

        monkeypatch.setattr(download, "SOCKET_TIMEOUT_SECONDS", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
            monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
            assert "timed out" in refusal(lambda: tiny.prepare(download=True))
        assert socket.getdefaulttimeout() is None


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(".") and path.name != download.LOCK_NAME]


def fork(function: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


class TestDownload:
    def test_puts_verified_files_in_place_and_leaves_nothing_else(self, offered: Tiny) -> None:
        offered.prepare(download=True)
        assert {path.name: path.read_bytes() for path in offered.folder.iterdir()} == offered.contents
        assert leftovers(offered.root) == []
        assert len(offered.load().train.labels) == 20

    def test_loading_fetches_only_what_is_absent_and_only_if_it_may(self, offered: Tiny, mirror: Mirror) -> None:
        offered.write()
        (offered.folder / LABELS).unlink()
        assert "data.download=false" in refusal(offered.load)
        assert len(offered.load(download=True).train.labels) == 20
        assert set(mirror.requests) == {f"{LABELS}.gz"}

    def test_takes_the_next_mirror_when_one_refuses(
        self, offered: Tiny, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torchvision.datasets import MNIST

        monkeypatch.setattr(MNIST, "mirrors", [refused_url(), f"{mirror.url}not-here/", mirror.url])
        offered.prepare(download=True)
        offered.load()

    @pytest.mark.parametrize("bad", [None, b"", b"<html>log in first</html>"])
    def test_failure_leaves_nothing_that_counts_and_can_be_repeated(
        self, offered: Tiny, mirror: Mirror, bad: bytes | None
    ) -> None:
        name = f"{NAMES[2]}.gz"
        good = mirror.archives.pop(name)
        if bad is not None:
            mirror.archives[name] = bad
        message = refusal(lambda: offered.prepare(download=True))
        assert f"{mirror.url}{name}" in message
        assert ("404" if bad is None else "corrupted") in message
        assert not offered.folder.exists()
        assert leftovers(offered.root) == []
        mirror.archives[name] = good
        offered.prepare(download=True)
        offered.load()

    def test_content_with_another_sha256_never_gets_its_name(self, offered: Tiny) -> None:
        other = replace(offered, checksums=dict.fromkeys(NAMES, "0" * 64))
        assert "SHA-256" in refusal(lambda: other.prepare(download=True))
        assert not offered.folder.exists()

    def test_processes_at_once_download_once(self, offered: Tiny, mirror: Mirror, tmp_path: Path) -> None:
        alone = replace(offered, root=tmp_path / "alone")
        alone.prepare(download=True)
        requests_of_one = mirror.requests.copy()
        mirror.requests.clear()
        mirror.delay_seconds = 0.05  # so that they overlap
        processes = [fork(lambda: offered.prepare(download=True)) for _ in range(3)]
        for process in processes:
            process.join(30)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        assert mirror.requests == requests_of_one
        assert offered.load().digest == alone.load().digest

    def test_killed_download_frees_the_lock_and_leaves_nothing_that_counts(self, offered: Tiny, mirror: Mirror) -> None:
        mirror.hold = f"{NAMES[2]}.gz"
        process = fork(lambda: offered.prepare(download=True))
        assert mirror.held.wait(30)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        assert not offered.folder.exists()
        assert len(leftovers(offered.root)) == 1
        mirror.release.set()
        offered.prepare(download=True)
        offered.load()
        assert leftovers(offered.root) == []

    @pytest.mark.parametrize("has_locks", [True, False])
    def test_one_process_at_a_time_also_where_the_root_has_no_locks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool
    ) -> None:
        root = tmp_path / "root"
        if not has_locks:
            (root / download.LOCK_NAME).mkdir(parents=True)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        held, inside = (multiprocessing.get_context("fork").Event() for _ in range(2))

        def compete() -> None:
            held.wait(30)
            with download.exclusive(root):
                inside.set()

        process = fork(compete)
        with download.exclusive(root):
            held.set()
            assert not inside.wait(0.3)
        assert inside.wait(30)
        process.join(30)
        assert bool(list(tmp_path.glob("convoy-*.lock"))) == (not has_locks)


class TestCifar10:
    """A tiny archive in the real one's form, its checksums put in the place of the published ones."""

    @pytest.fixture
    def files(self, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
        from torchvision.datasets import CIFAR10

        generator = np.random.default_rng(0)
        files = {}
        for name in list(published.CIFAR10_MD5)[:6]:
            data = generator.integers(0, 256, (10, 3072), dtype=np.uint8)
            files[name] = pickle.dumps({"data": data, "labels": list(range(10))}, protocol=2)
        files["batches.meta"] = pickle.dumps({"label_names": list("0123456789")}, protocol=2)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for name, content in files.items():
                monkeypatch.setitem(published.CIFAR10_MD5, name, hashlib.md5(content).hexdigest())
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        mirror.archives["cifar-10-python.tar.gz"] = packed.getvalue()
        monkeypatch.setattr(CIFAR10, "url", f"{mirror.url}cifar-10-python.tar.gz")
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
        return files

    def test_is_downloaded_and_read_channels_first(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        dataset = listed("cifar10", root=tmp_path)
        files_of(dataset).prepare(download=True)
        assert pixels(dataset.train).shape == (50, 3, 32, 32)
        assert dataset.validation.labels.tolist() == list(range(10))
        expected = pickle.loads(files["data_batch_2"])["data"]
        assert np.array_equal(pixels(dataset.train)[10:20].flatten(1).numpy(), expected)
        assert leftovers(tmp_path) == []
        files_of(dataset).prepare(download=False)

    def test_processes_at_once_download_the_one_archive_once(
        self, tmp_path: Path, files: dict[str, bytes], mirror: Mirror
    ) -> None:
        files_of(listed("cifar10", root=tmp_path / "alone")).prepare(download=True)
        requests_of_one = mirror.requests.copy()
        mirror.requests.clear()
        mirror.delay_seconds = 0.3
        prepared = files_of(listed("cifar10", root=tmp_path / "shared"))
        processes = [fork(lambda: prepared.prepare(download=True)) for _ in range(2)]
        for process in processes:
            process.join(30)
        assert [process.exitcode for process in processes] == [0, 0]
        assert mirror.requests == requests_of_one

    def test_completes_a_folder_that_lacks_a_file(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        prepared = files_of(listed("cifar10", root=tmp_path))
        prepared.prepare(download=True)
        (prepared.folder / "data_batch_3").unlink()
        assert "lacks data_batch_3 " in refusal(lambda: prepared.prepare(download=False))
        prepared.prepare(download=True)
        prepared.prepare(download=False)

    def test_damaged_batch_is_refused_unread(
        self, tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = listed("cifar10", root=tmp_path)
        files_of(dataset).prepare(download=True)
        (files_of(dataset).folder / "data_batch_1").write_bytes(flip(files["data_batch_1"], 2000))
        monkeypatch.setattr(pickle, "loads", None)
        for function in (lambda: dataset.train.labels, lambda: files_of(dataset).prepare(download=True)):
            assert "data_batch_1 is damaged: MD5" in refusal(function)

    def test_published_checksums_are_torchvisions(self) -> None:
        from torchvision.datasets import CIFAR10, KMNIST

        listed_there = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
        assert dict(listed_there) == published.CIFAR10_MD5
        assert files_of(listed("kmnist")).checksums == dict(KMNIST.resources)

    def test_is_read_without_torchvision(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        folder = files_of(listed("cifar10", root=tmp_path)).folder
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        code = (
            "import sys; from pathlib import Path; from pipeline.data.sources import published\n"
            f"published.CIFAR10_MD5.update({published.CIFAR10_MD5})\n"
            f"dataset = published.cifar10(Path({str(tmp_path)!r}), 0)\n"
            "dataset.files.prepare(download=True)\n"
            "assert len(dataset.train.labels) == 50\n"
            "assert 'torchvision' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


class TestRealData:
    def check(self, dataset: Dataset, torchvision_name: str, root: Path) -> None:
        """Check that pixels and labels are those torchvision reads, and the constants those of the pixels."""
        import torchvision

        assert_normalisation_is_measured(dataset, 5e-5)
        reader = getattr(torchvision.datasets, torchvision_name)
        for train, ours in ((True, dataset.train), (False, dataset.validation)):
            theirs = reader(root, train=train)
            assert torch.equal(pixels(ours)[:, 0], theirs.data)
            assert torch.equal(ours.labels, theirs.targets)

    def test_mnist_is_what_torchvision_reads(self, mnist_root: Path) -> None:
        self.check(loaded(listed("mnist", root=mnist_root)), "MNIST", mnist_root)

    def test_fashion_mnist_is_found_where_debian_puts_it(self, tmp_path: Path) -> None:
        debian = published.DEBIAN_FASHION_MNIST
        if not debian.is_dir():
            pytest.skip(f"{debian} is absent: apt-get install dataset-fashion-mnist")
        dataset = loaded(listed("fashion_mnist", root=tmp_path / "root"))
        assert not (tmp_path / "root").exists()
        raw = tmp_path / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for name in NAMES:
            (raw / name).write_bytes(gzip.decompress((debian / f"{name}.gz").read_bytes()))
        self.check(dataset, "FashionMNIST", tmp_path)
