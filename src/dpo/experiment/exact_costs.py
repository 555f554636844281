"""What each method of the study of exact worlds holds, draws and asks for, beside its time."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

from dpo.experiment.exact_config import ExactStudyConfig
from dpo.experiment.exact_world import Scorer, new_policy
from dpo.report.exact_study import (
    BEST_OF_RM,
    BEST_OF_TRUE,
    DPO,
    IPO,
    ONLINE_DPO,
    PPO_RM,
    PPO_TRUE,
    PREFERRED_FT,
    UNLIKELIHOOD,
    MethodCost,
)
from dpo.sections import Section

POLICY, REFERENCE, CRITIC, REWARD_MODEL = "policy", "reference", "critic", "reward model"


class Data(NamedTuple):
    """Responses drawn from a model, comparisons of two of them, and rewards of single ones."""

    responses: int = 0
    labels: int = 0
    rewards: int = 0


def costs(config: ExactStudyConfig) -> list[MethodCost]:
    """What every method needs at one strength."""
    online_pairs, rollouts = num_online_pairs(config), config.ppo.rounds * config.ppo.rollouts
    offline = Data(2 * config.pairs, config.pairs)
    online = Data(2 * online_pairs, online_pairs)
    reward_model_and_rollouts = Data(2 * config.pairs + rollouts, config.pairs)
    rewarded_rollouts = Data(responses=rollouts, rewards=rollouts)

    fit, model_fit = num_settings(config.offline), num_settings(config.reward_model)
    rl, rounds = num_settings(config.ppo), num_settings(config.online)
    strength = 1
    return [
        _cost(DPO, [POLICY], [REFERENCE], offline, fit + strength),
        _cost(
            PPO_RM,
            [POLICY, CRITIC],
            [REFERENCE, REWARD_MODEL],
            reward_model_and_rollouts,
            model_fit + rl + strength,
        ),
        _cost(PPO_TRUE, [POLICY, CRITIC], [REFERENCE], rewarded_rollouts, rl + strength),
        _cost(ONLINE_DPO, [POLICY], [REFERENCE], online, fit + rounds + strength),
        _cost(IPO, [POLICY], [REFERENCE], offline, fit + strength),
        _cost(BEST_OF_TRUE, [], [REFERENCE], Data(), strength, per_answer="n"),
        _cost(BEST_OF_RM, [REWARD_MODEL], [REFERENCE], offline, model_fit + strength, "n"),
        _cost(PREFERRED_FT, [POLICY], [], offline, fit),
        _cost(UNLIKELIHOOD, [POLICY], [], offline, fit + strength),
    ]


def num_online_pairs(config: ExactStudyConfig) -> int:
    """Pairs that online DPO draws and labels: those of every round that it begins."""
    per_pass = math.ceil(config.online.pairs_per_round / config.offline.batch_size)
    rounds = math.ceil(config.offline.steps / (config.online.passes * per_pass))
    return rounds * config.online.pairs_per_round


def num_settings(section: Section) -> int:
    """How many numbers of a section somebody has to choose."""
    return len(type(section).model_fields)


def _cost(
    method: str,
    trained: list[str],
    frozen: list[str],
    data: Data,
    settings: int,
    per_answer: str = "1",
) -> MethodCost:
    """Memory in float32: the weights of all models at hand, and for those that are trained a
    gradient and two moments of AdamW.
    """
    policy = new_policy(0)
    scorer = _num_parameters(Scorer(policy))
    sizes = {CRITIC: scorer, REWARD_MODEL: scorer}
    held = sum(sizes.get(name, _num_parameters(policy)) for name in [*trained, *frozen])
    moving = sum(sizes.get(name, _num_parameters(policy)) for name in trained)
    return MethodCost(
        method=method,
        models=[*trained, *frozen],
        trained=trained,
        megabytes=4 * (held + 3 * moving) / 1e6,
        settings=settings,
        per_answer=per_answer,
        **data._asdict(),
    )


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
