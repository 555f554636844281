"""Folders to hold an arena on: an evaluation and runs, written by hand."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from dpo.evaluate.records import ScoredGeneration

NAMES = ("first-model", "second-model")
"""Two models whose names occur in no text."""


def scored(
    model: str,
    prompt_index: int,
    generated: str,
    *,
    temperature: float | None = 1.0,
    sample: int = 0,
    margin: float = 0.0,
    prompt: str | None = None,
) -> ScoredGeneration:
    return ScoredGeneration(
        model=model,
        temperature=temperature,
        prompt_index=prompt_index,
        sample=sample,
        prompt=f"Question {prompt_index}?" if prompt is None else prompt,
        chosen=f"Good {prompt_index}.",
        rejected=f"Bad {prompt_index}.",
        generated=generated,
        num_tokens=None if temperature is None else 3,
        truncated=False,
        kind="null" if temperature is None else "model",
        cos_chosen=0.5 + margin,
        cos_rejected=0.5,
        margin=margin,
        verdict="win" if margin > 0 else "loss" if margin < 0 else "tie",
    )


def write_evaluation(folder: Path, records: list[ScoredGeneration]) -> Path:
    lines = (json.dumps(asdict(record)) + "\n" for record in records)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scored.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def evaluation_folder(folder: Path, *, num_prompts: int = 4) -> Path:
    """Two models answer every prompt once, the first with the higher Sentence-BERT margin."""
    return write_evaluation(
        folder,
        [
            scored(name, i, f"Answer {letter}{i}.", margin=margin)
            for name, letter, margin in zip(NAMES, "xy", (0.25, -0.25), strict=True)
            for i in range(num_prompts)
        ],
    )


def run_folder(folder: Path, samples: list[dict[str, object]], *, temperature: float = 0.7) -> Path:
    """What a run leaves of its samples."""
    (folder / "samples").mkdir(parents=True)
    lines = (json.dumps({"truncated": False, **sample}) + "\n" for sample in samples)
    (folder / "samples" / "final.jsonl").write_text("".join(lines), encoding="utf-8")
    config = {"evaluation": {"sample_temperature": temperature}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
