"""One seed of the study of exact worlds: its reference, its data, and every trial, measured."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from dpo.core.best_of_n import best_of_n_log_policy
from dpo.core.exact import World, optimal_log_policy
from dpo.core.losses import dpo, ipo
from dpo.core.reference_free import unlikelihood
from dpo.errors import DivergedError
from dpo.evaluate.exact import Measures, correlation
from dpo.experiment.exact_config import ExactStudyConfig, FitSettings
from dpo.experiment.exact_methods import (
    Fit,
    PairLoss,
    Pairs,
    RewardModel,
    Snapshot,
    Start,
    draw_prompts,
    draw_responses,
    fit_reward_model,
    imitate,
    prefer,
    prefer_online,
    preferred_ft,
    sample_pairs,
)
from dpo.experiment.exact_ppo import ppo
from dpo.experiment.exact_world import (
    PROMPTS,
    demonstrator_log_policy,
    log_policy,
    new_policy,
    reward_table,
)
from dpo.progress import counting
from dpo.report.exact_study import (
    BEST_OF_RM,
    BEST_OF_TRUE,
    COVERAGE,
    DPO,
    FRONTIER,
    IPO,
    ONLINE_DPO,
    PAIRS,
    PPO_RM,
    PPO_TRUE,
    PREFERRED_FT,
    RATE,
    REWARD_MODEL,
    RM_SOLVED,
    UNLIKELIHOOD,
    PolicyRow,
    RewardModelRow,
    SeedResult,
)

log = logging.getLogger("dpo")

Part = Literal["pairs", "rewards"]
"""The two halves of a seed, of about equal length: what learns from pairs, what from rewards."""
PARTS: tuple[Part, ...] = get_args(Part)

NUM_CHECKPOINTS = 6
"""Of a training: after all of its steps, a half, a quarter, and so on."""
FRONTIER_BETAS = tuple(10 ** (k / 20) for k in range(40, -41, -1))
"""Of the optima that the exact frontier is drawn through: 100 down to 0.01."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A method at one strength: policies on the way to its end, trained when they are asked for."""

    method: str
    strength: float | None
    snapshots: Iterator[Snapshot]
    beta: float | None = None
    """Of the KL-constrained objective, where the method's strength is one."""
    effect: str = FRONTIER
    """What it is there for: the frontier, or the effect of something that is varied."""
    varied: float | None = None
    seen: Tensor | None = None
    """Which responses occur in its pairs."""
    seconds_before: float = 0.0
    """Of what was trained before it."""


@dataclass(frozen=True, slots=True)
class Seeded:
    """What the trials of a seed share."""

    config: ExactStudyConfig
    seed: int
    start: Start
    pairs: Pairs
    """All of them; a trial with fewer takes the first ones."""

    def random(self, name: str) -> torch.Generator:
        """A generator of its own for everything that is random."""
        return generator_for(self.seed, name)

    def seen(self, pairs: Pairs) -> Tensor:
        return pairs.covered(self.start.world.reward.shape)


def generator_for(seed: int, name: str) -> torch.Generator:
    """A generator that depends on the seed and on what it is for, and on nothing drawn before."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def fit_of(settings: FitSettings, *, rate_factor: float = 1.0) -> Fit:
    """The settings with checkpoints."""
    return Fit(
        settings.steps,
        settings.batch_size,
        settings.learning_rate * rate_factor,
        checkpoints(settings.steps),
    )


def checkpoints(steps: int) -> set[int]:
    """After how many steps a policy is measured.

    >>> sorted(checkpoints(600))
    [19, 38, 75, 150, 300, 600]
    """
    return {max(1, round(steps / 2**k)) for k in range(NUM_CHECKPOINTS)}


def make_start(config: ExactStudyConfig, seed: int) -> Start:
    """The rough reference: a fresh policy that imitated a few thousand demonstrations."""
    reward = reward_table()
    uniform = torch.full((len(PROMPTS),), 1 / len(PROMPTS), dtype=torch.float64)
    demonstrator = World(uniform, demonstrator_log_policy(reward), reward)
    generator = generator_for(seed, "demonstrations")
    prompts = draw_prompts(demonstrator, config.demonstrations, generator)
    responses = draw_responses(demonstrator.log_ref, prompts, generator)
    policy = new_policy(seed)
    for _ in imitate(policy, prompts, responses, fit_of(config.reference), generator):
        pass
    return Start(policy, World(uniform, log_policy(policy), reward))


# -- the trials ----------------------------------------------------------------------------------


def pair_trials(here: Seeded) -> Iterator[Trial]:
    """Methods that learn from pairs: over their strengths, then one thing varied at a time."""
    config, beta, pairs = here.config, here.config.beta, here.pairs[: here.config.pairs]
    for strength in config.betas:
        yield dpo_trial(here, pairs, strength)
    for strength in config.ipo_betas:
        yield _on_pairs(here, IPO, strength, pairs, partial(ipo, beta=strength))
    for alpha in config.unlikelihood_alphas:
        yield _on_pairs(here, UNLIKELIHOOD, alpha, pairs, partial(_unlikelihood, alpha=alpha))
    fit, generator = fit_of(config.offline), here.random(PREFERRED_FT)
    yield Trial(PREFERRED_FT, None, preferred_ft(here.start, pairs, fit, generator))
    for strength in config.on_policy_betas:
        yield online_trial(here, strength)
    for count in config.pair_counts:
        yield replace(dpo_trial(here, here.pairs[:count], beta), effect=PAIRS, varied=count)
    for share in config.shares:
        yield replace(
            dpo_trial(here, pairs_of_a_share(here, share), beta), effect=COVERAGE, varied=share
        )
    for factor in config.rate_factors:
        trial = dpo_trial(here, pairs, beta, rate_factor=factor)
        yield replace(trial, effect=RATE, varied=factor)


def reward_trials(here: Seeded, models: Mapping[int, RewardModel]) -> Iterator[Trial]:
    """Methods that follow a reward: over their strengths, then one thing varied at a time.

    Args:
        models: reward models by the number of pairs that they were fitted on.
    """
    config, beta = here.config, here.config.beta
    usual = models[config.pairs]
    for model in (usual, None):
        for strength in config.on_policy_betas:
            yield ppo_trial(here, strength, model)
        for n in config.best_of:
            yield best_of_trial(here, n, model)
    for strength in config.betas:
        yield solved_trial(here, strength, usual)
    for factor in config.rate_factors:
        for model in (usual, None):
            trial = ppo_trial(here, beta, model, rate_factor=factor)
            yield replace(trial, effect=RATE, varied=factor)
    for count, model in models.items():
        if count != config.pairs:
            for strength in config.betas:
                trial = solved_trial(here, strength, model)
                yield replace(trial, effect=REWARD_MODEL, varied=count)


def pairs_of_a_share(here: Seeded, share: float) -> Pairs:
    """As many pairs as usual, but only of responses that were picked at random beforehand."""
    world, generator = here.start.world, here.random(f"share {share}")
    picked = torch.rand(world.log_ref.shape, generator=generator) < share
    source = world.log_ref.masked_fill(~picked, -torch.inf).log_softmax(dim=-1)
    return sample_pairs(world, source, here.config.pairs, generator)


def dpo_trial(here: Seeded, pairs: Pairs, beta: float, *, rate_factor: float = 1.0) -> Trial:
    """DPO on pairs of the reference's responses."""
    trial = _on_pairs(here, DPO, beta, pairs, partial(dpo, beta=beta), rate_factor=rate_factor)
    return replace(trial, beta=beta, seen=here.seen(pairs))


def _on_pairs(
    here: Seeded,
    method: str,
    strength: float,
    pairs: Pairs,
    loss: PairLoss,
    *,
    rate_factor: float = 1.0,
) -> Trial:
    fit = fit_of(here.config.offline, rate_factor=rate_factor)
    generator = here.random(f"{method} {strength}")
    return Trial(method, strength, prefer(here.start, pairs, loss, fit, generator))


def _unlikelihood(chosen: Tensor, rejected: Tensor, *_: Tensor, alpha: float) -> Tensor:
    """As a loss that is given the reference's log-probabilities too, and has no use for them."""
    return unlikelihood(chosen, rejected, alpha=alpha)


def online_trial(here: Seeded, beta: float) -> Trial:
    """DPO on pairs of the policy's own responses, labelled by the true reward."""
    config = here.config
    policies = prefer_online(
        here.start,
        partial(dpo, beta=beta),
        fit_of(config.offline),
        here.random(f"{ONLINE_DPO} {beta}"),
        pairs_per_round=config.online.pairs_per_round,
        passes=config.online.passes,
    )
    return Trial(ONLINE_DPO, beta, policies, beta)


def ppo_trial(
    here: Seeded, beta: float, model: RewardModel | None = None, *, rate_factor: float = 1.0
) -> Trial:
    """PPO on a reward model, or on the true reward."""
    method = PPO_TRUE if model is None else PPO_RM
    settings = here.config.ppo
    settings = settings.model_copy(update={"learning_rate": settings.learning_rate * rate_factor})
    policies = ppo(
        here.start,
        here.start.world.reward if model is None else model.scores,
        settings,
        beta=beta,
        checkpoints=checkpoints(settings.steps),
        generator=here.random(f"{method} {beta}"),
    )
    before = 0.0 if model is None else model.seconds
    return Trial(method, beta, policies, beta, seconds_before=before)


def best_of_trial(here: Seeded, n: int, model: RewardModel | None = None) -> Trial:
    """Best-of-n by the true reward, or by a reward model: nothing is trained, the law is exact."""
    world = here.start.world
    scores = world.reward if model is None else model.scores
    only = Snapshot(0, 0.0, best_of_n_log_policy(world.log_ref, scores, n=n))
    method = BEST_OF_TRUE if model is None else BEST_OF_RM
    before = 0.0 if model is None else model.seconds
    return Trial(method, n, iter([only]), seconds_before=before)


def solved_trial(here: Seeded, beta: float, model: RewardModel) -> Trial:
    """The optimum of what a reward model says: what PPO on it is on its way to."""
    optimum = optimal_log_policy(model.scores, here.start.world.log_ref, beta=beta)
    only = Snapshot(0, 0.0, optimum)
    return Trial(RM_SOLVED, beta, iter([only]), beta, seconds_before=model.seconds)


# -- all of a seed -------------------------------------------------------------------------------


def run_part(config: ExactStudyConfig, seed: int, part: Part) -> SeedResult:
    """Train and measure the trials of one part of one seed."""
    start = make_start(config, seed)
    world = start.world
    fitted_on = [*config.reward_model_pairs, config.pairs]
    count = max(*config.pair_counts, *fitted_on)
    pairs = sample_pairs(world, world.log_ref, count, generator_for(seed, "pairs"))
    here = Seeded(config, seed, start, pairs)
    models: dict[int, RewardModel] = {}
    if part == "rewards":
        models = {count: reward_model(here, count) for count in fitted_on}
        trials = list(reward_trials(here, models))
    else:
        trials = list(pair_trials(here))
    policies, diverged = run_trials(trials, seed, Measures(world))
    frontier = world.frontier(FRONTIER_BETAS)
    probabilities = world.prompt_probs.unsqueeze(-1) * world.log_ref.exp()
    return SeedResult(
        seed=seed,
        policies=policies,
        reward_models=[
            RewardModelRow(count, model.seconds, correlation(world, model.scores))
            for count, model in models.items()
        ],
        frontier=list(
            zip(FRONTIER_BETAS, frontier.kl.tolist(), frontier.reward.tolist(), strict=True)
        ),
        reference_reward=float(world.expected_reward(world.log_ref)),
        reference_entropy=-float((probabilities * world.log_ref).sum()),
        diverged=diverged,
    )


def reward_model(here: Seeded, count: int) -> RewardModel:
    """The reward model of the first `count` pairs."""
    fit, generator = fit_of(here.config.reward_model), here.random(f"reward model {count}")
    return fit_reward_model(here.start, here.pairs[:count], fit, generator)


def run_trials(
    trials: Sequence[Trial], seed: int, measures: Measures
) -> tuple[list[PolicyRow], list[str]]:
    """The policies of all trials, and a sentence for each trial that diverged."""
    policies: list[PolicyRow] = []
    diverged: list[str] = []
    with counting(f"Seed {seed}", len(trials)) as advance:
        for number, trial in enumerate(trials, 1):
            log.info("Seed %d: %d of %d, %s.", seed, number, len(trials), trial.method)
            try:
                policies += measured(trial, seed, measures)
            except DivergedError as error:
                diverged.append(f"{trial.method} {trial.strength}: {error}")
            advance(1)
    return policies, diverged


def measured(trial: Trial, seed: int, measures: Measures) -> list[PolicyRow]:
    """Train, and measure at every checkpoint.

    Raises:
        DivergedError: a loss was not finite.
    """
    rows = [
        PolicyRow(
            seed=seed,
            effect=trial.effect,
            method=trial.method,
            strength=trial.strength,
            varied=trial.varied,
            step=snapshot.step,
            last=False,
            seconds=trial.seconds_before + snapshot.seconds,
            measured=measures(snapshot.log_policy, beta=trial.beta, seen=trial.seen),
        )
        for snapshot in trial.snapshots
    ]
    return [*rows[:-1], replace(rows[-1], last=True)]
