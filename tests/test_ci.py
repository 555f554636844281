"""What .ci/run does about the browser: it tries, and whatever comes of it, the checks are run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "run"
CHECKS = [
    *("make lint", "make types", "make test", "make docs", "make package", "make notebook"),
    "make demo DEMO=--short OUT=there/demo",
]


@pytest.fixture
def machine(tmp_path):
    """A machine with nothing but these commands, each of which writes down how it was called."""
    log = tmp_path / "log.txt"
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("bash", "dirname"):
        (commands / name).symlink_to(shutil.which(name))

    def command(name, does=":", notes=True):
        note = f'echo "{name} $*" >> {log}\n' if notes else ""
        (commands / name).write_text(f"#!{commands}/bash\n{note}{does}\n")
        (commands / name).chmod(0o755)

    command("make")
    command("mktemp", "echo there", notes=False)
    command("id", "echo 0", notes=False)
    command("timeout", 'shift 3; "$@"', notes=False)

    def run():
        done = subprocess.run(
            [commands / "bash", SCRIPT],
            env={"PATH": str(commands)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stderr == ""
        return done.stdout.splitlines(), log.read_text().splitlines()

    return command, commands, run


INSTALLS = ["apt-get update", "apt-get install -y --no-install-recommends chromium"]


def test_a_browser_is_installed_where_there_is_none(machine):
    command, commands, run = machine
    ready = f"#!{commands}/bash"
    browser = commands / "chromium"
    makes_it = f'[ "$1" = install ] && echo "{ready}" > {browser} && {commands}/chmod +x {browser}'
    (commands / "chmod").symlink_to(shutil.which("chmod"))
    command("apt-get", f"echo noise; {makes_it}")
    assert run() == ([], [*INSTALLS, *CHECKS])


def test_where_it_cannot_be_installed_one_line_says_so_and_the_checks_are_run(machine):
    command, _, run = machine
    command("apt-get", "echo noise; echo noise >&2; exit 100")
    said, called = run()
    assert called == [*INSTALLS, *CHECKS]
    assert len(said) == 1
    assert "browser tests will be skipped" in said[0]


@pytest.mark.parametrize("why", ["not root", "no apt"])
def test_without_root_or_apt_nothing_is_tried(machine, why):
    command, _, run = machine
    if why == "not root":
        command("id", "echo 1000", notes=False)
        command("apt-get")
    said, called = run()
    assert called == CHECKS
    assert len(said) == 1


def test_a_browser_that_is_there_is_left_alone_and_one_in_name_only_is_none(machine):
    command, _, run = machine
    command("apt-get", "exit 100")
    command("chromium-browser", "exit 1", notes=False)
    assert run()[1] == [*INSTALLS, *CHECKS]
    command("google-chrome", notes=False)
    said, called = run()
    assert said == []
    assert called[len(INSTALLS) + len(CHECKS) :] == CHECKS
