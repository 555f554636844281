"""Wheel and source distribution: what is in them, and that they install where nothing is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    file.relative_to(ROOT / "src").as_posix()
    for file in (ROOT / "src" / "dpo").rglob("*")
    if file.is_file() and "__pycache__" not in file.parts
}
pytestmark = pytest.mark.slow


def run(*words, cwd=None, path=None):
    """What a command prints; it finds no module by PYTHONPATH but those in `path`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = path
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=600, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder with both, built offline."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="session")
def wheel(built):
    (file,) = built.glob("*.whl")
    return file


@pytest.fixture(scope="session")
def sdist(built):
    (file,) = built.glob("*.tar.gz")
    return file


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """The Python of an environment with the wheel and nothing else, not even pip."""
    folder = tmp_path_factory.mktemp("empty") / "env"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, wheel)
    return python


def version():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.+)"', text, flags=re.MULTILINE).group(1)


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if name.startswith("dpo/")}
    assert package == SOURCES
    assert "dpo/py.typed" in package
    assert all(name.split("/")[0].endswith(".dist-info") for name in names - package)


def test_the_wheels_metadata_is_what_pyproject_says(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "direct-preference-optimization"
    assert metadata["Version"] == version()
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = metadata.get_all("Provides-Extra")
    assert {"adapters", "wandb", "mlflow", "trackio"} <= set(extras)
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    entry = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert "dpo = dpo.cli:main" in archive.read(entry).decode()


def test_the_source_distribution_holds_sources_and_recipes_and_no_tests(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in SOURCES} <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= names
    assert "recipes/dpo.yaml" in names
    assert {name.split("/")[0] for name in names if "/" in name} == {"src", "recipes", "studies"}
    assert sdist.stat().st_size < 2_000_000


def test_in_an_empty_environment_it_imports_and_says_its_version(installed, tmp_path):
    code = "import dpo, sys; print(dpo.__version__, dpo.__file__)"
    said, place = run(installed, "-c", code, cwd=tmp_path).split(" ", 1)
    assert said == version()
    assert Path(place).is_relative_to(installed.parents[1])


def test_its_command_runs_with_the_dependencies_that_are_here(installed, tmp_path):
    dependencies = sysconfig.get_path("purelib")
    said = run(installed.parent / "dpo", "--version", cwd=tmp_path, path=dependencies)
    assert said == version()


def test_it_builds_from_the_source_distribution_too(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=folder)
    (again,) = tmp_path.glob("*.whl")
    assert again.name == wheel.name
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())
