"""A Slurm cluster for all tests of this folder together."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_for_slurm, start_cluster


@pytest.fixture(scope="session")
def _can_have_clusters() -> None:
    missing = missing_for_slurm()
    if missing:
        pytest.skip(missing)


@pytest.fixture(scope="session")
def cluster(_can_have_clusters: None) -> Iterator[Cluster]:
    """Four nodes. A test that leaves jobs there asks for `empty_cluster` instead."""
    with start_cluster(Path(tempfile.mkdtemp(prefix="convoy-slurm-"))) as started:
        yield started


@pytest.fixture
def empty_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """The same four nodes, all idle; whatever the test leaves there is cancelled."""
    cluster.wait_until_idle()
    yield cluster
    cluster.cancel_all()


@pytest.fixture
def cluster_folder(_can_have_clusters: None) -> Iterator[Path]:
    """For a cluster of the test's own; pytest's folders have names too long for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="convoy-slurm-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
