"""The tables of a study of exact worlds, as text: means over seeds with Student's intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dpo.core.best_of_n import best_of_n_kl_bound
from dpo.evaluate.exact import Measured
from dpo.report.exact_study import (
    BEST_OF_RM,
    BEST_OF_TRUE,
    DPO,
    FIXED_KLS,
    METHODS,
    ONLINE_DPO,
    PAIRS,
    PPO_RM,
    PPO_TRUE,
    REWARD_MODEL,
    RM_SOLVED,
    ExactStudy,
    PolicyRow,
    area_shares,
    at_rate,
    exact_rewards_at,
    gains,
    grouped,
    paired,
    rewards_at,
    seconds_to,
    worst_gains,
)
from dpo.report.tables import Cells, spread

NEAR = 0.8
"""The share of the gain whose time is told."""


def _of(
    rows: Sequence[PolicyRow], value: Callable[[Measured], float | None], digits: int = 2
) -> str:
    return spread([value(row.measured) for row in rows], digits)


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table whose first line is its head."""
    head, *rows = table
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -- tables: the first line is the head ----------------------------------------------------------


def frontier_table(study: ExactStudy) -> list[Cells]:
    """Area and reward at fixed KL, a line a method."""
    exact = [spread(exact_rewards_at(study, kl)) for kl in FIXED_KLS]
    lines = [
        ["method", "area, share of π*'s", *(f"reward at KL {kl:g}" for kl in FIXED_KLS)],
        ["π*, exact", "1", *exact],
    ]
    for method in methods(study):
        at_kls = [spread(rewards_at(study, method, kl)) for kl in FIXED_KLS]
        lines.append([method, spread(area_shares(study, method), 3), *at_kls])
    return lines


def methods(study: ExactStudy) -> list[str]:
    """Methods of the frontier that have a policy."""
    return [method for method in METHODS if study.final(method=method)]


COMPARISONS = (
    (DPO, PPO_RM),
    (DPO, PPO_TRUE),
    (PPO_RM, PPO_TRUE),
    (ONLINE_DPO, DPO),
    (ONLINE_DPO, PPO_TRUE),
    (RM_SOLVED, PPO_RM),
    (RM_SOLVED, DPO),
    (DPO, BEST_OF_RM),
)


def difference_table(study: ExactStudy) -> list[Cells]:
    """Frontiers against each other, and gains at each beta, paired by seed."""
    betas = study.config["betas"]
    lines = [
        [
            "first minus second",
            "area share",
            *(f"reward at KL {kl:g}" for kl in FIXED_KLS),
            *(f"gain, beta {beta:g}" for beta in betas),
        ]
    ]
    for first, second in COMPARISONS:
        areas = minus(area_shares(study, first), area_shares(study, second))
        cells = [f"{first} - {second}", spread(areas, 3, signed=True)]
        for kl in FIXED_KLS:
            found = minus(rewards_at(study, first, kl), rewards_at(study, second, kl))
            cells.append(spread(found, 3, signed=True))
        for beta in betas:
            own, other = (gains(study.at_beta(method, beta)) for method in (first, second))
            cells.append(spread(paired(own, other), 3, signed=True))
        lines.append(cells)
    return lines


def minus(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


def final_table(study: ExactStudy) -> list[Cells]:
    """Every method at every strength, at the end of its training."""
    head = ["method", "strength", "KL", "reward", "efficiency", "gain", "total variation"]
    lines = [[*head, "KL(policy ‖ π*)", "win rate", "correlation"]]
    for method in methods(study):
        for group in grouped(study.final(method=method)):
            strength = group[0].strength
            lines.append(
                [
                    method,
                    "" if strength is None else f"{strength:g}",
                    _of(group, lambda m: m.kl),
                    _of(group, lambda m: m.reward),
                    _of(group, lambda m: m.efficiency, 3),
                    _of(group, lambda m: m.gain, 3),
                    _of(group, lambda m: m.total_variation),
                    # Of methods with a beta; of others only the optimum of the same KL is known.
                    _of(group, lambda m: None if m.gain is None else m.kl_to_optimum, 3),
                    _of(group, lambda m: m.win_rate),
                    _of(group, lambda m: m.correlation),
                ]
            )
    return lines


def best_of_table(study: ExactStudy) -> list[Cells]:
    """Best-of-n: exact KL, bound, reward, and what the optimum of that KL would gain more."""
    lines = [["n", "KL, exact", "log n - (n - 1)/n", "reward", "efficiency"]]
    for group in grouped(study.final(method=BEST_OF_TRUE)):
        n = int(group[0].strength or 1)
        values = [_of(group, lambda m: m.kl, 3), f"{best_of_n_kl_bound(n):.3f}"]
        values += [_of(group, lambda m: m.reward), _of(group, lambda m: m.efficiency, 3)]
        lines.append([str(n), *values])
    return lines


def effect_table(study: ExactStudy, effect: str, name: str) -> list[Cells]:
    """DPO at the study's beta, by what was varied; with the run of the frontier."""
    usual = float(study.config["pairs"]) if effect == PAIRS else 1.0
    found = {usual: study.at_beta(DPO)}
    found |= {float(group[0].varied or 0): group for group in grouped(study.final(effect))}
    head = [name, "coverage", "KL(policy ‖ π*)", "efficiency", "gain", "correlation"]
    lines = [[*head, "error, seen", "error, unseen"]]
    for varied in sorted(found):
        lines.append(
            [f"{varied:,.0f}" if effect == PAIRS else f"{varied:g}", *_dpo_cells(found[varied])]
        )
    return lines


def beta_table(study: ExactStudy) -> list[Cells]:
    """DPO by beta: how wrong its implicit reward is, on what the pairs show and on what not."""
    head = ["beta", "coverage", "KL(policy ‖ π*)", "efficiency", "gain", "correlation"]
    lines = [[*head, "error, seen", "error, unseen"]]
    lines += [
        [f"{beta:g}", *_dpo_cells(study.at_beta(DPO, beta))] for beta in study.config["betas"]
    ]
    return lines


def _dpo_cells(rows: Sequence[PolicyRow]) -> Cells:
    return [
        _of(rows, lambda m: m.coverage),
        _of(rows, lambda m: m.kl_to_optimum, 3),
        _of(rows, lambda m: m.efficiency, 3),
        _of(rows, lambda m: m.gain, 3),
        _of(rows, lambda m: m.correlation, 3),
        _of(rows, lambda m: m.error_seen),
        _of(rows, lambda m: m.error_unseen),
    ]


def reward_model_table(study: ExactStudy) -> list[Cells]:
    """The correlation of reward models, and how far their own optima get."""
    usual, betas = int(study.config["pairs"]), study.config["betas"]
    models = [model for seed in study.seeds for model in seed.reward_models]
    lines = [["pairs", "correlation with the true reward", *(f"gain, beta {b:g}" for b in betas)]]
    for pairs in sorted({model.pairs for model in models}):
        fits = [model.correlation for model in models if model.pairs == pairs]
        rows = study.final(method=RM_SOLVED)
        if pairs != usual:
            rows = [r for r in study.final(REWARD_MODEL, RM_SOLVED) if r.varied == pairs]
        reached = [gains(row for row in rows if row.strength == beta).values() for beta in betas]
        lines.append([f"{pairs:,}", spread(fits, 3), *(spread(own, 3) for own in reached)])
    return lines


def rate_table(study: ExactStudy) -> list[Cells]:
    """Gain at each learning rate, and the worst of them."""
    factors = sorted({1.0, *study.config["rate_factors"]})
    lines = [["method", *(f"× {factor:g}" for factor in factors), "worst of them"]]
    for method in (DPO, PPO_RM, PPO_TRUE):
        cells = [spread(gains(at_rate(study, method, factor)).values(), 3) for factor in factors]
        lines.append([method, *cells, spread(worst_gains(study, method).values(), 3)])
    return lines


def cost_table(study: ExactStudy) -> list[Cells]:
    """What each method needs."""
    head = ["method", "seconds", f"seconds to {NEAR:.0%} of the gain", "models", "memory (MB)"]
    lines = [[*head, "responses drawn", "labels", "rewards", "settings", "responses an answer"]]
    for cost in study.costs:
        rows = study.final(method=cost.method)
        at_beta = [row for row in rows if row.strength == study.beta]
        trained = at_beta or rows
        lines.append(
            [
                cost.method,
                spread([row.seconds for row in trained], 1) if cost.trained else "0",
                _time_to_near(study, cost.method) if at_beta else "",
                f"{len(cost.models)}: {', '.join(cost.models)}",
                f"{cost.megabytes:.1f}",
                f"{cost.responses:,}",
                f"{cost.labels:,}",
                f"{cost.rewards:,}",
                str(cost.settings),
                cost.per_answer,
            ]
        )
    return lines


def _time_to_near(study: ExactStudy, method: str) -> str:
    if not gains(study.at_beta(method)):
        return ""
    reached = seconds_to(study, method, NEAR)
    missed = len(study.seeds) - len(reached)
    note = f" ({missed} of {len(study.seeds)} seeds never)" if missed else ""
    return spread(reached.values(), 1) + note
