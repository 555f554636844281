"""The files of an evaluation."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dpo.atomic import storage_errors, write_text
from dpo.evaluate.paired import DIFFERENCE, FAMILIES, LEVEL, POWER, PairedTest, power_of
from dpo.evaluate.records import ScoredGeneration
from dpo.evaluate.winrate import WinRateRow


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
