"""The page of a study of frontiers: tables with intervals, and what they do not show."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from dpo.atomic import write_text
from dpo.core.frontier import reward_at_kl
from dpo.core.stats import mean_interval
from dpo.report.exact_study import (
    BEST_OF_TRUE,
    DPO,
    FIXED_KLS,
    IPO,
    MAX_KL,
    ONLINE_DPO,
    PPO_RM,
    PPO_TRUE,
    PREFERRED_FT,
    UNLIKELIHOOD,
    mean,
)
from dpo.report.frontier_claims import answers, at_kl, claims_table, minus, nats
from dpo.report.frontier_figures import cost_figure, frontier_figure, shift_figure
from dpo.report.frontier_study import (
    SMALLEST_KL,
    TRAINED,
    BySeed,
    Cost,
    FrontierStudy,
    RunResult,
    ShiftResult,
    area_shares,
    by_strength,
    drops,
    efficiencies,
    highest_rewards,
    lowest_rewards,
    points,
    rewards_at,
    seconds,
)
from dpo.report.tables import (
    Cells,
    Tables,
    markdown,
    on_screen,
    save_tables,
    seeds_in_words,
    spread,
)

ON_SCREEN = 5
"""Columns that fit into a terminal."""


def write_frontier_study(study: FrontierStudy) -> None:
    """table.csv, figures/ and README.md in the study's folder; the frontiers on the screen."""
    write_table(study, study.folder / "table.csv")
    figures = study.folder / "figures"
    frontier_figure(study, figures / "frontier")
    cost_figure(study, figures / "cost")
    if any(seed.shift for seed in study.seeds):
        shift_figure(study, figures / "shift")
    found = tables(study)
    save_tables(study.folder, found)
    write_text(study.folder / "README.md", page(study))
    console = Console()
    narrow = [line[:ON_SCREEN] for line in found["frontier"]]
    console.print(on_screen(f"Frontiers, {seeds_in_words(study.seeds)}", narrow))
    console.print(Text(f"Page: {study.folder / 'README.md'}"))


def write_table(study: FrontierStudy, file: Path) -> None:
    """Every policy at the end of its training, seed by seed: what the page's tables are made of."""
    lines = []
    for seed in study.seeds:
        for run in seed.runs:
            (found,) = efficiencies(study, [run]) if run.trail and not run.diverged else (None,)
            line: dict[str, Any] = {
                "seed": run.seed,
                "method": run.method,
                "strength": run.strength,
                "diverged": run.diverged,
            }
            if run.trail and not run.diverged:
                last = run.last
                line |= {name: getattr(last, name) for name in MEASURED} | {"efficiency": found}
            if run.cost is not None:
                line |= {name: getattr(run.cost, name) for name in COSTS}
            lines.append(line)
    header = ["seed", "method", "strength", *MEASURED, "efficiency", *COSTS, "diverged"]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(file, stream.getvalue())


MEASURED = ("step", "kl", "kl_stderr", "reward", "reward_stderr")
COSTS = tuple(Cost.__dataclass_fields__)


def tables(study: FrontierStudy) -> Tables:
    """The page's tables by name, and single numbers of what was done."""
    shift = [row for seed in study.seeds for row in seed.shift]
    return {
        "facts": facts(study),
        "claims": claims_table(study),
        "frontier": frontier_table(study),
        "differences": difference_table(study),
        "final": final_table(study),
        "best of n": best_of_table(study),
        "reward model": reward_model_table(study),
        "stability": stability_table(study),
        "cost": cost_table(study),
        **({"shift": shift_table(shift)} if shift else {}),
    }


def facts(study: FrontierStudy) -> list[Cells]:
    """Of what everything was measured on, and how well."""
    return [
        ["fact", "value"],
        ["held-out questions", str(study.num_questions)],
        ["standard error of a reward", f"{_typical_error(study):.2f}"],
        ["diverged runs", str(sum(len(study.diverged(method)) for method in TRAINED))],
    ]


def page(study: FrontierStudy) -> str:
    """The study as Markdown."""
    found = tables(study)
    parts = [
        f"# Reward against KL, DPO and its rivals: {study.folder.name}",
        what_was_done(study),
        "## Simpler, faster, more stable, and a better frontier?",
        *answers(study),
        CLAIMS_NOTE,
        markdown(found["claims"]),
        "## Frontiers",
        "![True reward against KL](figures/frontier.svg)",
        markdown(found["frontier"]),
        _frontier_note(study),
        "Differences, seed by seed:",
        markdown(found["differences"]),
        "## Where each method ends",
        markdown(found["final"]),
        FINAL_NOTE,
        "## Best-of-n",
        markdown(found["best of n"]),
        BEST_OF_NOTE,
        "## The reward model",
        markdown(found["reward model"]),
        "## Stability",
        markdown(found["stability"]),
        STABILITY_NOTE,
        *diverged_runs(study),
        "## Cost",
        markdown(found["cost"]),
        _cost_note(study),
        "![Area under the frontier against seconds](figures/cost.svg)",
        *_shift(study),
        "## What this does not show",
        WHAT_IT_DOES_NOT_SHOW,
        "`table.csv` has every policy at the end of its training, `figures/frontier.csv` every "
        "policy on the way, `study.json` the configuration and the environment.",
    ]
    return "\n\n".join(parts) + "\n"


def what_was_done(study: FrontierStudy) -> str:
    """World, data and budgets, from the settings."""
    config = study.config
    seeds, budget = ", ".join(map(str, config["seeds"])), config["budget"]
    return (
        "A small GPT-2 (242,000 parameters) answers questions freely, in words of its own "
        "tokenizer, up to 48 tokens. The reward is known: right, polite, and nothing foreign "
        f"(from -4 to 3). For each seed ({seeds}) it learnt to answer by SFT, gave "
        f"{2 * config['pairs_per_question']} answers to every question, and a Bradley-Terry judge "
        "of the true reward labelled them, two by two. DPO, IPO, preferred-FT, unlikelihood and "
        "the reward model are trained on these pairs; PPO and online DPO sample answers to the "
        "same training questions. All start from the SFT model, which is their reference.\n\n"
        f"A policy on pairs takes {budget['steps']} gradient steps of {budget['pairs_per_step']} "
        f"pairs. {_budgets(study)} Everything is measured on the same {study.num_questions} "
        f"held-out questions, {config['samples_per_question']} answers to each at temperature 1, "
        f"{config['evaluations']} times during training: the true reward, and the KL to the SFT "
        "model by the exact divergence of next-token distributions along the policy's own answers. "
        "Learning rates and strengths were chosen in trials with another seed, which is not among "
        "these.\n\n"
        "**The optimum.** π*/π_SFT depends on an answer through its reward alone, so the most "
        "reward at each KL is known from how the reward is distributed under the SFT model: "
        f"{config['optimum_samples']} samples a question. Its standard error of sampling is "
        f"{_curve_errors(study)}. A measured policy can lie above it by its own sampling error "
        f"(about {_typical_error(study):.2f}).\n\n"
        "Numbers are means over seeds with Student's 95% interval over seeds in brackets."
    )


def _budgets(study: FrontierStudy) -> str:
    """Gradient steps and samples of those that sample, as their runs had them."""
    parts = []
    for method in (PPO_RM, PPO_TRUE, ONLINE_DPO):
        costs = [run.cost for run in study.runs(method) if run.cost is not None]
        if costs:
            steps, drawn = costs[0].steps, costs[0].responses
            parts.append(f"{method}: {steps} gradient steps on {drawn:,} sampled answers")
    return f"{'; '.join(parts)}." if parts else ""


def _curve_errors(study: FrontierStudy) -> str:
    errors = [mean([s.curve_stderr[i] for s in study.seeds]) for i in range(len(FIXED_KLS))]
    return ", ".join(
        f"{error:.3f} at {nats(kl)}" for kl, error in zip(FIXED_KLS, errors, strict=True)
    )


def _typical_error(study: FrontierStudy) -> float:
    errors = [run.last.reward_stderr for m in TRAINED for run in study.runs(m)]
    return mean(errors) if errors else math.nan


CLAIMS_NOTE = """\
"Simpler, faster, more stable than PPO", and a better frontier "even when PPO has access to the true
rewards" (Rafailov et al. 2023, Section 6.1). Each claim as a difference or ratio between methods
that share seed, SFT model, pairs and questions. *Holds* and *does not hold*: the 95% interval lies
on one side. *Open*: it does not, which is no proof of equality."""


def _frontier_note(study: FrontierStudy) -> str:
    return (
        "A method's frontier is the concave hull of the SFT model and all its policies, over "
        "strengths and along training: what one reaches who picks the best of them, or mixes two; "
        "beyond a method's furthest policy it is level. Area: between the hull and the SFT model's "
        f"reward up to {MAX_KL:g} nats, as a share of the optimum's. The hull takes the luckiest "
        "of its measurements, so that it is a little too high for every trained method, by a part "
        f"of their standard error ({_typical_error(study):.2f})."
    )


FINAL_NOTE = f"""\
Efficiency: reward gained over the SFT model, as a share of what the optimum gains at the same KL;
left out below {SMALLEST_KL:g} nats. KL in nats a response."""

BEST_OF_NOTE = """\
Rewards are unbiased: the mean over all subsets of n of the SFT model's samples. The KL is that of
the samples' own distribution; the bound `log n - (n - 1)/n` is only reached where no two answers
score alike, and the true reward takes few values. With the reward model the KL is estimated a
little too low at large n, for the samples are finite. The figure and the frontiers use the KL, not
the bound. It costs n answers for each one that is given."""

STABILITY_NOTE = """\
Spread: standard deviation over seeds at a strength, the mean over strengths. Drop: reward lost at
the end against the best evaluation of the same run (some of it is the luck of that evaluation, for
all methods alike). Worst: reward at the end at the method's worst strength."""

WHAT_IT_DOES_NOT_SHOW = """\
- The judge follows Bradley-Terry exactly, as DPO and the reward model assume.
- Policies of a method are picked by their true reward when its frontier is drawn; nobody can do
  that who has only labels.
- Settings were chosen by hand in trials with one other seed, and not with equal care: three
  learning rates for DPO, two schedules for PPO with the true reward (whose settings PPO with the
  reward model took over), two rates for the reward model, one for IPO, none for preferred-FT and
  unlikelihood; online DPO was tried with four samples a question and has two. Somebody who tunes
  one of them longer will find it better.
- Policies stop at different KL. Beyond a method's furthest policy its frontier is level, so a
  reward at 2 or 4 nats compares a policy that went there with one that did not.
- The models have 0.2 million parameters and answers 48 tokens at most. Sampling is cheap here, and
  it is most of PPO's cost in large models.
- The intervals are over seeds: weights, demonstrations, pairs, order. The language is one, and so
  are its held-out questions."""


def _cost_note(study: FrontierStudy) -> str:
    drawn = [run.cost.responses for run in study.runs(DPO) if run.cost is not None]
    pairs = f"{mean(drawn) / 2:,.0f}" if drawn else "the"
    return (
        "Means over strengths. Seconds: in training on one thread, "
        f"{study.config['processes']} runs at a time, the drawing of samples included and "
        "measuring left out. Peak memory: of a process that does nothing but the run (Python and "
        "its libraries are most of it, for the models are tiny), or the reward model's training "
        "where that is more. Keys: settings that the configuration names apart from model, data, "
        "folder, seed and measuring; the reward model's are counted too. Answers: two for each "
        f"pair; {pairs} pairs had to be labelled. PPO with the true reward needs no labels, but "
        "the true reward of every answer that it samples, which nobody has in practice."
    )


# -- tables: the first line is the head ----------------------------------------------------------


def frontier_table(study: FrontierStudy) -> list[Cells]:
    """Area, reward at fixed KL and the highest reward, a line a method."""
    optimum = [spread([reward_at_kl(s.curve, kl) for s in study.seeds]) for kl in FIXED_KLS]
    best = spread([seed.curve[-1].reward for seed in study.seeds])
    lines = [
        [
            "method",
            "area, share of the optimum's",
            *(f"reward at {nats(kl)}" for kl in FIXED_KLS),
            "highest reward",
            "furthest KL",
        ],
        ["optimum", "1", *optimum, best, ""],
        ["SFT", "0", *[spread([s.reference_reward for s in study.seeds])] * 4, "0"],
    ]
    for method in study.methods():
        furthest = [max(p.kl for p in points(s, method)) for s in study.seeds if points(s, method)]
        lines.append(
            [
                method,
                spread(area_shares(study, method).values(), 3),
                *(spread(rewards_at(study, method, kl).values()) for kl in FIXED_KLS),
                spread(highest_rewards(study, method).values()),
                f"{mean(furthest):.1f}",
            ]
        )
    return lines


COMPARISONS = (
    (DPO, PPO_RM),
    (DPO, PPO_TRUE),
    (DPO, ONLINE_DPO),
    (PPO_TRUE, PPO_RM),
    (ONLINE_DPO, PPO_RM),
    (DPO, IPO),
    (DPO, BEST_OF_TRUE),
)


def difference_table(study: FrontierStudy) -> list[Cells]:
    """Frontiers against each other, paired by seed."""
    known = study.methods()
    lines = [
        [
            "first minus second",
            "area share",
            *(f"reward at {nats(kl)}" for kl in FIXED_KLS),
            "highest reward",
        ]
    ]
    for first, second in COMPARISONS:
        if first in known and second in known:
            measures: list[Callable[[FrontierStudy, str], BySeed]] = [
                area_shares,
                *(at_kl(kl) for kl in FIXED_KLS),
                highest_rewards,
            ]
            cells = [spread(minus(study, m, first, second), 3, signed=True) for m in measures]
            lines.append([f"{first} - {second}", *cells])
    return lines


def final_table(study: FrontierStudy) -> list[Cells]:
    """Every trained method at every strength, at the end of its training."""
    lines = [["method", "strength", "seeds", "KL", "true reward", "efficiency"]]
    for method in TRAINED:
        for group in by_strength(study.runs(method)):
            strength = group[0].strength
            lines.append(
                [
                    method,
                    "" if strength is None else f"{STRENGTHS[method]} {strength:g}",
                    str(len(group)),
                    spread([run.last.kl for run in group]),
                    spread([run.last.reward for run in group]),
                    spread(efficiencies(study, group), 2),
                ]
            )
    return lines


STRENGTHS = dict.fromkeys(TRAINED, "beta") | {
    IPO: "tau",
    PREFERRED_FT: "learning rate",
    UNLIKELIHOOD: "alpha",
    PPO_RM: "KL coefficient",
    PPO_TRUE: "KL coefficient",
}
"""What a method's strength is called."""


def best_of_table(study: FrontierStudy) -> list[Cells]:
    """Both best-of-n, by n."""
    names = list(study.seeds[0].best_of)
    head = ["n", "KL at most"]
    lines = [[*head, *(f"{name}: {what}" for name in names for what in ("KL", "reward"))]]
    for i, one in enumerate(study.seeds[0].best_of[names[0]]):
        cells = [str(one.n), f"{one.kl_bound:.2f}"]
        for name in names:
            found = [seed.best_of[name][i] for seed in study.seeds]
            cells += [spread([b.kl for b in found]), spread([b.reward for b in found])]
        lines.append(cells)
    return lines


def reward_model_table(
    study: FrontierStudy, *, unit: str = "questions", pairs: str = "labelled pairs"
) -> list[Cells]:
    """How well the reward model fits what it was trained for, and what it should be.

    Args:
        unit, pairs: what prompts and the held-out pairs are called.
    """
    fits = [seed.reward_model for seed in study.seeds]
    return [
        [f"on held-out {unit}", "reward model", "true reward"],
        [
            f"accuracy on {pairs}",
            spread([fit.accuracy for fit in fits], 3),
            spread([fit.label_accuracy for fit in fits], 3),
        ],
        [
            f"correlation with the true reward, within {unit}",
            spread([fit.correlation for fit in fits], 3),
            "1",
        ],
    ]


def stability_table(study: FrontierStudy) -> list[Cells]:
    """Spread over seeds, over-optimisation, the worst strength, and runs that diverged."""
    lines = [
        [
            "method",
            "runs",
            "diverged",
            "spread of the reward over seeds",
            "spread of the KL, share of its mean",
            "drop from the best evaluation",
            "worst strength's reward",
        ]
    ]
    for method in TRAINED:
        runs, failed = study.runs(method), study.diverged(method)
        if runs or failed:
            lines.append(
                [
                    method,
                    str(len(runs) + len(failed)),
                    str(len(failed)),
                    _deviation(runs, lambda run: run.last.reward),
                    _deviation(runs, lambda run: run.last.kl, relative=True),
                    spread(drops(study, method).values()),
                    spread(lowest_rewards(study, method).values()),
                ]
            )
    return lines


def _deviation(
    runs: Sequence[RunResult], value: Callable[[RunResult], float], *, relative: bool = False
) -> str:
    """Standard deviation over seeds, averaged over strengths; empty with one seed."""
    found = []
    for group in by_strength(runs):
        values = [value(run) for run in group]
        if len(values) > 1:
            centre = mean(values)
            deviation = math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1))
            found.append(deviation / centre if relative else deviation)
    return f"{mean(found):.2f}" if found else ""


def cost_table(study: FrontierStudy) -> list[Cells]:
    """What it takes to make a policy of each method."""
    lines = [
        [
            "method",
            "seconds",
            "of them reward model",
            "peak memory (MB)",
            "models in memory",
            "gradient steps",
            "answers sampled",
            "and for the reward model",
            "keys",
        ]
    ]
    for method in TRAINED:
        costs = [run.cost for run in study.runs(method) if run.cost is not None]
        if costs:
            models = study.models[method]
            of_model = mean([c.reward_model_seconds for c in costs])
            lines.append(
                [
                    method,
                    spread(seconds(study, method).values(), 1),
                    f"{of_model:.1f}" if of_model else "",
                    f"{mean([c.peak_memory_bytes for c in costs]) / 1e6:.0f}",
                    f"{len(models)}: {', '.join(models)}",
                    f"{mean([c.steps for c in costs]):.0f}",
                    f"{mean([c.responses for c in costs]):,.0f}",
                    f"{mean([c.reward_model_responses for c in costs]):,.0f}" if of_model else "",
                    f"{mean([c.keys for c in costs]):.0f}",
                ]
            )
    return lines


def diverged_runs(study: FrontierStudy) -> list[str]:
    """A part of the page for runs without a policy, with the sentence that each ended with."""
    said = [
        f"- {run.method}, {run.strength:g}, seed {run.seed}: {run.diverged}"
        for method in TRAINED
        for run in study.diverged(method)
    ]
    return ["### Runs that diverged", "\n".join(said)] if said else []


# -- distribution shift --------------------------------------------------------------------------


def _shift(study: FrontierStudy) -> list[str]:
    rows = [row for seed in study.seeds for row in seed.shift]
    if not rows:
        return []
    kinds = ", ".join(f"seed {s.seed}: {s.shift[0].kind}" for s in study.seeds if s.shift)
    return [
        "## Questions of a kind that the preferences leave out",
        "Pairs and reward model on three of the four kinds of questions, then measured on held-out "
        f"questions of the fourth ({kinds}), beside the same method whose preferences have all "
        "four. The SFT model has seen demonstrations of every kind, and the samples of PPO and "
        "online DPO answer questions of the three kinds only.",
        markdown(shift_table(rows)),
        shift_sentence(rows),
        "![Reward with and without the kind](figures/shift.svg)",
    ]


def shift_table(rows: Sequence[ShiftResult]) -> list[Cells]:
    """Reward and KL on the fourth kind and on the others, by what the preferences were on."""
    lines = [
        [
            "method",
            "measured on",
            "reward, preferences without the kind",
            "with it",
            "difference",
            "KL without",
            "KL with",
        ]
    ]
    for method in dict.fromkeys(row.method for row in rows):
        for on_kind in (True, False):
            own = [r for r in rows if r.method == method and r.on_kind == on_kind]
            without = {r.seed: r for r in own if r.without}
            with_it = {r.seed: r for r in own if not r.without}
            lines.append(
                [
                    method,
                    "the fourth kind" if on_kind else "the other three",
                    spread([r.reward for r in without.values()]),
                    spread([r.reward for r in with_it.values()]),
                    spread(_gaps(own), 2, signed=True),
                    spread([r.kl for r in without.values()]),
                    spread([r.kl for r in with_it.values()]),
                ]
            )
    return lines


def _gaps(rows: Iterable[ShiftResult]) -> list[float]:
    """Reward without the kind less reward with it, by seed."""
    both: dict[int, dict[bool, float]] = {}
    for row in rows:
        both.setdefault(row.seed, {})[row.without] = row.reward
    return [own[True] - own[False] for own in both.values() if len(own) == 2]


def shift_sentence(rows: Sequence[ShiftResult]) -> str:
    """What leaving the kind out costs on it, method by method."""
    parts = []
    for method in dict.fromkeys(row.method for row in rows):
        gaps = _gaps(r for r in rows if r.method == method and r.on_kind)
        if len(gaps) < 2:
            return "One seed: no interval."
        low, high = mean_interval(gaps)
        said = "loses" if high < 0 else "gains" if low > 0 else "neither clearly loses nor gains"
        parts.append(f"{method} {said} ({spread(gaps, 2, signed=True)})")
    return f"On the kind that the preferences left out: {'; '.join(parts)}."
