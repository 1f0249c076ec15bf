"""Datasets: what is loaded, what is refused, and fetching among races, deaths and bad mirrors."""

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

from pipeline.data.sources import datasets, download, idx
from pipeline.data.sources.datasets import (
    DATASETS,
    DataError,
    Dataset,
    DatasetInfo,
    ImageSet,
    load_dataset,
    obtain_dataset,
    prepare_dataset,
    synthetic_info,
)

NOWHERE = Path("/nonexistent")
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
FILES = (IMAGES, LABELS, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(values: np.ndarray[Any, Any]) -> bytes:
    header = np.array([0x0800 + values.ndim, *values.shape], dtype=">u4")
    return header.tobytes() + values.astype(np.uint8).tobytes()


def measured(images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    pixels = images.images.double() / 255
    std, mean = torch.std_mean(pixels, dim=(0, 2, 3), correction=0)
    return tuple(mean.tolist()), tuple(std.tolist())


def snapshot(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}


@dataclass(frozen=True)
class Tiny:
    """A dataset like MNIST, a few samples large, whose checksums the code under test believes."""

    info: DatasetInfo
    root: Path
    contents: dict[str, bytes]

    @property
    def folder(self) -> Path:
        return self.root / idx.TORCHVISION_NAMES[self.info.name] / "raw"

    def write(self, *, packed: bool = False) -> None:
        self.folder.mkdir(parents=True)
        for name, content in self.contents.items():
            path = self.folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(content) if packed else content)

    def prepare(self, *, download: bool = False) -> None:
        prepare_dataset(self.info, self.root, download=download)

    def load(self, image_size: int | None = None) -> Dataset:
        return load_dataset(self.info, self.root, image_size=image_size)

    def obtain(self, *, download: bool = False) -> Dataset:
        return obtain_dataset(self.info, self.root, download=download, image_size=None)

    def refusal(self, function: Callable[[], object]) -> str:
        with pytest.raises(DataError) as caught:
            function()
        return str(caught.value)


def make_tiny(name: str, root: Path) -> Tiny:
    info = replace(DATASETS[name], train_size=20, eval_size=10, image_size=6)
    generator = np.random.default_rng(0)
    arrays = []
    for size in (info.train_size, info.eval_size):
        arrays += [generator.integers(0, 256, (size, 6, 6)), np.arange(size) % info.num_classes]
    return Tiny(info, root, {file: idx_bytes(array) for file, array in zip(FILES, arrays, strict=True)})


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    tiny = make_tiny("mnist", tmp_path / "root")
    digests = tuple(hashlib.sha256(content).hexdigest() for content in tiny.contents.values())
    monkeypatch.setitem(idx.SHA256, "mnist", digests)
    return tiny


class TestDigits:
    def load(self, image_size: int | None = None) -> Dataset:
        return load_dataset(DATASETS["digits"], NOWHERE, image_size=image_size)

    def test_need_neither_root_nor_download(self) -> None:
        prepare_dataset(DATASETS["digits"], NOWHERE, download=False)
        assert not NOWHERE.exists()

    def test_have_the_announced_shapes_and_a_stratified_split(self) -> None:
        digits = self.load()
        assert digits.train.images.shape == (1437, 1, 28, 28)
        assert digits.evaluation.images.shape == (360, 1, 28, 28)
        for split in (digits.train, digits.evaluation):
            assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
            counts = torch.bincount(split.labels, minlength=10)
            assert counts.sum() == len(split.images)
            assert counts.min() > 0.95 * counts.float().mean()

    def test_split_covers_each_image_once_and_spans_all_grey_levels(self) -> None:
        from sklearn.datasets import load_digits

        digits = self.load(image_size=8)
        found = torch.cat([digits.train.images, digits.evaluation.images]).flatten(1)
        expected = torch.from_numpy(load_digits().data * 255 / 16).round().to(torch.uint8)
        assert sorted(found.tolist()) == sorted(expected.tolist())

    def test_two_loads_are_equal_and_another_size_has_another_digest(self) -> None:
        first, second, small = self.load(), self.load(), self.load(image_size=16)
        assert torch.equal(first.train.images, second.train.images)
        assert torch.equal(first.train.labels, second.train.labels)
        assert first.digest == second.digest != small.digest
        assert (first.info.image_size, small.info.image_size) == (28, 16)

    def test_announced_mean_and_std_are_those_of_the_training_images(self) -> None:
        mean, std = measured(self.load().train)
        assert mean == pytest.approx(DATASETS["digits"].mean, abs=5e-5)
        assert std == pytest.approx(DATASETS["digits"].std, abs=5e-5)


class TestSynthetic:
    info = synthetic_info(channels=3, num_classes=7, image_size=12, train_size=700, eval_size=140)

    def load(self, *, info: DatasetInfo = info, seed: int = 0) -> Dataset:
        prepare_dataset(info, NOWHERE, download=False)
        return load_dataset(info, NOWHERE, image_size=None, seed=seed)

    def test_has_the_shape_asked_for_and_balanced_labels(self) -> None:
        made = self.load()
        assert made.train.images.shape == (700, 3, 12, 12)
        assert made.evaluation.images.shape == (140, 3, 12, 12)
        assert torch.bincount(made.train.labels).tolist() == [100] * 7
        assert torch.bincount(made.evaluation.labels).tolist() == [20] * 7
        assert made.info.class_names[6] == "class 6"

    def test_is_a_function_of_the_seed(self) -> None:
        assert self.load().digest == self.load().digest != self.load(seed=1).digest

    def test_bits_are_these_on_every_machine(self) -> None:
        info = synthetic_info(channels=1, num_classes=2, image_size=3, train_size=2, eval_size=1)
        images = self.load(info=info).train.images
        assert images[0].flatten().tolist() == [160, 182, 195, 221, 205, 226, 31, 208, 68]

    def test_training_images_do_not_depend_on_how_many_are_for_evaluation(self) -> None:
        other = self.load(info=replace(self.info, eval_size=7))
        assert torch.equal(other.train.images, self.load().train.images)

    def test_evaluation_images_are_not_the_training_images(self) -> None:
        made = self.load(info=replace(self.info, eval_size=self.info.train_size))
        seen = {image.numpy().tobytes() for image in made.train.images}
        assert not any(image.numpy().tobytes() in seen for image in made.evaluation.images)

    def test_evaluation_is_classified_by_the_class_means_of_training(self) -> None:
        made = self.load()
        images, labels = made.train.images.flatten(1).float(), made.train.labels
        means = torch.stack([images[labels == index].mean(0) for index in range(7)])
        nearest = torch.cdist(made.evaluation.images.flatten(1).float(), means).argmin(1)
        assert (nearest == made.evaluation.labels).float().mean() > 0.99

    def test_announced_mean_and_std_are_about_right(self) -> None:
        many = synthetic_info(channels=2, num_classes=100, image_size=8, train_size=2000, eval_size=10)
        mean, std = measured(self.load(info=many).train)
        assert mean == pytest.approx(many.mean, abs=0.01)
        assert std == pytest.approx(many.std, abs=0.01)


class TestReading:
    def test_gives_the_images_and_labels_that_were_written(self, tiny: Tiny) -> None:
        tiny.write()
        tiny.prepare()
        loaded = tiny.load()
        assert loaded.train.images.shape == (20, 1, 6, 6)
        assert loaded.evaluation.images.shape == (10, 1, 6, 6)
        assert loaded.train.images.numpy().tobytes() == tiny.contents[IMAGES][16:]
        assert loaded.train.labels.tolist() == list(tiny.contents[LABELS][8:])
        assert loaded.train.labels.dtype == torch.int64

    def test_packed_files_count_as_the_same_dataset(self, tiny: Tiny, tmp_path: Path) -> None:
        tiny.write()
        packed = replace(tiny, root=tmp_path / "packed")
        packed.write(packed=True)
        packed.prepare()
        assert packed.load().digest == tiny.load().digest

    def test_digest_changes_with_one_bit_of_an_image_and_with_one_label(self, tiny: Tiny) -> None:
        tiny.write()
        digests = {tiny.load().digest}
        for name, position in ((IMAGES, 100), (LABELS, 9)):
            content = bytearray(tiny.contents[name])
            content[position] ^= 1
            (tiny.folder / name).write_bytes(content)
            digests.add(tiny.load().digest)
        assert len(digests) == 3

    def test_complete_root_is_left_untouched(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        tiny.write()
        for path in (tiny.folder, tiny.folder.parent, tiny.root):
            path.chmod(0o555)
        before = snapshot(tiny.root)
        monkeypatch.setattr(datasets, "exclusive", None)  # not even a lock may be taken
        tiny.prepare(download=True)
        tiny.load()
        assert snapshot(tiny.root) == before

    def test_resizing_in_chunks_equals_resizing_at_once(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        tiny.write()
        for size in (3, 9):
            whole = tiny.load(image_size=size)
            with monkeypatch.context() as patch:
                patch.setattr(datasets, "_RESIZE_CHUNK_PIXELS", 81)
                chunked = tiny.load(image_size=size)
            assert whole.train.images.shape == (20, 1, size, size)
            assert whole.train.images.dtype == torch.uint8
            assert whole.info.image_size == size
            assert torch.equal(whole.train.images, chunked.train.images)
            # Averages of random pixels: the mean stays, the deviation shrinks.
            before, after = tiny.load().train.images.float(), whole.train.images.float()
            assert after.mean().item() == pytest.approx(before.mean().item(), rel=0.05)
            assert after.std() < before.std()

    def test_image_size_below_one_is_refused(self, tiny: Tiny) -> None:
        tiny.write()
        assert "data.image_size=0" in tiny.refusal(lambda: tiny.load(image_size=0))

    def test_unknown_dataset_is_refused_with_the_known_names(self, tiny: Tiny) -> None:
        unknown = replace(tiny, info=replace(tiny.info, name="imagenet"))
        for function in (unknown.prepare, unknown.load):
            message = unknown.refusal(function)
            assert "data.dataset=imagenet" in message
            assert "fashion_mnist" in message


def flip(content: bytes, position: int, bits: int = 1) -> bytes:
    return content[:position] + bytes([content[position] ^ bits]) + content[position + 1 :]


class TestDamage:
    def refusals(self, tiny: Tiny, name: str, content: bytes) -> tuple[str, str]:
        """The messages of prepare and of load, once the file holds `content`."""
        tiny.write()
        (tiny.folder / name).write_bytes(content)
        messages = tiny.refusal(tiny.prepare), tiny.refusal(tiny.load)
        for message in messages:
            assert str(tiny.folder / name) in message
            assert "data.download=true" in message
        return messages

    @pytest.mark.parametrize("length", [0, 1, 4, 15, 16, 17, 16 + 20 * 36 - 1])
    def test_truncated_images_are_refused(self, tiny: Tiny, length: int) -> None:
        for message in self.refusals(tiny, IMAGES, tiny.contents[IMAGES][:length]):
            assert f"{length} bytes, expected {16 + 20 * 36}" in message

    @pytest.mark.parametrize("length", [0, 7, 8, 27])
    def test_truncated_labels_are_refused(self, tiny: Tiny, length: int) -> None:
        self.refusals(tiny, LABELS, tiny.contents[LABELS][:length])

    def test_file_with_one_byte_more_is_refused(self, tiny: Tiny) -> None:
        self.refusals(tiny, IMAGES, tiny.contents[IMAGES] + b"\0")

    def test_wrong_magic_number_is_refused(self, tiny: Tiny) -> None:
        for message in self.refusals(tiny, IMAGES, flip(tiny.contents[IMAGES], 3)):
            assert "0x00000802, expected 0x00000803" in message

    def test_page_of_a_captive_portal_is_refused(self, tiny: Tiny) -> None:
        self.refusals(tiny, IMAGES, b"<html>" + bytes(10 + 20 * 36))

    def test_other_dimensions_are_refused(self, tiny: Tiny) -> None:
        for message in self.refusals(tiny, IMAGES, flip(tiny.contents[IMAGES], 7)):
            assert "(21, 6, 6), expected (20, 6, 6)" in message

    def test_label_out_of_range_is_refused(self, tiny: Tiny) -> None:
        content = tiny.contents[LABELS]
        for message in self.refusals(tiny, LABELS, content[:11] + b"\x0a" + content[12:]):
            assert "label 10 at position 3, expected 0 to 9" in message

    @pytest.mark.parametrize("name", FILES)
    def test_flipped_bit_is_refused_by_the_checksum(self, tiny: Tiny, name: str) -> None:
        tiny.write()
        (tiny.folder / name).write_bytes(flip(tiny.contents[name], 9 if "labels" in name else 99))
        message = tiny.refusal(tiny.prepare)
        assert str(tiny.folder / name) in message
        assert "SHA-256" in message

    def test_flipped_bit_is_refused_even_when_the_rest_is_absent(self, tiny: Tiny) -> None:
        tiny.write()
        (tiny.folder / IMAGES).write_bytes(flip(tiny.contents[IMAGES], 99))
        (tiny.folder / LABELS).unlink()
        assert "SHA-256" in tiny.refusal(lambda: tiny.prepare(download=True))

    def test_damaged_packed_files_are_refused(self, tiny: Tiny) -> None:
        tiny.write(packed=True)
        path = tiny.folder / f"{IMAGES}.gz"
        whole = path.read_bytes()
        reserved_block_type = whole[:10] + b"\x07" + whole[11:]
        wrong_crc = flip(whole, len(whole) - 6)
        for content in (whole[:-9], b"", b"nonsense", reserved_block_type, wrong_crc):
            path.write_bytes(content)
            for function in (tiny.prepare, tiny.load):
                assert str(path) in tiny.refusal(function)

    def test_packed_kmnist_with_another_md5_than_published_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torchvision.datasets import KMNIST

        tiny = make_tiny("kmnist", tmp_path)
        tiny.write(packed=True)
        assert "MD5" in tiny.refusal(tiny.prepare)
        digests = [hashlib.md5((tiny.folder / f"{name}.gz").read_bytes()).hexdigest() for name in FILES]
        resources = [(f"{name}.gz", digest) for name, digest in zip(FILES, digests, strict=True)]
        monkeypatch.setattr(KMNIST, "resources", resources)
        tiny.prepare()
        assert len(tiny.load().train.labels) == 20


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
def published(tiny: Tiny, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """The tiny dataset, absent here, but to be had from the mirror."""
    from torchvision.datasets import MNIST

    mirror.archives = {f"{name}.gz": gzip.compress(content) for name, content in tiny.contents.items()}
    digests = [(name, hashlib.md5(archive).hexdigest()) for name, archive in mirror.archives.items()]
    monkeypatch.setattr(MNIST, "resources", digests)
    monkeypatch.setattr(MNIST, "mirrors", [mirror.url])
    return tiny


def refused_url() -> str:
    """An address of this machine where nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}/"


class TestAbsent:
    @pytest.fixture(autouse=True)
    def no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torchvision

        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(idx, "DEBIAN_FASHION_MNIST", NOWHERE)
        for name in idx.TORCHVISION_NAMES.values():
            monkeypatch.setattr(getattr(torchvision.datasets, name), "mirrors", [refused_url()])
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{refused_url()}cifar-10-python.tar.gz")

    @pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "cifar10"])
    @pytest.mark.parametrize("allowed", [False, True])
    def test_error_names_the_files_the_reason_and_the_ways_out(self, tmp_path: Path, name: str, allowed: bool) -> None:
        root = tmp_path / "root"
        with pytest.raises(DataError) as caught:
            prepare_dataset(DATASETS[name], root, download=allowed)
        message = str(caught.value)
        folder = "cifar-10-batches-py" if name == "cifar10" else f"{idx.TORCHVISION_NAMES[name]}/raw"
        files = ("data_batch_1", "test_batch", "batches.meta") if name == "cifar10" else FILES
        ways_out = ("data.root", "data.download=true", "data.dataset=digits")
        for expected in (f"data.dataset={name}", str(root / folder), *files, *ways_out):
            assert expected in message
        assert ("apt-get install dataset-fashion-mnist" in message) == (name == "fashion_mnist")
        assert ("Connection refused" in message) == allowed
        assert ("http://127.0.0.1" in message) == allowed
        assert ("data.download=false" in message) == (not allowed)
        assert not (root / folder).exists()

    def test_load_refuses_too(self, tiny: Tiny) -> None:
        tiny.write()
        (tiny.folder / LABELS).unlink()
        message = tiny.refusal(tiny.load)
        assert LABELS in message
        assert IMAGES not in message

    def test_root_that_cannot_be_made_is_part_of_the_error(self, tiny: Tiny) -> None:
        tiny.root.write_text("a file where the folder should be")
        assert "could not be stored" in tiny.refusal(lambda: tiny.prepare(download=True))

    def test_silent_mirror_is_given_up_soon(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision.datasets import MNIST

        monkeypatch.setattr(download, "SOCKET_TIMEOUT_SECONDS", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
            monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
            assert "timed out" in tiny.refusal(lambda: tiny.prepare(download=True))
        assert socket.getdefaulttimeout() is None


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(".") and path.name != download.LOCK_NAME]


def fork(function: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


class TestDownload:
    def test_puts_verified_files_in_place_and_leaves_nothing_else(self, published: Tiny) -> None:
        published.prepare(download=True)
        assert {path.name: path.read_bytes() for path in published.folder.iterdir()} == published.contents
        assert leftovers(published.root) == []
        assert len(published.load().train.labels) == 20

    def test_fetches_only_what_is_absent(self, published: Tiny, mirror: Mirror) -> None:
        published.write()
        (published.folder / LABELS).unlink()
        published.prepare(download=True)
        assert set(mirror.requests) == {f"{LABELS}.gz"}
        published.load()

    def test_takes_the_next_mirror_when_one_refuses(
        self, published: Tiny, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torchvision.datasets import MNIST

        monkeypatch.setattr(MNIST, "mirrors", [refused_url(), f"{mirror.url}not-here/", mirror.url])
        published.prepare(download=True)
        published.load()

    @pytest.mark.parametrize("bad", [None, b"", b"<html>log in first</html>"])
    def test_failure_leaves_nothing_that_counts_and_can_be_repeated(
        self, published: Tiny, mirror: Mirror, bad: bytes | None
    ) -> None:
        name = f"{FILES[2]}.gz"
        good = mirror.archives.pop(name)
        if bad is not None:
            mirror.archives[name] = bad
        message = published.refusal(lambda: published.prepare(download=True))
        assert f"{mirror.url}{name}" in message
        assert ("404" if bad is None else "corrupted") in message
        assert not published.folder.exists()
        assert leftovers(published.root) == []
        mirror.archives[name] = good
        published.prepare(download=True)
        published.load()

    def test_content_with_another_sha256_never_gets_its_name(
        self, published: Tiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(idx.SHA256, "mnist", ("0" * 64,) * 4)
        assert "SHA-256" in published.refusal(lambda: published.prepare(download=True))
        assert not published.folder.exists()

    def test_processes_at_once_download_once(self, published: Tiny, mirror: Mirror, tmp_path: Path) -> None:
        alone = replace(published, root=tmp_path / "alone")
        alone.prepare(download=True)
        requests_of_one = mirror.requests.copy()
        mirror.requests.clear()
        mirror.delay_seconds = 0.05  # so that they overlap
        processes = [fork(lambda: published.prepare(download=True)) for _ in range(3)]
        for process in processes:
            process.join(30)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        assert mirror.requests == requests_of_one
        assert published.load().digest == alone.load().digest

    def test_killed_download_frees_the_lock_and_leaves_nothing_that_counts(
        self, published: Tiny, mirror: Mirror
    ) -> None:
        mirror.hold = f"{FILES[2]}.gz"
        process = fork(lambda: published.prepare(download=True))
        assert mirror.held.wait(30)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        assert not published.folder.exists()
        assert len(leftovers(published.root)) == 1
        mirror.release.set()
        published.prepare(download=True)
        published.load()
        assert leftovers(published.root) == []

    def test_lock_moves_to_the_temporary_folder_where_the_root_has_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(download, "LOCK_NAME", "no-such-folder/lock")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        inside = multiprocessing.get_context("fork").Event()

        def compete() -> None:
            with download.exclusive(tmp_path / "root"):
                inside.set()

        with download.exclusive(tmp_path / "root"):
            process = fork(compete)
            assert not inside.wait(0.3)
        assert inside.wait(30)
        process.join(30)


class TestObtaining:
    """Preparing and loading in one."""

    def test_gives_what_preparing_and_loading_gives(self, tiny: Tiny) -> None:
        tiny.write()
        tiny.prepare()
        obtained, loaded = tiny.obtain(), tiny.load()
        assert (obtained.info, obtained.digest) == (loaded.info, loaded.digest)
        for ours, theirs in ((obtained.train, loaded.train), (obtained.evaluation, loaded.evaluation)):
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)

    @pytest.mark.parametrize("packed", [False, True])
    def test_reads_each_file_once(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
        tiny.write(packed=packed)
        opened: Counter[str] = Counter()
        read = idx._read_content

        def counted(path: Path, file: idx.IdxFile) -> idx.Bytes:
            opened[file.name] += 1
            return read(path, file)

        monkeypatch.setattr(idx, "_read_content", counted)
        tiny.obtain()
        assert opened == Counter(FILES)

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("packed", [False, True])
    def test_refuses_a_flipped_bit(self, tiny: Tiny, name: str, packed: bool) -> None:
        tiny.contents[name] = flip(tiny.contents[name], 9 if "labels" in name else 99)
        tiny.write(packed=packed)
        message = tiny.refusal(tiny.obtain)
        assert str(tiny.folder / name) in message
        assert "SHA-256" in message

    def test_refuses_packed_kmnist_with_another_md5_than_published(self, tmp_path: Path) -> None:
        tiny = make_tiny("kmnist", tmp_path)
        tiny.write(packed=True)
        assert "MD5" in tiny.refusal(tiny.obtain)

    def test_fetches_what_is_absent_if_it_may(self, published: Tiny, mirror: Mirror) -> None:
        published.write()
        (published.folder / LABELS).unlink()
        assert "data.download=false" in published.refusal(published.obtain)
        assert len(published.obtain(download=True).train.labels) == 20
        assert set(mirror.requests) == {f"{LABELS}.gz"}


class TestCifar10:
    """A tiny archive in the real one's form, its checksums put in the place of the published ones."""

    info = replace(DATASETS["cifar10"], train_size=50, eval_size=10)

    @pytest.fixture
    def files(self, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
        from torchvision.datasets import CIFAR10

        generator = np.random.default_rng(0)
        batches = [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]
        files = {}
        for name in batches:
            pixels = generator.integers(0, 256, (10, 3072), dtype=np.uint8)
            files[name] = pickle.dumps({"data": pixels, "labels": list(range(10))})
        files["batches.meta"] = pickle.dumps({"label_names": list(self.info.class_names)})
        md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        mirror.archives["cifar-10-python.tar.gz"] = packed.getvalue()
        monkeypatch.setattr(CIFAR10, "url", f"{mirror.url}cifar-10-python.tar.gz")
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
        monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in batches[:5]])
        monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
        monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
        return files

    def test_is_downloaded_and_read_channels_first(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        prepare_dataset(self.info, tmp_path, download=True)
        loaded = load_dataset(self.info, tmp_path, image_size=None)
        assert loaded.train.images.shape == (50, 3, 32, 32)
        assert loaded.evaluation.labels.tolist() == list(range(10))
        expected = pickle.loads(files["data_batch_2"])["data"]
        assert np.array_equal(loaded.train.images[10:20].flatten(1).numpy(), expected)
        assert leftovers(tmp_path) == []
        prepare_dataset(self.info, tmp_path, download=False)

    def test_completes_a_folder_that_lacks_a_file(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        prepare_dataset(self.info, tmp_path, download=True)
        (tmp_path / "cifar-10-batches-py/data_batch_3").unlink()
        with pytest.raises(DataError, match="lacks data_batch_3;"):
            load_dataset(self.info, tmp_path, image_size=None)
        prepare_dataset(self.info, tmp_path, download=True)
        load_dataset(self.info, tmp_path, image_size=None)

    def test_damaged_batch_is_refused_unread(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        prepare_dataset(self.info, tmp_path, download=True)
        path = tmp_path / "cifar-10-batches-py/data_batch_3"
        path.write_bytes(flip(files["data_batch_3"], 2000))
        with pytest.raises(DataError, match=r"data_batch_3 is damaged: MD5"):
            prepare_dataset(self.info, tmp_path, download=True)
        with pytest.raises(DataError, match=r"data_batch_3 is damaged: MD5"):
            load_dataset(self.info, tmp_path, image_size=None)
        with pytest.raises(DataError, match=r"data_batch_3 is damaged: MD5"):
            obtain_dataset(self.info, tmp_path, download=True, image_size=None)


class TestRealData:
    @pytest.fixture
    def mnist_root(self) -> Path:
        root = os.environ.get("CONVOY_MNIST_ROOT")
        if not root:
            pytest.skip("CONVOY_MNIST_ROOT is not set")
        return Path(root)

    @pytest.fixture
    def debian_folder(self) -> Path:
        folder = idx.DEBIAN_FASHION_MNIST
        if not folder.is_dir():
            pytest.skip(f"{folder} is absent: apt-get install dataset-fashion-mnist")
        return folder

    def check(self, loaded: Dataset, name: str, folder: Path) -> None:
        """The pixels and labels are those torchvision reads, the constants those of the pixels."""
        import torchvision

        mean, std = measured(loaded.train)
        assert mean == pytest.approx(DATASETS[name].mean, abs=5e-5)
        assert std == pytest.approx(DATASETS[name].std, abs=5e-5)
        reader = getattr(torchvision.datasets, idx.TORCHVISION_NAMES[name])
        for train, ours in ((True, loaded.train), (False, loaded.evaluation)):
            theirs = reader(folder, train=train)
            assert torch.equal(ours.images[:, 0], theirs.data)
            assert torch.equal(ours.labels, theirs.targets)

    def test_mnist_is_what_torchvision_reads(self, mnist_root: Path) -> None:
        prepare_dataset(DATASETS["mnist"], mnist_root, download=False)
        loaded = load_dataset(DATASETS["mnist"], mnist_root, image_size=None)
        self.check(loaded, "mnist", mnist_root)

    def test_fashion_mnist_is_found_where_debian_puts_it(self, debian_folder: Path, tmp_path: Path) -> None:
        root = tmp_path / "root"
        prepare_dataset(DATASETS["fashion_mnist"], root, download=False)
        loaded = load_dataset(DATASETS["fashion_mnist"], root, image_size=None)
        assert not root.exists()
        raw = tmp_path / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for name in FILES:
            (raw / name).write_bytes(gzip.decompress((debian_folder / f"{name}.gz").read_bytes()))
        self.check(loaded, "fashion_mnist", tmp_path)


def test_every_announcement_is_consistent() -> None:
    for name, info in DATASETS.items():
        assert info.name == name
        assert len(info.mean) == len(info.std) == info.channels
        assert len(info.class_names) == len(set(info.class_names)) == info.num_classes
        assert "\n" not in info.source


def test_importing_costs_neither_torchvision_nor_scikit_learn() -> None:
    code = "import sys, pipeline.data.sources.datasets; sys.exit(bool({'torchvision', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(datasets.__file__).parents[3]).returncode == 0
