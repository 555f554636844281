"""What a preference run shows beside its main numbers, from the files in its folder.

`diagnose` takes a run's folder or an evaluation's; `write_diagnosis` leaves `diagnostics.json`.
docs/diagnostics.md explains every reading.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from dpo import atomic
from dpo.errors import InputError
from dpo.evaluate.generation_diagnostics import diagnose_evaluation, health_of
from dpo.evaluate.held_out_pairs import HeldOut
from dpo.evaluate.pair_diagnostics import (
    read_accuracy,
    read_calibration,
    read_displacement,
    read_length,
    read_subsets,
)
from dpo.evaluate.readings import Diagnosis, Found, read_json_lines
from dpo.evaluate.sample_diagnostics import read_own_samples
from dpo.train.run import read_identity, read_metrics

DIAGNOSTICS = "diagnostics.json"

WITHOUT_PREFERENCES = ("sft", "reward")
"""The commands whose runs have nothing to diagnose: no policy that preferences moved."""


def diagnose(folder: Path) -> Diagnosis:
    """The diagnosis of a run or of an evaluation.

    Raises:
        InputError: the folder is neither, or a file in it is damaged.
    """
    if (folder / "scored.jsonl").is_file():
        return diagnose_evaluation(folder)
    return diagnose_run(folder)


def write_diagnosis(diagnosis: Diagnosis, folder: Path) -> None:
    """Write `diagnostics.json`; one that is the same already is left alone.

    Raises:
        StorageError: the file cannot be written.
    """
    file = folder / DIAGNOSTICS
    text = json.dumps(atomic.jsonable(asdict(diagnosis)), indent=2, ensure_ascii=False) + "\n"
    if not file.is_file() or file.read_bytes() != text.encode():
        atomic.write_text(file, text)


def diagnose_run(folder: Path) -> Diagnosis:
    """The diagnosis of a run: what of it its files allow.

    Raises:
        InputError: the folder holds no run, or a file is damaged.
    """
    measured = [row for row in read_metrics(folder) if "eval/loss" in row]
    pairs = HeldOut.of_run(folder)
    without = read_identity(folder).get("command") in WITHOUT_PREFERENCES
    if without or not (measured or pairs.num):
        raise InputError(
            f"{folder}: there is nothing to diagnose; expected the folder of a run of dpo train, "
            "dpo online or dpo ppo, or of dpo evaluate (with scored.jsonl)."
        )
    found: dict[str, Found] = {}
    if pairs.num:
        found["displacement"] = read_displacement(pairs, measured)
        found["accuracy"] = read_accuracy(pairs)
        found["length"] = read_length(pairs)
        found["subsets"] = read_subsets(pairs)
        found["calibration"] = read_calibration(pairs)
    if measured:
        found["on_policy"] = read_own_samples(measured[0], measured[-1])
        found["samples"] = health_of(read_json_lines(folder / "samples" / "final.jsonl")), []
    numbers = {topic: numbers for topic, (numbers, _) in found.items() if numbers}
    return Diagnosis("run", numbers, [r for _, readings in found.values() for r in readings])
