"""An installed wheel, away from the checkout: commands, recipes by name, and a training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = ("train.epochs=1", "tracking.enabled=false", "run.name=wheel", "data.dataset=synthetic")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and nothing else; dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    # from a copy: building leaves folders beside the sources
    source = folder / "source"
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(source)], check=True)
    changed = subprocess.run(["git", "diff", "HEAD", "--binary"], cwd=ROOT, capture_output=True, check=True).stdout
    if changed:
        subprocess.run(["git", "apply", "--index"], cwd=source, input=changed, check=True)
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(wheel, check=True, timeout=100)
    (built,) = folder.glob("convoy-*.whl")
    site = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(built)], check=True, timeout=100)
    return site


def convoy(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(site / "bin" / "convoy"), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_console_script_lists_its_commands(site: Path, tmp_path: Path) -> None:
    done = convoy(site, tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("train", "prepare", "sync", "report", "sweep"))


def test_it_trains_a_recipe_by_its_name_though_the_folder_has_packages_of_its_own(site: Path, tmp_path: Path) -> None:
    for name in ("train", "pipeline"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')\n")
    small = ("data.arguments={train_size: 64, validation_size: 16}", "data.global_batch_size=16", "optim.warmup=0")
    done = convoy(site, tmp_path, "train", "--config", "mnist_fast", *SETTINGS, *small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "wheel" / "model" / "best.safetensors").is_file()
    synced = convoy(site, tmp_path, "sync", "runs/wheel")
    assert synced.returncode == 0, synced.stderr


def test_a_recipe_that_does_not_exist_is_answered_with_those_that_do(site: Path, tmp_path: Path) -> None:
    done = convoy(site, tmp_path, "train", "--config", "mnist_quick")
    assert done.returncode == 2
    assert "mnist_quick" in done.stderr and "mnist_fast" in done.stderr
