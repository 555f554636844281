"""What a study of frontiers says of "simpler, faster, more stable than PPO, a better frontier"."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from dpo.core.stats import mean_interval
from dpo.report.exact_claims import fewer, verdict
from dpo.report.exact_study import DPO, FIXED_KLS, MAX_KL, PPO_RM, PPO_TRUE, mean
from dpo.report.frontier_study import (
    BySeed,
    FrontierStudy,
    area_shares,
    by_strength,
    drops,
    highest_rewards,
    lowest_rewards,
    mean_gains,
    rewards_at,
    seconds,
)
from dpo.report.tables import Cells, spread

RIVALS = (PPO_RM, PPO_TRUE)

Difference = Callable[[FrontierStudy, str], list[float]]
"""A number of DPO against a rival's, one a seed; a claim holds when it is above 0."""


def nats(kl: float) -> str:
    """A KL in words."""
    return "1 nat" if kl == 1 else f"{kl:g} nats"


def at_kl(kl: float) -> Callable[[FrontierStudy, str], BySeed]:
    """The height of a method's frontier there."""
    return lambda study, method: rewards_at(study, method, kl)


def minus(
    study: FrontierStudy,
    measure: Callable[[FrontierStudy, str], BySeed],
    first: str,
    second: str,
) -> list[float]:
    """Differences on the seeds that both have."""
    own, other = measure(study, first), measure(study, second)
    return [value - other[seed] for seed, value in own.items() if seed in other]


def claims_table(study: FrontierStudy) -> list[Cells]:
    """Each claim as a number with an interval, and what the interval says."""
    lines = [["claim", "measured as", *(f"against {rival}" for rival in RIVALS)]]
    known = study.methods()
    rivals = [rival for rival in RIVALS if rival in known and DPO in known]
    if len(rivals) < len(RIVALS):
        return lines
    lines.append(["simpler", "models in memory; keys", *(_simpler(study, r) for r in rivals)])
    for claim, measured_as, difference in claims(study):
        ratio = "ratio" in measured_as
        found = [verdict(difference(study, rival), ratio=ratio) for rival in rivals]
        lines.append([claim, measured_as, *found])
    return lines


def _simpler(study: FrontierStudy, rival: str) -> str:
    def counts(method: str) -> tuple[int, int]:
        keys = [run.cost.keys for run in study.runs(method) if run.cost is not None]
        return len(study.models[method]), round(mean(keys))

    return fewer(counts(DPO), counts(rival))


def _faster(study: FrontierStudy, rival: str) -> list[float]:
    return minus(study, lambda s, m: _logarithms(seconds(s, m)), rival, DPO)


def _logarithms(values: BySeed) -> BySeed:
    return {seed: math.log(value) for seed, value in values.items()}


def _keeps(study: FrontierStudy, rival: str) -> list[float]:
    return minus(study, drops, rival, DPO)


def _scatters(study: FrontierStudy, rival: str) -> list[float]:
    return minus(study, scatter, rival, DPO)


def scatter(study: FrontierStudy, method: str) -> BySeed:
    """Absolute distance of a seed's reward at the end from the mean over seeds, averaged over
    strengths.
    """
    found: dict[int, list[float]] = {}
    for group in by_strength(study.runs(method)):
        centre = mean([run.last.reward for run in group])
        for run in group:
            found.setdefault(run.seed, []).append(abs(run.last.reward - centre))
    return {seed: mean(values) for seed, values in found.items()}


def _worst(study: FrontierStudy, rival: str) -> list[float]:
    return minus(study, lowest_rewards, DPO, rival)


def _better(measure: Callable[[FrontierStudy, str], BySeed]) -> Difference:
    return lambda study, rival: minus(study, measure, DPO, rival)


def claims(study: FrontierStudy) -> list[tuple[str, str, Difference]]:
    """Claim, measure and difference. Where the optimum is not known up to `MAX_KL`, the area under
    a frontier is not a share of the optimum's but the mean gain.
    """
    area, measure = (
        ("area share", area_shares)
        if study.known_kl >= MAX_KL
        else (f"mean gain up to {nats(MAX_KL)}", mean_gains)
    )
    return [
        ("faster", "seconds of all training, PPO's ratio to DPO's", _faster),
        ("more stable", "scatter of the reward over seeds, PPO's less DPO's", _scatters),
        ("more stable", "drop from the best evaluation, PPO's less DPO's", _keeps),
        ("more stable", "reward at the worst strength, DPO's less PPO's", _worst),
        ("a better frontier", f"{area}, DPO's less PPO's", _better(measure)),
        *(
            ("a better frontier", f"reward at {nats(kl)}, DPO's less PPO's", _better(at_kl(kl)))
            for kl in FIXED_KLS
        ),
        ("a better frontier", "highest reward, DPO's less PPO's", _better(highest_rewards)),
    ]


def answers(study: FrontierStudy) -> list[str]:
    """The claims as sentences, made of the numbers of the table."""
    known = study.methods()
    if len(study.seeds) < 2 or not {DPO, *RIVALS} <= {*known}:
        return ["One seed, or a method is missing: nothing can be said of the claims."]
    said = [f"- **Simpler**, models in memory and keys: {_simpler(study, PPO_RM)} ({PPO_RM})."]
    for rival in RIVALS:
        faster = _faster(study, rival)
        times = math.exp(abs(mean(faster)))
        area = minus(study, area_shares, DPO, rival)
        speed = _answer(faster, "faster", "slower", "neither clearly faster nor slower")
        scatter_said = _answer(
            _scatters(study, rival),
            "scatters less over seeds",
            "scatters more over seeds",
            "scatters neither clearly more nor less over seeds",
        )
        worst = _answer(
            _worst(study, rival),
            "its worst strength ends better",
            "its worst strength ends worse",
            "its worst strength ends neither clearly better nor worse",
        )
        reaches = _answer(
            area,
            "its frontier is better",
            "its frontier is worse",
            "its frontier is neither clearly better nor worse",
        )
        said.append(
            f"- **Against {rival}**, DPO is {speed} ({times:.1f} times), {scatter_said}, {worst}, "
            f"and {reaches} ({spread(area, 3, signed=True)} of the area under the optimum's)."
        )
    share = {m: mean([*area_shares(study, m).values()]) for m in known}
    order = ", ".join(f"{m} {share[m]:.2f}" for m in sorted(known, key=lambda m: -share[m]))
    return [
        "\n".join(said),
        f"Area under the frontier, as a share of the optimum's: {order}.",
        _what_the_model_costs(study),
    ]


def _what_the_model_costs(study: FrontierStudy) -> str:
    """The reward model's fit, and what the true reward in its place adds to PPO."""
    fits = [seed.reward_model for seed in study.seeds]
    accuracy, labels = mean([f.accuracy for f in fits]), mean([f.label_accuracy for f in fits])
    lost = minus(study, area_shares, PPO_TRUE, PPO_RM)
    return (
        f"The reward model agrees with {accuracy:.0%} of the held-out labels, the true reward "
        f"itself with {labels:.0%}; within questions it correlates "
        f"{mean([f.correlation for f in fits]):.2f} with the true reward. With the true reward in "
        f"its place PPO's area changes by {spread(lost, 3, signed=True)}."
    )


def _answer(values: Sequence[float], yes: str, no: str, unknown: str) -> str:
    """What the interval of a difference says; above 0 is yes."""
    low, high = mean_interval(values)
    return yes if low > 0 else no if high < 0 else unknown
