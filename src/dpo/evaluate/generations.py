"""Responses of a model to held-out prompts, written down by content so that none is sampled
twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dpo.atomic import write_text
from dpo.data.prompts import as_text
from dpo.data.rows import PreferenceRow
from dpo.data.tokenize import Encoder
from dpo.evaluate.records import Generation
from dpo.models.generate import generate
from dpo.models.load import max_positions, tokenizer_digest, weights_digest
from dpo.models.vllm_backend import VllmModel
from dpo.train.prepare import encode_prompts

CHUNK_BATCHES = 4
"""Batches of responses between two writes."""
NO_PART_OF_A_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Entries of a configuration that say where a model is from, or that its weights say themselves."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are sampled."""

    temperatures: tuple[float, ...]
    samples_per_prompt: int
    max_new_tokens: int
    batch_size: int
    precision: str
    seed: int


def sample_responses(
    name: str,
    model: nn.Module | VllmModel,
    encoder: Encoder,
    rows: Sequence[PreferenceRow],
    sampling: Sampling,
    folder: Path,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Generation]:
    """Responses to each row's prompt at each temperature, in the order temperature, row, sample.

    Each temperature's responses go to a file in `folder` named by a digest of all that decides them
    (weights, configuration, tokenizer, prompts, settings); what is in it already is not sampled
    again. It grows by `CHUNK_BATCHES` batches at a time, which is what a kill costs at most.

    Args:
        progress: called with the number of responses that become available.
    """
    prompts = encode_prompts(
        encoder,
        [row.prompt for row in rows],
        max_new_tokens=sampling.max_new_tokens,
        positions=max_positions(model),
    )
    places = [(i, s) for i in range(len(rows)) for s in range(sampling.samples_per_prompt)]
    chunk = CHUNK_BATCHES * sampling.batch_size
    identity = _identity(model, encoder)
    found: list[Generation] = []
    for temperature in sampling.temperatures:
        key = _key(identity, prompts, encoder.stop_ids, sampling, temperature)
        file = folder / f"{name}-t{temperature:g}-{key[:16]}.jsonl"
        answers = _read(file, len(places))
        if len(answers) < len(places):  # from a whole chunk on, so that batches are as ever
            del answers[len(answers) - len(answers) % chunk :]
        progress(len(answers))
        while len(answers) < len(places):
            missing = places[len(answers) : len(answers) + chunk]
            answers += _sample(model, encoder, prompts, missing, sampling, temperature, progress)
            folder.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
            write_text(file, "".join(lines))
        found += [
            _generation(name, temperature, index, sample, rows[index], answer)
            for (index, sample), answer in zip(places, answers, strict=True)
        ]
    return found


def _identity(model: nn.Module | VllmModel, encoder: Encoder) -> list[str]:
    """What of a model decides its responses: weights, configuration, tokenizer."""
    config: Any = model.config
    settings = {k: v for k, v in config.to_dict().items() if k not in NO_PART_OF_A_MODEL}
    digest = tokenizer_digest(encoder.tokenizer)
    weights = model.identity() if isinstance(model, VllmModel) else weights_digest(model)
    return [weights, json.dumps(settings, sort_keys=True, default=str), digest]


def _sample(
    model: nn.Module | VllmModel,
    encoder: Encoder,
    prompts: Sequence[list[int]],
    places: Sequence[tuple[int, int]],
    sampling: Sampling,
    temperature: float,
    progress: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Responses at those places: (row, sample)."""
    asked = [prompts[index] for index, _ in places]
    options: dict[str, Any] = {
        "keys": [f"{temperature:g}/{index}/{sample}" for index, sample in places],
        "temperature": temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_ids": encoder.stop_ids,
        "seed": sampling.seed,
        "progress": progress,
    }
    if isinstance(model, VllmModel):
        longest = max(map(len, prompts)) + sampling.max_new_tokens
        responses = model.generate(asked, longest=longest, **options)
    else:
        options |= {"batch_size": sampling.batch_size, "precision": sampling.precision}
        responses = generate(model, asked, **options)
    return [
        {
            "generated": encoder.decode(response.ids),
            "num_tokens": len(response.ids) + (not response.truncated),
            "truncated": response.truncated,
        }
        for response in responses
    ]


def _key(
    identity: list[str],
    prompts: Sequence[list[int]],
    stop_ids: Sequence[int],
    sampling: Sampling,
    temperature: float,
) -> str:
    settings = asdict(sampling) | {"temperatures": temperature, "batch_size": None}
    text = json.dumps([*identity, prompts, list(stop_ids), settings])
    return hashlib.sha256(text.encode()).hexdigest()


def _generation(
    name: str,
    temperature: float,
    index: int,
    sample: int,
    row: PreferenceRow,
    answer: dict[str, Any],
) -> Generation:
    return Generation(
        model=name,
        temperature=temperature,
        prompt_index=index,
        sample=sample,
        prompt=as_text(row.prompt),
        chosen=row.chosen,
        rejected=row.rejected,
        generated=str(answer["generated"]),
        num_tokens=int(answer["num_tokens"]),
        truncated=bool(answer["truncated"]),
    )


def _read(file: Path, num_responses: int) -> list[dict[str, Any]]:
    """Responses written before; none where there is no such file, or it is damaged."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
        answers = [json.loads(line) for line in lines if line]
    except (OSError, ValueError):
        return []
    whole = len(answers) <= num_responses and all(
        isinstance(answer, dict) and answer.keys() == {"generated", "num_tokens", "truncated"}
        for answer in answers
    )
    return answers if whole else []
