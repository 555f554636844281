"""`dpo evaluate`: from a configuration to win rates, their nulls and their tests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from dpo.atomic import clean_up, lock_folder, storage_errors
from dpo.config import ModelConfig
from dpo.data.prompts import PromptTemplate, load_template
from dpo.data.rows import PreferenceRow
from dpo.data.split import contains, prompt_digest
from dpo.data.synthetic import World
from dpo.errors import InputError
from dpo.evaluate.embeddings import EmbeddingCache
from dpo.evaluate.generations import Sampling, sample_responses
from dpo.evaluate.head_to_head import Duels, hold_duels
from dpo.evaluate.judges import Judge, open_judges
from dpo.evaluate.matchups import make_matchups
from dpo.evaluate.paired import PairedTest, paired_tests
from dpo.evaluate.records import Generation, ScoredGeneration
from dpo.evaluate.sbert import SentenceScorer, load_sentence_model
from dpo.evaluate.tables import write_results
from dpo.evaluate.true_reward import RewardRow, true_reward_table, write_true_rewards
from dpo.evaluate.winrate import WinRateRow, null_responses, score_generations, win_rate_table
from dpo.evaluation_config import EvaluateConfig
from dpo.models.load import check_vocabulary, find_model, load_tokenizer, max_positions
from dpo.models.vllm_backend import VllmModel, check_servable, check_temperature, need_vllm
from dpo.progress import counting
from dpo.train.prepare import (
    SplitData,
    choose_template,
    load_preferences,
    make_encoder,
    seeded_choice,
)
from dpo.train.run import read_manifest, train_prompts
from dpo.train.session import open_policy

log = logging.getLogger("dpo")

GENERATIONS, EMBEDDINGS = "generations", "embeddings"
"""Folders within an evaluation's, which a later evaluation there goes on from."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation found; `rewards` is empty where no true reward is known, `duels` None
    where no head-to-head comparison was asked for.
    """

    folder: Path
    table: list[WinRateRow]
    tests: list[PairedTest]
    rewards: list[RewardRow]
    scored: list[ScoredGeneration]
    duels: Duels | None = None


def evaluate(
    config: EvaluateConfig, *, world: World | None = None, trust_remote_code: bool = False
) -> Evaluation:
    """Generate with every model on the held-out prompts and judge the responses.

    Killed at any moment, the same call goes on with what was generated and embedded, and ends with
    the same files.

    Args:
        config: models, data, temperatures, the judge.
        world: gives the true reward where the prompts are its own; for `data=synthetic` it is
            known.
        trust_remote_code: run code that comes with a model.

    Raises:
        InputError: as `open_evaluation`, or a model cannot be loaded.
    """
    with open_evaluation(config, trust_remote_code=trust_remote_code) as opened:
        data, rows = opened.data, opened.rows
        num_per_model = len(rows) * config.samples_per_prompt * len(config.temperatures)
        records: list[Generation] = []
        with counting("Generating", num_per_model * len(config.models)) as advance:
            for name, path in config.models.items():
                records += generate_with(
                    name, path, data, rows, config, advance, trust_remote_code=trust_remote_code
                )
        return judge(records, opened, config, world=world)


class Opened(NamedTuple):
    """What an evaluation starts from."""

    data: SplitData[PreferenceRow]
    rows: list[PreferenceRow]
    """The held-out rows, one for each prompt."""
    embed: SentenceScorer
    judges: list[Judge]
    """Who compares the responses head to head."""


@contextmanager
def open_evaluation(config: EvaluateConfig, *, trust_remote_code: bool = False) -> Iterator[Opened]:
    """Check the models and read data and judges; the folder is this process's own meanwhile.

    Raises:
        InputError: a model, a judge or the data cannot be had, a model was trained on a held-out
            prompt, or the folder is a run's or another process is working in it.
        StorageError: the folder cannot be written.
    """
    check_backend(config)
    for name, path in config.models.items():  # before anything is loaded
        source = find_model(path, trust_remote_code=trust_remote_code, key=f"models.{name}")
        if config.backend == "vllm":
            check_servable(source)
    data = load_preferences(config.data)
    rows = held_out_rows(data, config.max_prompts, config.seed)
    for name, path in config.models.items():
        check_held_out(name, path, rows, allow=config.allow_overlap)
    folder = Path(config.out)
    if read_manifest(folder):
        raise InputError(f"out: {folder} is a run, whose page would be lost; name another folder.")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    with lock:
        if (folder / GENERATIONS).is_dir():  # an evaluation was here: what is torn is its own
            clean_up(folder)
        embed = load_sentence_model(config.sentence_model.path)
        log.info("%d held-out prompts; judged by %s.", len(rows), embed.name)
        judges = open_judges(config, embed, trust_remote_code=trust_remote_code)
        yield Opened(data, rows, embed, judges)


def check_backend(config: EvaluateConfig) -> None:
    """Refuse what cannot be sampled with, before anything is.

    Raises:
        InputError: vLLM is asked for and cannot be had, or does not take a temperature.
    """
    if config.backend == "vllm":
        need_vllm()
        for temperature in config.temperatures:
            check_temperature(temperature)


def origin(config: EvaluateConfig, data: SplitData[PreferenceRow]) -> dict[str, object]:
    """How an evaluation's numbers came to be, for its files: settings and the data's digest."""
    return {**config.model_dump(mode="json", exclude={"out"}), "data_sha256": data.sha256}


def held_out_rows(
    data: SplitData[PreferenceRow], max_prompts: int, seed: int
) -> list[PreferenceRow]:
    """One held-out row for each prompt (its first), at most `max_prompts`, by a seeded choice."""
    first: dict[int, int] = {}
    for number, row in enumerate(data.test):
        if row.chosen != row.rejected:
            first.setdefault(prompt_digest(row.prompt), number)
    rows = list(first.values())
    if len(rows) < 2:
        raise InputError(
            f"data: {len(rows)} held-out prompts have a pair of two different responses; expected "
            "at least 2, since the null responses answer with another prompt's."
        )
    return [data.test[rows[i]] for i in seeded_choice(len(rows), max_prompts, seed=seed)]


def check_held_out(name: str, path: str, rows: Sequence[PreferenceRow], *, allow: bool) -> None:
    """Refuse to evaluate on prompts that the model was trained on.

    Raises:
        InputError: some of the prompts are in the run's training prompts, and `allow` is False.
    """
    trained = train_prompts(Path(path).expanduser())
    if trained is None:
        log.info("models.%s: %s does not say which prompts it was trained on.", name, path)
        return
    shared = sum(contains(trained, prompt_digest(row.prompt)) for row in rows)
    if shared and not allow:
        raise InputError(
            f"models.{name}: {path} was trained on {shared} of the {len(rows)} held-out prompts; "
            "use the split it was trained with (data.test_fraction, data.split_seed), or set "
            "allow_overlap=true."
        )
    if shared:
        log.warning("models.%s was trained on %d of the %d prompts.", name, shared, len(rows))


def generate_with(
    name: str,
    path: str,
    data: SplitData[PreferenceRow],
    rows: Sequence[PreferenceRow],
    config: EvaluateConfig,
    progress: Callable[[int], None],
    *,
    trust_remote_code: bool = False,
) -> list[Generation]:
    """One model's responses, prompted with the template that it was trained with."""
    with open_responder(path, config, trust_remote_code=trust_remote_code) as responder:
        template = choose_template(
            config.data.template,
            responder.template,
            shape=data.shape,
            conversational=data.conversational,
        )
        encoder = make_encoder(
            responder.tokenizer,
            template,
            max_length=config.data.max_length,
            positions=max_positions(responder.model),
        )
        sampling = Sampling(
            temperatures=tuple(config.temperatures),
            samples_per_prompt=config.samples_per_prompt,
            max_new_tokens=config.max_new_tokens,
            batch_size=config.batch_size,
            precision=config.precision,
            seed=config.seed,
        )
        folder = Path(config.out) / GENERATIONS
        return sample_responses(
            name, responder.model, encoder, rows, sampling, folder, progress=progress
        )


class Responder(NamedTuple):
    """What answers prompts, and how they are written for it."""

    model: nn.Module | VllmModel
    tokenizer: Any
    template: PromptTemplate | None


@contextmanager
def open_responder(
    path: str, config: EvaluateConfig, *, trust_remote_code: bool
) -> Iterator[Responder]:
    """A model in transformers or in vLLM, whichever the backend is.

    Raises:
        InputError: there is no such model, its tokenizer does not fit it, or it cannot be served.
    """
    if config.backend == "transformers":
        policy = open_policy(ModelConfig(path=path), [], config.seed, trust_remote_code)
        yield Responder(policy.model, policy.tokenizer, policy.template)
        return
    source = find_model(path, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source)
    served = VllmModel(source, batch_size=config.batch_size, precision=config.precision)
    with closing(served):
        check_vocabulary(served.config.get_text_config().vocab_size, tokenizer, name=path)
        template = load_template(Path(source.path)) if source.local else None
        yield Responder(served, tokenizer, template)


def judge(
    records: Sequence[Generation],
    opened: Opened,
    config: EvaluateConfig,
    *,
    world: World | None = None,
) -> Evaluation:
    """Score the responses and the null responses, let the judges compare what is to be compared,
    and write the tables.

    Args:
        records: responses to the rows' prompts.
        world: gives the true reward; for `data=synthetic` it is known.
    """
    data, rows, embed, judges = opened
    folder = Path(config.out)
    cached = EmbeddingCache(embed, folder / EMBEDDINGS)
    scored = score_generations([*records, *null_responses(rows)], cached)
    table, tests = win_rate_table(scored), paired_tests(scored)
    meta = {**origin(config, data), "sentence_model": embed.name}
    write_results(folder, scored=scored, table=table, tests=tests, meta=meta)
    if data.shape == "synthetic":
        world = World(config.data.synthetic.num_facts)
    rewards = [] if world is None else true_reward_table(records, world)
    if rewards:
        write_true_rewards(folder / "true_rewards.csv", rewards)
    duels = None
    if config.compared:
        duels = hold_duels(judges, make_matchups(rows, scored, config.compared), folder)
    return Evaluation(folder, table, tests, rewards, scored, duels)
