"""The page of a study of exact worlds: tables with intervals, and what they say of the claims."""

from __future__ import annotations

import math

from rich.console import Console
from rich.text import Text

from dpo.atomic import write_text
from dpo.report.exact_claims import claims_table
from dpo.report.exact_figures import data_figure, frontier_figure, time_figure
from dpo.report.exact_study import COVERAGE, DPO, MAX_KL, PAIRS, ExactStudy, mean, write_tables
from dpo.report.exact_tables import (
    NEAR,
    best_of_table,
    beta_table,
    cost_table,
    difference_table,
    effect_table,
    final_table,
    frontier_table,
    rate_table,
    reward_model_table,
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


def write_exact_study(study: ExactStudy) -> None:
    """table.csv, policies.csv, figures/ and README.md in the study's folder; the frontiers on the
    screen.
    """
    write_tables(study)
    figures = study.folder / "figures"
    frontier_figure(study, figures / "frontier")
    data_figure(study, figures / "data")
    time_figure(study, figures / "time")
    found = tables(study)
    save_tables(study.folder, found)
    write_text(study.folder / "README.md", page(study))
    console = Console()
    console.print(on_screen(f"Frontiers, {seeds_in_words(study.seeds)}", found["frontier"]))
    console.print(Text(f"Page: {study.folder / 'README.md'}"))


def tables(study: ExactStudy) -> Tables:
    """The page's tables by name, and single numbers of what was done."""
    return {
        "facts": facts(study),
        "claims": claims_table(study),
        "frontier": frontier_table(study),
        "differences": difference_table(study),
        "final": final_table(study),
        "best of n": best_of_table(study),
        "pairs": effect_table(study, PAIRS, "pairs"),
        "coverage": effect_table(study, COVERAGE, "share of the responses"),
        "beta": beta_table(study),
        "reward model": reward_model_table(study),
        "learning rate": rate_table(study),
        "cost": cost_table(study),
    }


def facts(study: ExactStudy) -> list[Cells]:
    """Of the reference and the pairs."""
    entropy = mean([seed.reference_entropy for seed in study.seeds])
    return [
        ["fact", "value"],
        ["reference entropy", f"{entropy:.2f}"],
        ["largest entropy", f"{math.log(4096):.2f}"],
        ["reference reward", spread([seed.reference_reward for seed in study.seeds])],
        ["coverage", spread([row.measured.coverage for row in study.at_beta(DPO)])],
    ]


def page(study: ExactStudy) -> str:
    """The study as Markdown."""
    found = tables(study)
    parts = [
        f"# DPO and RLHF where the optimum is known: {study.folder.name}",
        what_was_done(study),
        "## The claims",
        CLAIMS_NOTE,
        markdown(found["claims"]),
        "## Frontiers",
        FRONTIER_NOTE,
        markdown(found["frontier"]),
        "![Reward against KL, and efficiency against KL](figures/frontier.svg)",
        "Differences, seed by seed:",
        markdown(found["differences"]),
        "## Where each method ends",
        markdown(found["final"]),
        FINAL_NOTE,
        "**Best-of-n by the true reward**: its exact KL, and the bound often taken for it:",
        markdown(found["best of n"]),
        "## What decides the order",
        *decisions(study, found),
        "## What it costs",
        markdown(found["cost"]),
        COST_NOTE,
        "![Share of the gain against seconds](figures/time.svg)",
        *_diverged(study),
        "## What this does not show",
        WHAT_IT_DOES_NOT_SHOW,
        "`table.csv` has every final policy with its intervals, `policies.csv` every policy of "
        "every seed, `study.json` the configuration and the environment.",
    ]
    return "\n\n".join(parts) + "\n"


def what_was_done(study: ExactStudy) -> str:
    """World, data and training in three paragraphs, from the settings."""
    config = study.config
    seeds, ppo, offline = config["seeds"], config["ppo"], config["offline"]
    known = dict(facts(study))
    return (
        "Sixteen prompts (praise or criticise one of eight topics), and as responses all 4,096 "
        "sequences of four of eight words, with a known reward: sentiment with negation and "
        "intensifiers, less repetitions. So the optimal policy π*, KL, expected reward and win "
        "rate are *computed* for every policy, not sampled. The policy is a GPT-2 of two layers "
        "and width 64.\n\n"
        f"For each seed ({', '.join(map(str, seeds))}) a fresh GPT-2 imitated "
        f"{config['demonstrations']:,} demonstrations and became the reference (entropy "
        f"{known['reference entropy']} nats of {known['largest entropy']}). A Bradley-Terry judge "
        f"of the true reward labelled {config['pairs']:,} pairs of its responses, in which occurs "
        f"{known['coverage']} of its probability. Every method starts from the reference: those "
        f"on pairs take {offline['steps']} steps of {offline['batch_size']} pairs at rate "
        f"{offline['learning_rate']:g}; the reward model {config['reward_model']['steps']} steps; "
        f"PPO {ppo['rounds']} rounds of {ppo['rollouts']} responses, {ppo['epochs']} passes; "
        f"online DPO draws {config['online']['pairs_per_round']} pairs a round from the policy "
        f"and passes {config['online']['passes']} times over them. All rates fall linearly to 0."
        "\n\n"
        "Numbers are means over seeds with Student's 95% interval over seeds in brackets."
    )


CLAIMS_NOTE = """\
"Simpler, faster, more stable than PPO", and a better frontier "even when PPO has the true reward"
(Rafailov et al. 2023, Section 6.1): each as a difference or ratio between methods that share seed,
reference and data. PPO on the true reward is told numbers where DPO is told which of two is better.
*Holds* and *does not hold*: the interval lies on one side. *Open*: it does not, which is no proof
of equality."""

FRONTIER_NOTE = f"""\
A method's frontier is what it would reach at a KL if its strength were tuned for it: its efficiency
(reward gained, as a share of what π* gains at the same KL) is interpolated between its strengths,
at the end of training. Below the smallest KL efficiency stays, beyond the largest the reward does.
Area: between the frontier and the reference's reward up to {MAX_KL:g} nats, as a share of that of
π*."""

FINAL_NOTE = """\
Efficiency: reward gained over the reference, as a share of what π* gains at the same KL. Gain:
share of the possible gain of `E r - beta KL` at the method's own beta. KL(policy ‖ π*): to the
optimum of the same beta. Total variation: to the same; for IPO, unlikelihood, preferred-FT and
best-of-n, whose strength is no beta, to the optimum of the same KL. Win rate: against the
reference, by the Bradley-Terry judge. Correlation: of log(policy / reference) with the true reward,
within prompts. The reward model solved exactly is π* of what the reward model says: PPO without
error of optimisation."""

COST_NOTE = f"""\
Seconds: processor time of training on one thread, at the study's beta, the reward model's
included. To {NEAR:.0%} of the gain: until the first checkpoint that has this share of the possible
gain of the objective.
Memory: float32 weights of all models at hand, and for those in training a gradient and the two
moments of AdamW. Labels are comparisons of two responses, rewards are true rewards of single ones.
Settings: numbers to choose. The reference's and the reward model's values of all responses are
computed once here, which is cheaper than with real models; sampling is not."""

WHAT_IT_DOES_NOT_SHOW = """\
- The judge follows Bradley-Terry exactly, as DPO and the reward model assume.
- Nobody who has only the labels can tune a strength to a KL and see the true reward there. Beyond
  the KL of the greedy policy (about 5 nats) efficiency is high by itself.
- Steps, learning rates and the size of online DPO's rounds were chosen by hand, in a few trials
  with seed 0; the effect of the rate is in a table above. Strengths, online DPO's rounds and the
  way in which strengths are joined to a frontier were changed after a first run on seeds 1 to 5;
  later seeds are fresh.
- Responses have four words, models 0.1 million parameters. Sampling is cheap here and generation is
  most of PPO's cost in large models; capacity is ample, so that approximation errors of small
  policies are not in these numbers.
- The intervals are over seeds: weights, demonstrations, pairs, order. The language is one."""


def decisions(study: ExactStudy, found: Tables) -> list[str]:
    """What was varied by itself: beta, pairs, coverage, reward model, learning rate."""
    beta = f"{study.beta:g}"
    return [
        f"**Number of pairs** (DPO, beta {beta}):",
        markdown(found["pairs"]),
        f"**Coverage** (DPO, beta {beta}, {study.config['pairs']:,} pairs drawn from a random part "
        "of the responses; 1 is all of them). Error: of the implicit reward, on responses that "
        "occur in the pairs and on those that do not:",
        markdown(found["coverage"]),
        "**beta.** The smaller beta, the further the optimum is from where the pairs were drawn, "
        "and the more errors of the implicit reward cost (they are divided by beta):",
        markdown(found["beta"]),
        "![DPO: KL to the optimum against pairs; error of the implicit reward](figures/data.svg)",
        "**Fit of the reward model** (by its number of pairs, each with the same number of steps; "
        "gain of its exact solution, without PPO's own errors):",
        markdown(found["reward model"]),
        f"**Learning rate** (gain at beta {beta}, the rate multiplied by that factor):",
        markdown(found["learning rate"]),
    ]


def _diverged(study: ExactStudy) -> list[str]:
    said = [f"- seed {seed.seed}, {text}" for seed in study.seeds for text in seed.diverged]
    return ["## Trials that diverged", "\n".join(said)] if said else []
