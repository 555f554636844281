"""`dpo experiment sentiment`: the IMDb experiment of the DPO paper, on human reviews.

Rafailov et al. 2023 (arXiv:2305.18290), Section 6.1 and Appendix C.1: the reward is what a
sentiment classifier says, so it is known; preferences are samples of the SFT model that go on from
the first words of reviews, ordered by it; every method is placed on the plane of reward and KL.

Finished runs are not repeated; a run that was stopped goes on.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo.atomic import replace_file, replace_folder, write_json
from dpo.config import ModelConfig, RewardSourceConfig
from dpo.config_files import validate
from dpo.data.order import epoch_order
from dpo.data.reviews import (
    Review,
    ReviewParts,
    as_demonstrations,
    beginning_and_rest,
    labelled_passages,
    load_reviews,
    split_reviews,
)
from dpo.data.rows import DemonstrationRow, PreferenceRow, Prompt
from dpo.data.sources import load_rows, write_jsonl
from dpo.data.split import near_key
from dpo.data.tokenize import Encoder
from dpo.errors import InputError
from dpo.evaluate.frontier import (
    best_of_n,
    curve_stderr,
    optimum_curve,
    within_prompt_correlation,
    world_of_samples,
)
from dpo.experiment.engines import in_processes
from dpo.experiment.frontier import OTHER_DRAWS, finish
from dpo.experiment.frontier_config import SAMPLES, FrontierRun, SeedFolder
from dpo.experiment.frontier_results import MODELS, own_cost, run_result
from dpo.experiment.sentiment_config import (
    CLASSIFIER,
    DATA,
    SentimentConfig,
    held_out_pairs,
    plan,
    quick_form,
    reward_model_config,
    reward_source,
    seed_folder,
    sft_config,
)
from dpo.models.generate import generate
from dpo.models.load import max_positions, weights_digest
from dpo.models.text_classifier import fit_classifier, save_classifier
from dpo.report.exact_study import BEST_OF_RM, BEST_OF_TRUE, FIXED_KLS, PPO_TRUE
from dpo.report.frontier_study import FrontierStudy, RewardModelFit, SeedResult
from dpo.report.sentiment_page import Accuracy, SentimentFacts, write_sentiment_study
from dpo.train.jobs import train_sft
from dpo.train.prepare import encode_prompts
from dpo.train.reward_source import RewardFunction, open_reward
from dpo.train.run import environment, open_run, read_metrics
from dpo.train.session import Policy, open_policy
from dpo.train.stopping import stop_here

FACTS = "facts.json"
"""In the study's `data`: how many reviews each part has, and how well the reward tells them."""
SAMPLES_WITH_WEIGHT = 20
"""At least so many of a prefix's samples carry the weight of the optimum where it is shown."""


def run_sentiment(config: SentimentConfig) -> FrontierStudy:
    """Run what is not finished, measure, write table, figure and page.

    Raises:
        InputError: a setting is wrong (before anything runs), the reviews cannot be used, or `out`
            holds a study with other settings. More seeds, or other processes, are no other
            settings.
        Stopped: SIGTERM or SIGINT came; the same command goes on.
    """
    if config.quick:
        config = quick_form(config)
    runs = plan(config)
    reviews, sha256 = _read_reviews(config)
    parts = split_reviews(
        reviews,
        classifier_share=config.classifier_share,
        held_out_share=config.data.held_out_share,
    )
    identity = {"command": "experiment sentiment", **config.decisive, "data_sha256": sha256}
    run = open_run(Path(config.out), identity)
    try:
        with stop_here():
            prepare_data(config, parts, sha256)
            seeds = [(config, seed) for seed in config.seeds]
            in_processes(config.processes, prepare_seed, seeds, "Preparing")
            in_processes(config.processes, finish, [(one.config,) for one in runs], "Training")
        study = collect(config, runs)
        settings = config.model_dump(mode="json")
        write_json(run.folder / "study.json", {"config": settings, "environment": environment()})
        write_sentiment_study(study, read_facts(config))
        run.update_manifest(status="finished")
    finally:
        run.close()
    return study


def _read_reviews(config: SentimentConfig) -> tuple[list[Review], str]:
    data = config.data
    return load_reviews(
        data.path,
        text=data.text,
        label=data.label,
        positive=data.positive,
        split=data.split,
        revision=data.revision,
    )


# -- what all seeds share ------------------------------------------------------------------------


def prepare_data(config: SentimentConfig, parts: ReviewParts, sha256: str) -> None:
    """Passages for SFT, the fitted classifier, and how well the reward tells held-out reviews."""
    folder = Path(config.out) / DATA
    settings = config.model_dump(mode="json", include={"data", "reward"})
    run = open_run(folder, {"command": "passages", **settings, "data_sha256": sha256})
    try:
        if run.finished:
            return
        if config.reward.model is None:
            texts, labels = zip(*_passages(config, parts.classifier), strict=True)
            with replace_folder(Path(config.out) / CLASSIFIER) as new:
                save_classifier(fit_classifier(texts, labels), new)
        train, held_out = passage_rows(config, parts)
        write_jsonl(train, folder / "passages.jsonl")
        write_jsonl(held_out, folder / "held-out.jsonl")
        reward = open_true_reward(config)
        whole = [(review.text, review.positive) for review in parts.held_out]
        facts = {
            "reviews": {name: len(getattr(parts, name)) for name in ReviewParts.__slots__},
            "passages": [len(train), len(held_out)],
            "of_reviews": asdict(accuracy(reward, whole)),
            "of_passages": asdict(accuracy(reward, _passages(config, parts.held_out))),
        }
        write_json(folder / FACTS, facts)
        run.update_manifest(status="finished")
    finally:
        run.close()


def _passages(config: SentimentConfig, reviews: Sequence[Review]) -> list[tuple[str, bool]]:
    """With something to go on after the longest prefix."""
    data = config.data
    found = labelled_passages(
        reviews,
        min_words=data.prefix_words[1] + 1,
        max_words=data.passage_words,
        most=data.passages_per_review,
    )
    if not found:
        raise InputError(
            f"data.passage_words: no sentence of {len(reviews)} reviews has more than "
            f"{data.prefix_words[1]} and at most {data.passage_words} words."
        )
    return found


def passage_rows(
    config: SentimentConfig, parts: ReviewParts
) -> tuple[list[DemonstrationRow], list[DemonstrationRow]]:
    """Passages of the model's reviews and of held-out ones. Short prefixes come in both; those are
    left out of the held-out ones, so that no policy is measured on a prompt it was trained on.
    """
    train, held_out = (
        as_demonstrations(
            [text for text, _ in _passages(config, reviews)],
            prefix_words=config.data.prefix_words,
            seed=number,
        )
        for number, reviews in enumerate((parts.model, parts.held_out))
    )
    taken = {near_key(row.prompt) for row in train}
    rest = [row for row in held_out if near_key(row.prompt) not in taken]
    if len({row.prompt for row in rest}) < 2:
        raise InputError("data: fewer than 2 held-out prefixes are not training prefixes too.")
    return train, rest


def open_true_reward(config: SentimentConfig) -> RewardFunction:
    """The classifier's log-odds."""
    return open_reward(validate(RewardSourceConfig, reward_source(config)))


def accuracy(reward: RewardFunction, texts: Sequence[tuple[str, bool]]) -> Accuracy:
    """How often the sign of the log-odds is the label's."""
    halves = [beginning_and_rest(text, 2) for text, _ in texts]
    rewards = reward([first for first, _ in halves], [rest for _, rest in halves])
    right = sum((r > 0) == label for r, (_, label) in zip(rewards.tolist(), texts, strict=True))
    return Accuracy(right, len(texts))


def read_facts(config: SentimentConfig) -> SentimentFacts:
    """What the page says of data, reward and model."""
    found = json.loads((Path(config.out) / DATA / FACTS).read_text("utf-8"))
    seeds = [seed_folder(config, seed) for seed in config.seeds]
    policy = _open(seeds[0].sft)
    losses = [[m for m in read_metrics(s.sft) if "eval/loss" in m][-1]["eval/loss"] for s in seeds]
    fresh = config.model.fresh
    return SentimentFacts(
        reviews=found["reviews"],
        passages=tuple(found["passages"]),
        of_reviews=Accuracy(**found["of_reviews"]),
        of_passages=Accuracy(**found["of_passages"]),
        model=None if fresh is not None else str(config.model.path),
        num_parameters=sum(p.numel() for p in policy.model.parameters()),
        vocab_size=len(policy.tokenizer),
        sft_loss=losses,
        num_pairs=[_num_pairs(folder) for folder in seeds],
    )


# -- a seed --------------------------------------------------------------------------------------


def prepare_seed(config: SentimentConfig, seed: int) -> None:
    """SFT model, its pairs, reward model, and rewards of many samples of the SFT model; what is
    there is taken as it is.
    """
    train_sft(sft_config(config, seed))
    make_pairs(config, seed)
    finish(reward_model_config(config, seed))
    sample_reference(config, seed)


def make_pairs(config: SentimentConfig, seed: int) -> None:
    """Samples of the SFT model for training prefixes and for held-out ones, as pairs."""
    folder = seed_folder(config, seed)
    policy, reward = _open(folder.sft), open_true_reward(config)
    identity = {
        "command": "pairs",
        **config.model_dump(mode="json", include={"pairs", "max_length", "max_new_tokens"}),
        "held_out_prefixes": config.measure.prefixes,
        "seed": seed,
        "model_sha256": weights_digest(policy.model),
        "reward_sha256": reward.digest,
    }
    run = open_run(folder.pairs().parent, identity)
    try:
        if run.finished:
            return
        parts = [
            ("passages.jsonl", config.pairs.prefixes, folder.pairs()),
            ("held-out.jsonl", config.measure.prefixes, held_out_pairs(folder)),
        ]
        for number, (file, most, target) in enumerate(parts):
            prompts = _some_prefixes(Path(config.out) / DATA / file, most, seed)
            many = config.pairs.samples
            answers = sample(config, policy, prompts, many, f"pairs/{number}", seed)
            draws = np.random.default_rng([seed, number])
            rows: list[PreferenceRow] = []
            for prompt, own in zip(prompts, answers, strict=True):
                rewards = reward([prompt] * many, own).tolist()
                rows += pairs_of(prompt, own, rewards, labels=config.pairs.labels, draws=draws)
            write_jsonl(rows, target)
        run.update_manifest(status="finished")
    finally:
        run.close()


def pairs_of(
    prompt: str,
    responses: Sequence[str],
    rewards: Sequence[float],
    *,
    labels: str,
    draws: np.random.Generator,
) -> list[PreferenceRow]:
    """Each two responses to a prompt. "hard": the higher reward is chosen, and equal ones make no
    pair; "bradley_terry": the first is chosen with probability sigmoid(r - r').

    Two equal responses make no pair.
    """
    rows = []
    for i, j in itertools.combinations(range(len(responses)), 2):
        gap = rewards[i] - rewards[j]
        if responses[i] == responses[j] or (labels == "hard" and gap == 0):
            continue
        first = gap > 0 if labels == "hard" else draws.random() * (1 + math.exp(-gap)) < 1
        better, worse = (i, j) if first else (j, i)
        scores = (rewards[better], rewards[worse])
        rows.append(PreferenceRow(prompt, responses[better], responses[worse], scores=scores))
    return rows


def sample_reference(config: SentimentConfig, seed: int) -> None:
    """True rewards, and the reward model's, of the SFT model's samples for held-out prefixes."""
    folder = seed_folder(config, seed)
    policy, reward = _open(folder.sft), open_true_reward(config)
    model = open_reward(RewardSourceConfig(model=str(folder.reward_model())))
    identity = {
        "command": "samples",
        "samples": config.measure.reference_samples,
        "max_new_tokens": config.max_new_tokens,
        "seed": seed,
        "model_sha256": weights_digest(policy.model),
        "reward_sha256": [reward.digest, model.digest],
    }
    run = open_run(folder.samples, identity)
    try:
        if run.finished:
            return
        many = config.measure.reference_samples
        prompts = held_out_prefixes(folder)
        answers = sample(config, policy, prompts, many, "samples", OTHER_DRAWS + seed)
        asked = [prompt for prompt in prompts for _ in range(many)]
        texts = [text for own in answers for text in own]
        tables = {
            name: one(asked, texts).reshape(len(prompts), many)
            for name, one in (("rewards", reward), ("scores", model))
        }
        with replace_file(folder.samples / SAMPLES) as file:
            save_file(tables, file)
        run.update_manifest(status="finished")
    finally:
        run.close()


def _open(folder: Path) -> Policy:
    return open_policy(ModelConfig(path=str(folder)), [], 0, trust_remote_code=False)


def _some_prefixes(file: Path, most: int, seed: int) -> list[str]:
    """At most so many different prefixes of the passages, in an order of the seed's."""
    prompts = _distinct_prompts(file)
    return [prompts[i] for i in epoch_order(len(prompts), seed=seed, epoch=0)[:most]]


def held_out_prefixes(folder: SeedFolder) -> list[str]:
    """Those that every policy of the seed is measured on."""
    return _distinct_prompts(held_out_pairs(folder))


def _distinct_prompts(file: Path) -> list[str]:
    return list(dict.fromkeys(str(row.prompt) for row in load_rows(file).rows))


def sample(
    config: SentimentConfig,
    policy: Policy,
    prompts: Sequence[str],
    many: int,
    name: str,
    seed: int,
) -> list[list[str]]:
    """How a model goes on from each prompt at temperature 1, so many times."""
    assert policy.template is not None
    encoder = Encoder(policy.tokenizer, policy.template, config.max_length)
    asked: Sequence[Prompt] = prompts
    ids = encode_prompts(
        encoder,
        asked,
        max_new_tokens=config.max_new_tokens,
        positions=max_positions(policy.model),
    )
    places = [(i, s) for i in range(len(prompts)) for s in range(many)]
    responses = generate(
        policy.model,
        [ids[i] for i, _ in places],
        keys=[f"{name}/{i}/{s}" for i, s in places],
        temperature=1.0,
        max_new_tokens=config.max_new_tokens,
        stop_ids=encoder.stop_ids,
        seed=seed,
        batch_size=128,
    )
    texts = [encoder.decode(response.ids) for response in responses]
    return [texts[i : i + many] for i in range(0, len(texts), many)]


# -- what was measured ---------------------------------------------------------------------------


def collect(config: SentimentConfig, runs: Sequence[FrontierRun]) -> FrontierStudy:
    """All numbers of the finished study, from the run directories alone."""
    return FrontierStudy(
        folder=Path(config.out),
        seeds=[_seed_result(config, s, [r for r in runs if r.seed == s]) for s in config.seeds],
        models={
            **MODELS,
            PPO_TRUE: [*MODELS[PPO_TRUE], "classifier"],
            BEST_OF_TRUE: [*MODELS[BEST_OF_TRUE], "classifier"],
        },
        num_questions=len(held_out_prefixes(seed_folder(config, config.seeds[0]))),
        config=config.model_dump(mode="json"),
        known_kl=max(0.0, math.log(config.measure.reference_samples / SAMPLES_WITH_WEIGHT)),
    )


def _seed_result(config: SentimentConfig, seed: int, runs: Sequence[FrontierRun]) -> SeedResult:
    folder = seed_folder(config, seed)
    tables = load_file(folder.samples / SAMPLES)
    rewards, scores = tables["rewards"], tables["scores"]
    two_each = _samples_of_pairs(config) // 2
    reward_model = own_cost(reward_model_config(config, seed), two_each)
    best_of = config.measure.best_of
    return SeedResult(
        seed=seed,
        reference_reward=rewards.mean().item(),
        curve=optimum_curve(world_of_samples(rewards)),
        curve_stderr=curve_stderr(rewards, FIXED_KLS),
        best_of={
            BEST_OF_TRUE: best_of_n(rewards, best_of),
            BEST_OF_RM: best_of_n(rewards, best_of, scores=scores),
        },
        reward_model=_reward_model_fit(folder, rewards, scores),
        runs=[run_result(run, two_each, reward_model) for run in runs],
        shift=[],
    )


def _samples_of_pairs(config: SentimentConfig) -> int:
    """Responses that were drawn for the training pairs; each takes part in several of them."""
    prefixes = _distinct_prompts(Path(config.out) / DATA / "passages.jsonl")
    return min(config.pairs.prefixes, len(prefixes)) * config.pairs.samples


def _num_pairs(folder: SeedFolder) -> int:
    """Training pairs."""
    return len(load_rows(folder.pairs()).rows)


def _reward_model_fit(folder: SeedFolder, rewards: Tensor, scores: Tensor) -> RewardModelFit:
    metrics = [row for row in read_metrics(folder.reward_model()) if "eval/loss" in row][-1]
    rated = [row.scores for row in load_rows(held_out_pairs(folder)).rows]  # type: ignore[union-attr]
    right = [better > worse for better, worse in rated]  # type: ignore[misc]
    return RewardModelFit(
        accuracy=float(metrics["eval/rewards/accuracy"]),
        label_accuracy=sum(right) / len(right),
        correlation=within_prompt_correlation(rewards, scores),
    )
