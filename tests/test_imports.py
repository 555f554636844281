"""Who may import whom, and what is loaded before anything heavy is asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dpo

PACKAGE = Path(dpo.__file__).parent
BASE = {
    *("errors", "atomic", "progress", "sections", "config_files"),
    *("config", "loss_config", "online_config", "plan_config", "evaluation_config"),
    "schemas",
}
ALLOWED = {
    "__init__": {
        "config",
        "config_files",
        "online_config",
        "evaluation_config",
        "core",
        "train",
        "evaluate",
    },  # of types, and lazily
    "errors": set(),
    "atomic": {"errors"},
    "progress": {"errors"},
    "sections": set(),
    "loss_config": {"sections"},
    "config": {"errors", "loss_config", "sections"},
    "online_config": {"config", "loss_config", "sections"},
    "evaluation_config": {"config", "sections"},
    "schemas": {"config", "evaluation_config", "online_config", "plan_config"},
    "config_files": {"errors", "loss_config", "sections"},
    "plan_config": {"config", "core", "online_config", "sections"},
    "core": {"errors"},
    "theory": {"core", "errors", "atomic"},
    "data": {"core", "errors", "atomic"},
    "models": {"data", "core", "errors"},
    "train": BASE | {"models", "data", "core"},
    "evaluate": BASE | {"train", "models", "data", "core"},
    "report": BASE | {"evaluate", "train", "models", "data", "core"},
    "experiment": BASE | {"report", "evaluate", "train", "models", "data", "core"},
    "cli": BASE | {"experiment", "report", "evaluate", "train", "models", "data", "core", "theory"},
}
"""Package or module: what of ours it may import, inside functions and for typing too."""


def part_of(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file):
    """The parts of our package that a file imports, with the line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            own = node.module == "dpo"
            modules = [f"dpo.{a.name}" for a in node.names] if own else [node.module]
        else:
            continue
        for module in modules:
            if module.split(".")[0] == "dpo" and module != "dpo.__version__":
                yield module.split(".")[1], node.lineno


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: f.stem)
def test_imports_point_downwards(file):
    allowed = ALLOWED[part_of(file)] | {part_of(file)}
    upwards = [
        f"{file.name}:{line} imports {m}" for m, line in imports_of(file) if m not in allowed
    ]
    assert not upwards


def test_the_rule_itself_has_no_circle_and_knows_every_part():
    assert {part_of(file) for file in PACKAGE.rglob("*.py")} == ALLOWED.keys()
    placed = []
    while len(placed) < len(ALLOWED):
        ready = [part for part in ALLOWED if part not in placed and ALLOWED[part] <= set(placed)]
        assert ready, "the allowed imports form a circle"
        placed += ready


def loaded_by(code):
    """The top-level modules that a fresh interpreter has after the code."""
    script = f"{code}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


HEAVY = {"torch", "transformers", "datasets", "sentence_transformers", "matplotlib", "scipy"}


@pytest.mark.parametrize(
    "code",
    [
        "import dpo, dpo.cli",
        "from dpo.config import *",
        "from dpo.config import SFTConfig\nfrom dpo.config_files import read_config\n"
        "try: read_config(SFTConfig, None, ['learning_rate=1'])\nexcept ValueError: pass",
    ],
    ids=["cli", "config", "a wrong setting"],
)
def test_nothing_heavy_is_loaded_before_it_is_needed(code):
    assert not loaded_by(code) & HEAVY


def test_importing_the_package_loads_nothing_of_it():
    assert "pydantic" not in loaded_by("import dpo")
