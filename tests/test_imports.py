"""The doors of the house: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "train").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py")])
FLOORS = (
    ("train",),
    ("pipeline.__main__",),
    ("pipeline.commands",),
    ("pipeline.checks",),
    ("pipeline.tracking", "pipeline.report"),
    ("pipeline.figures",),
    ("pipeline.learning",),
    ("pipeline.data",),
    ("pipeline.run",),
    ("pipeline.parallel",),
    ("pipeline.models",),
    ("pipeline.config",),
    ("pipeline.base",),
)
"""The rooms from the top of the house to its ground. A room imports only from floors below its own."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module: str) -> int:
    """Return the floor of the room that holds `module`, counted from the top."""
    return next(i for i, rooms in enumerate(FLOORS) if any(f"{module}.".startswith(f"{room}.") for room in rooms))


def room(module: str) -> str:
    """Return the name of the room that holds `module`."""
    return next(room for rooms in FLOORS for room in rooms if f"{module}.".startswith(f"{room}."))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] in ("train", "pipeline")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_from_floors_below(path: Path) -> None:
    module = module_name(path)
    if module == "pipeline":
        return
    others = {name for name in ours(path) if name not in ("train", "pipeline") and room(name) != room(module)}
    assert {name for name in others if floor(name) <= floor(module)} == set()


def test_a_training_imports_neither_commands_nor_tracking() -> None:
    names = {name for path in SOURCES if module_name(path).startswith("train") for name in ours(path)}
    assert not [name for name in names if name.startswith(("pipeline.commands", "pipeline.tracking"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_launch_reads_the_launchers_variables_and_tracking_knows_no_ranks(path: Path) -> None:
    module, text = module_name(path), path.read_text()
    if module != "pipeline.base.launch":
        assert not any(f'"{name}"' in text for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if module.startswith("pipeline.tracking"):
        assert "torch.distributed" not in text
        assert not any(name.startswith("torch") for name in imports(path))
    if not module.startswith("pipeline.tracking"):
        assert not any(name.split(".")[0] == "mlflow" for name in imports(path))


def test_no_file_in_train_has_the_name_of_a_module_that_others_import() -> None:
    names = {path.stem for path in (ROOT / "train").glob("*.py")} - {"__init__", "main"}
    assert not names & (set(sys.stdlib_module_names) | {"torch", "mlflow", "yaml", "pydantic", "numpy", "tqdm"})


def test_what_a_training_does_not_import() -> None:
    """As a fresh interpreter has it: mlflow and torchvision never, torch's compiler not before the first step."""
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pipeline.base.timing import StartupTimer\n"
        "from train.main import main\n"
        "at_first_step = []\n"
        "StartupTimer.after_step = lambda self, output, step: at_first_step.extend(sys.modules)\n"
        "settings = ['train.epochs=1', 'tracking.enabled=false', 'data.dataset=synthetic', "
        "'data.arguments.train_size=64', 'data.arguments.validation_size=32']\n"
        "assert main(settings) == 0\n"
        "assert 'torch' in at_first_step and 'torch._dynamo' not in at_first_step\n"
        "loaded = {name for name in ('mlflow', 'torchvision', 'sklearn', 'matplotlib') if name in sys.modules}\n"
        "assert not loaded, loaded\n"
    )

    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
