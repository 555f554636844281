"""What a study of losses measures of its models: all alike, on held-out questions, once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo.atomic import write_json
from dpo.config import DataConfig
from dpo.config_files import validate
from dpo.core.stats import holm, mean_interval, paired_permutation
from dpo.data.rows import PreferenceRow
from dpo.data.synthetic import World
from dpo.evaluate.jobs import check_held_out, generate_with, held_out_rows
from dpo.evaluate.records import Generation
from dpo.evaluate.sbert import load_sentence_model
from dpo.evaluate.true_reward import RewardRow, true_reward_table
from dpo.evaluate.winrate import WinRateRow, null_responses, score_generations, win_rate_table
from dpo.evaluation_config import EvaluateConfig
from dpo.experiment.embedded import (
    MAX_NEW_TOKENS,
    TEST_FRACTION,
    data_settings,
    kl_to_sft,
    open_model,
)
from dpo.experiment.ratings import label_accuracy
from dpo.loss_config import Kind
from dpo.models.load import weights_digest
from dpo.progress import counting
from dpo.report.loss_study import LossRow
from dpo.train.encoded import TIE_NATS, encode_pairs, sequences_of
from dpo.train.prepare import SplitData, load_preferences
from dpo.train.reference import reference_logps, score_all
from dpo.train.run import read_manifest

log = logging.getLogger("dpo")

SFT = "SFT"
"""What the table calls the model that all losses start from."""
BASELINE = "dpo"
"""The loss that all others are tested against."""
NUM_PERMUTATIONS = 100_000
"""So many that Holm's correction over the whole family can still find something."""
PRECISION, MAX_TOKENS = "fp32", 16_384


@dataclass(frozen=True, slots=True)
class SeedData:
    """What the losses of a seed start from."""

    seed: int
    sft: Path
    pairs: Path


@dataclass(frozen=True, slots=True)
class Contestant:
    """A trained model of the study."""

    label: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.label} seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Measured:
    """One model against its SFT model: nats, and on the held-out pairs of its seed."""

    kl: float
    kl_stderr: float
    accuracy: float
    """Share of the pairs whose chosen response gained more log-probability than the rejected."""
    chosen_change: float


@dataclass(frozen=True, slots=True)
class Results:
    """The lines of the table, and what they are to be read against."""

    rows: list[LossRow]
    label_accuracy: float
    num_questions: int


def collect(
    contestants: Sequence[Contestant],
    data: Mapping[int, SeedData],
    kinds: Mapping[str, Kind],
    failures: Mapping[tuple[str, int], str],
    *,
    folder: Path,
    world: World,
    samples_per_question: int,
    sentence_model: str,
) -> Results:
    """Sample, judge and measure every model; what was measured before is read.

    All models answer the same held-out questions. Their answers are compared with one fixed pair a
    question, of the first seed: a response of another seed is judged by the same pair.

    Args:
        failures: the sentence that a loss ended with, by its name and seed.
    """
    pairs = {seed: load_preferences(_data(own.pairs)) for seed, own in data.items()}
    first = next(iter(data))
    rows = held_out_rows(pairs[first], max_prompts=len(world.prompts), seed=0)
    records = _answers(
        contestants, pairs[first], data[first].pairs, rows, folder, samples_per_question
    )
    embed = load_sentence_model(sentence_model)
    scored = score_generations([*records, *null_responses(rows)], embed)
    wins = {row.model: row for row in win_rate_table(scored)}
    at_one = [replace(record, temperature=1.0) for record in scored]  # null responses have none
    rewards = {row.model: row for row in true_reward_table(at_one, world)}
    questions = [str(row.prompt) for row in rows]
    measured: dict[tuple[str, int], Measured] = {}
    with counting("Measuring", len(contestants)) as advance:
        for one in contestants:
            measured[one.label, one.seed] = measure(
                one,
                data[one.seed].sft,
                pairs[one.seed].test,
                questions,
                folder / "measured",
                samples_per_question=samples_per_question,
            )
            advance(1)
    of_seed = _means_by_question(records, world, list(data), samples_per_question)

    def row_of(label: str, kind: str) -> LossRow:
        own = [one for one in contestants if one.label == label]
        said = [f"seed {seed}: {text}" for (name, seed), text in failures.items() if name == label]
        return _row(label, kind, own, said, measured, of_seed, rewards, wins)

    order = sorted(kinds, key=lambda name: (KIND_ORDER[kinds[name]], name))
    losses = compared_with_dpo([row_of(name, kinds[name]) for name in order], of_seed)
    nulls = [_null_row(row, rewards[row.model]) for row in wins.values() if row.kind == "null"]
    held_out = [pair for own in pairs.values() for pair in own.test]
    return Results(
        [row_of(SFT, "start"), *nulls, *losses],
        label_accuracy=label_accuracy(world, held_out),
        num_questions=len(rows),
    )


KIND_ORDER: dict[Kind, int] = {"pair": 0, "list": 1, "unpaired": 2}


def _data(pairs: Path) -> DataConfig:
    return validate(DataConfig, data_settings(str(pairs)))


def _answers(
    contestants: Sequence[Contestant],
    data: SplitData[PreferenceRow],
    pairs: Path,
    rows: Sequence[PreferenceRow],
    folder: Path,
    samples_per_question: int,
) -> list[Generation]:
    """Every model's answers at temperature 1; the seeds of a loss count as its samples, so that a
    question's answers stay together in the intervals, whose unit is the question.
    """
    config = validate(
        EvaluateConfig,
        {
            "models": {one.name: str(one.folder) for one in contestants},
            "data": {"path": str(pairs), "test_fraction": TEST_FRACTION},
            "out": str(folder),
            "temperatures": [1.0],
            "samples_per_prompt": samples_per_question,
            "max_new_tokens": MAX_NEW_TOKENS,
            "batch_size": 256,
        },
    )
    seeds = list(dict.fromkeys(one.seed for one in contestants))
    records: list[Generation] = []
    with counting("Generating", len(rows) * samples_per_question * len(contestants)) as advance:
        for one in contestants:
            path = str(one.folder)
            check_held_out(one.name, path, rows, allow=False)
            made = generate_with(one.name, path, data, rows, config, advance)
            shift = seeds.index(one.seed) * samples_per_question
            records += [replace(r, model=one.label, sample=shift + r.sample) for r in made]
    return records


def measure(
    one: Contestant,
    sft: Path,
    held_out: Sequence[PreferenceRow],
    questions: Sequence[str],
    folder: Path,
    *,
    samples_per_question: int,
) -> Measured:
    """KL to SFT on the questions, accuracy and change of log-probability on the pairs; written to
    a file named by a digest of all that decides it, and read where that is there.
    """
    encoder, model = open_model(one.folder)
    _, reference = open_model(sft)
    rows = [(row.prompt, row.chosen, row.rejected) for row in held_out]
    decides = [weights_digest(model), weights_digest(reference), rows, list(questions)]
    text = json.dumps([*decides, one.seed, samples_per_question])
    key = hashlib.sha256(text.encode()).hexdigest()
    file = folder / f"{one.name}-{key[:16]}.json"
    if file.is_file():
        return Measured(**json.loads(file.read_text(encoding="utf-8")))
    kl = kl_to_sft(
        one.folder, sft, questions, seed=one.seed, samples_per_prompt=samples_per_question
    )
    encoded = encode_pairs(encoder, held_out, max_dropped=1.0, what="held-out pairs")
    sequences = sequences_of(encoded)
    how: dict[str, Any] = {"precision": PRECISION, "max_tokens": MAX_TOKENS}
    before, _ = reference_logps(reference, sequences, **how)
    chosen, rejected = (score_all(model, sequences, **how) - before).chunk(2)
    found = Measured(
        kl=kl.mean,
        kl_stderr=kl.stderr,
        accuracy=(chosen - rejected > TIE_NATS).double().mean().item(),
        chosen_change=chosen.mean().item(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(found))
    return found


RewardsOfSeed = dict[tuple[str, int], dict[int, float]]
"""Label and seed: the mean true reward of the answers to each question, by its number."""


def _means_by_question(
    records: Sequence[Generation], world: World, seeds: Sequence[int], samples_per_question: int
) -> RewardsOfSeed:
    found: dict[tuple[str, int], dict[int, list[float]]] = {}
    for record in records:
        seed = seeds[record.sample // samples_per_question]
        questions = found.setdefault((record.model, seed), {})
        reward = world.reward(record.prompt, record.generated)
        questions.setdefault(record.prompt_index, []).append(reward)
    return {
        key: {question: sum(values) / len(values) for question, values in questions.items()}
        for key, questions in found.items()
    }


def _row(
    label: str,
    kind: str,
    own: Sequence[Contestant],
    failures: Sequence[str],
    measured: Mapping[tuple[str, int], Measured],
    of_seed: RewardsOfSeed,
    rewards: Mapping[str, RewardRow],
    wins: Mapping[str, WinRateRow],
) -> LossRow:
    """One model, seeds together; nothing but its name and sentences where all seeds failed."""
    row = LossRow(label, kind, seeds=len(own), failed=len(failures), said=" ".join(failures))
    if not own:
        return row
    found = [measured[label, one.seed] for one in own]
    by_seed = [float(np.mean([*of_seed[label, one.seed].values()])) for one in own]

    def mean(pick: Callable[[Measured], float]) -> float:
        return sum(map(pick, found)) / len(found)

    kl_stderr = float(np.sqrt(sum(m.kl_stderr**2 for m in found))) / len(found)
    return replace(
        row,
        **_rewards_and_wins(rewards[label], wins[label]),
        reward_lowest_seed=min(by_seed),
        reward_highest_seed=max(by_seed),
        **_over_seeds("reward", by_seed),
        kl=mean(lambda m: m.kl),
        kl_stderr=kl_stderr,
        **_over_seeds("kl", [m.kl for m in found]),
        # Before training nothing has gained on anything: every pair of the SFT model is a tie.
        accuracy=None if kind == "start" else mean(lambda m: m.accuracy),
        chosen_change=mean(lambda m: m.chosen_change),
        seconds=sum(float(read_manifest(o.folder)["seconds_training"]) for o in own) / len(own),
    )


def _over_seeds(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Student's 95% interval over seeds, where there are several: another SFT model and other
    ratings are in it.
    """
    if len(values) < 2:
        return {}
    low, high = mean_interval(values)
    return {f"{name}_seeds_low": low, f"{name}_seeds_high": high}


def _rewards_and_wins(reward: RewardRow, wins: WinRateRow) -> dict[str, Any]:
    return {
        "reward": reward.reward,
        "reward_low": reward.low,
        "reward_high": reward.high,
        "right": reward.right,
        "polite": reward.polite,
        "win_rate": wins.win_rate,
        "win_rate_low": wins.low,
        "win_rate_high": wins.high,
    }


def _null_row(wins: WinRateRow, reward: RewardRow) -> LossRow:
    """A response that knows nothing."""
    row = LossRow(wins.model, "null", seeds=0, failed=0)
    return replace(row, **_rewards_and_wins(reward, wins))


def compared_with_dpo(rows: Sequence[LossRow], of_seed: RewardsOfSeed) -> list[LossRow]:
    """The rows with their paired tests against DPO, Holm's correction over all of them.

    A question's difference is the mean over the seeds that both finished; the interval is
    Student's and the test flips signs, both over questions.
    """
    found: dict[str, LossRow] = {}
    p_values: dict[str, float] = {}
    for row in rows:
        shared = [
            seed for label, seed in of_seed if label == row.model and (BASELINE, seed) in of_seed
        ]
        if row.model == BASELINE or not shared:
            continue
        by_seed = np.array([_differences(of_seed, row.model, seed) for seed in shared])
        by_question = by_seed.mean(axis=0)
        low, high = mean_interval(by_question)
        p_values[row.model] = paired_permutation(by_question, num_permutations=NUM_PERMUTATIONS)
        found[row.model] = replace(
            row,
            difference=float(by_question.mean()),
            difference_low=low,
            difference_high=high,
            seeds_above_dpo=int((by_seed.mean(axis=1) > 0).sum()),
            p=p_values[row.model],
        )
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    found = {name: replace(row, p_holm=adjusted[name]) for name, row in found.items()}
    return [found.get(row.model, row) for row in rows]


def _differences(of_seed: RewardsOfSeed, label: str, seed: int) -> list[float]:
    """True reward less that of DPO from the same SFT model, question by question."""
    baseline = of_seed[BASELINE, seed]
    return [of_seed[label, seed][question] - baseline[question] for question in baseline]
