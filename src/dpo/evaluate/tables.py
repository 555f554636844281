"""The files of an evaluation, and its win rates on the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.atomic import storage_errors, write_text
from dpo.data.files import printable
from dpo.evaluate.paired import DIFFERENCE, FAMILIES, LEVEL, POWER, PairedTest, power_of
from dpo.evaluate.records import ScoredGeneration
from dpo.evaluate.winrate import WinRateRow

if TYPE_CHECKING:
    from rich.table import Table


def write_results(
    folder: Path,
    *,
    scored: Sequence[ScoredGeneration],
    table: Sequence[WinRateRow],
    tests: Sequence[PairedTest],
    meta: Mapping[str, object],
) -> None:
    """Write win_rates.csv and .json, paired_tests.csv and scored.jsonl, each whole or not at all.

    `meta` says how the numbers came to be (sentence model, seeds, data); it is the "meta" of the
    JSON file, with the counts of prompts and responses, the families of tests that Holm's
    correction is over, and their power added.

    Raises:
        StorageError: when a file cannot be written.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    prompts = {record.prompt_index for record in scored}
    counts = {"num_prompts": len(prompts), "num_responses": len(scored)}
    content = {
        "meta": {**meta, **counts, "holm_families": _families(tests), "power": _power(tests)},
        "win_rates": [asdict(row) for row in table],
        "paired_tests": [asdict(test) for test in tests],
    }
    lines = (json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in scored)
    texts = {
        "scored.jsonl": "".join(lines),
        "win_rates.csv": csv_text(WinRateRow, table),
        "paired_tests.csv": csv_text(PairedTest, tests),
        "win_rates.json": json.dumps(content, indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        write_text(folder / name, text, errors="backslashreplace")


def csv_text(kind: type[Any], rows: Iterable[Any]) -> str:
    """Rows of a dataclass as CSV, a column for each field; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def render_win_rates(table: Sequence[WinRateRow]) -> Table:
    """The table for a terminal: `rich.console.Console().print(render_win_rates(table))`."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title="Sentence-BERT win rates (wins among decided responses)")
    shown.add_column("model", overflow="fold")
    confidence = f"{table[0].confidence:.0%} " if table else ""
    for name in ("temperature", "n", "win rate", f"{confidence}interval", "ties"):
        shown.add_column(name, justify="right", overflow="fold")
    for name in ("mean margin", "truncated", "mean tokens"):
        shown.add_column(name, justify="right", overflow="fold")
    for row, previous in zip(table, [None, *table], strict=False):
        if previous and row.kind != previous.kind:
            shown.add_section()
        # Text, not str: a name with brackets is a name, never markup.
        shown.add_row(Text(printable(row.model)), *_cells(row))
    return shown


def _cells(row: WinRateRow) -> list[str]:
    return [
        "" if row.temperature is None else f"{row.temperature:g}",
        str(row.n),
        "-" if row.win_rate is None else f"{row.win_rate:.1%}",
        f"[{100 * row.low:.1f}, {100 * row.high:.1f}]",
        str(row.ties),
        f"{row.mean_margin:+.4f}",
        f"{row.truncated_share:.1%}" if row.kind == "model" else "",
        "" if row.mean_tokens is None else f"{row.mean_tokens:.1f}",
    ]


def _families(tests: Sequence[PairedTest]) -> dict[str, object]:
    """What Holm's correction is over: each family with its temperatures and number of tests."""
    found: dict[str, object] = {}
    for family, what in FAMILIES.items():
        members = [test for test in tests if test.family == family]
        if members:
            temperatures = list(dict.fromkeys(test.temperature for test in members))
            found[family] = {
                "compares": what,
                "num_tests": len(members),
                "temperatures": temperatures,
            }
    return found


def _power(tests: Sequence[PairedTest]) -> dict[str, object]:
    asked = {"difference": DIFFERENCE, "power": POWER, "level": LEVEL}
    return {**asked, "families": [asdict(power) for power in power_of(tests)]}
