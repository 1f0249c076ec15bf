"""What the documents say exists, and is what is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from pipeline.config import FIELDS
from pipeline.run.folder import RunFolder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def indented_lines() -> list[str]:
    return [line.strip() for line in README.splitlines() if line.startswith("    ")]


def test_the_test_command_of_the_readme_is_the_one_that_ci_runs() -> None:
    (command,) = (line for line in indented_lines() if "/pytest" in line)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_every_path_and_key_in_the_readmes_commands_exists() -> None:
    commands = [line.partition("#")[0] for line in indented_lines() if "train/main.py" in line or "sbatch" in line]
    assert len(commands) >= 5
    for word in (word for command in commands for word in shlex.split(command)):
        if word.startswith(("train/", "configs/", "slurm/")):
            assert (ROOT / word).is_file(), word
        elif "=" in word and not word.startswith("--"):
            assert word.partition("=")[0] in FIELDS, word


def test_every_recipe_is_in_the_readme_with_the_accuracy_that_its_header_states() -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
        assert "torchrun" in header
        (row,) = (line for line in README.splitlines() if line.startswith(f"| [{path.name}]"))
        accuracy = row.split("|")[4].strip()
        assert accuracy in header, path.name
        epochs = yaml.safe_load(path.read_text())["train"]["epochs"]
        assert row.split("|")[3].strip() == str(epochs)


def test_the_design_names_every_module_there_is_and_no_other() -> None:
    rooms = (ROOT / "docs" / "design.md").read_text().partition("## The contracts")[0]
    named = re.findall(r"\b([a-z_]+\.py)\b", rooms.replace("tests/test_imports.py", ""))
    existing = [path.name for folder in ("train", "pipeline") for path in (ROOT / folder).rglob("*.py")]
    assert sorted(named) == sorted(name for name in existing if not name.startswith("__"))


def test_the_walks_of_the_design_pass_files_that_exist() -> None:
    walks = (ROOT / "docs" / "design.md").read_text().partition("## Five walks")[2].partition("## Words")[0]
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", walks):
        assert (ROOT / name).is_file() or (ROOT / "pipeline" / name).is_file(), name


def test_the_run_folder_is_as_the_readme_shows_it() -> None:
    folder = RunFolder(Path("runs/name"))
    for path in (folder.config, folder.journal, folder.checkpoints, folder.figures):
        assert path.name in README
