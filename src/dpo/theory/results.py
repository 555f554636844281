"""Theory results as a JSON file, which the report reads, and as a table for the terminal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from rich.text import Text

from dpo.atomic import write_text
from dpo.theory.registry import CheckResult

_PACKAGE = Path(__file__).resolve().parent.parent


def source_hash() -> str:
    """SHA-256 of the code that the results depend on: the checks, `core/exact`, `core/rewards`."""
    files = sorted((_PACKAGE / "theory").glob("*.py"))
    files += [_PACKAGE / "core" / "exact.py", _PACKAGE / "core" / "rewards.py"]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(_PACKAGE).as_posix().encode() + b"\0")
        digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()


def write_results(results: Sequence[CheckResult], path: str | Path) -> None:
    """Write the results and the hash of the code that produced them, whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "source_sha256": source_hash(),
        "seconds": sum(result.seconds for result in results),
        "checks": {result.id: asdict(result) for result in results},
    }
    write_text(target, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def render(results: Sequence[CheckResult]) -> Table:
    """A table with a row per statement; print it with `rich.console.Console().print`."""
    table = Table(title="Executable theory", show_lines=False, padding=(0, 1))
    table.add_column("check and statement")
    for column in ("tolerance", "measured", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        unit = "z " if result.sampling else ""
        # Text, not markup: the statements contain square brackets.
        table.add_row(
            Text(result.id, style="bold").append("\n" + result.statement, style="not bold"),
            f"{unit}{result.tolerance:.2g}",
            f"{unit}{result.error:.2g}",
            Text("ok", style="green") if result.passed else Text("FAILED", style="bold red"),
        )
    failed = sum(not result.passed for result in results)
    seconds = sum(result.seconds for result in results)
    table.caption = f"{len(results)} statements, {failed} failed, {seconds:.1f} s"
    return table
