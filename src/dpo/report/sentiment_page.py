"""The page of the sentiment study. It shows no text of a review or of a model, only numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from dpo.atomic import write_text
from dpo.core.frontier import reward_at_kl
from dpo.core.stats import mean_interval, wilson_interval
from dpo.report.exact_study import DPO, FIXED_KLS, MAX_KL, ONLINE_DPO, PPO_RM, PPO_TRUE, mean
from dpo.report.frontier_claims import claims_table, nats
from dpo.report.frontier_page import (
    STRENGTHS,
    best_of_table,
    cost_table,
    diverged_runs,
    reward_model_table,
    stability_table,
    write_table,
)
from dpo.report.frontier_study import (
    SMALLEST_KL,
    TRAINED,
    FrontierStudy,
    RunResult,
    by_strength,
    efficiencies,
    highest_rewards,
    mean_gains,
    points,
    rewards_at,
)
from dpo.report.sentiment_figures import NORMAL_95, plane_figure
from dpo.report.tables import Cells, Tables, markdown, on_screen, save_tables, spread


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many of so many labelled texts the sign of the reward tells."""

    right: int
    total: int

    def __str__(self) -> str:
        low, high = wilson_interval(self.right, self.total)
        return f"{self.right / self.total:.1%} [{low:.1%}, {high:.1%}] of {self.total:,}"


@dataclass(frozen=True, slots=True)
class SentimentFacts:
    """What the study says besides the runs."""

    reviews: dict[str, int]
    """In each part."""
    passages: tuple[int, ...]
    """To train on, and held out."""
    of_reviews: Accuracy
    """Of the reward, on held-out reviews."""
    of_passages: Accuracy
    """On their passages, each with the label of its review."""
    model: str | None
    """Where SFT starts; None: random weights."""
    num_parameters: int
    vocab_size: int
    sft_loss: list[float]
    """Of the held-out passages, nats a token; one a seed."""
    num_pairs: list[int]
    """To train on; one a seed."""


def write_sentiment_study(study: FrontierStudy, facts: SentimentFacts) -> None:
    """table.csv, figures/ and README.md in the study's folder; the frontiers on the screen."""
    write_table(study, study.folder / "table.csv")
    plane_figure(study, study.folder / "figures" / "frontier")
    found = tables(study, facts)
    save_tables(study.folder, found)
    write_text(study.folder / "README.md", page(study, facts))
    console = Console()
    console.print(on_screen("Reward at a KL from the SFT model", found["frontier"]))
    console.print(Text(f"Page: {study.folder / 'README.md'}"))


def tables(study: FrontierStudy, facts: SentimentFacts) -> Tables:
    """The page's tables by name, and single numbers of what was done."""
    return {
        "facts": [
            ["fact", "value"],
            ["held-out prefixes", str(study.num_questions)],
            ["parameters, millions", f"{facts.num_parameters / 1e6:.1f}"],
            ["reward right on reviews", str(facts.of_reviews)],
            ["reward right on passages", str(facts.of_passages)],
            ["SFT loss", spread(facts.sft_loss)],
            ["pairs", ", ".join(f"{n:,}" for n in facts.num_pairs)],
            ["standard error of a reward", f"{_typical_error(study):.2f}"],
        ],
        "frontier": plane_table(study),
        **({"differences": differences_table(study)} if DPO in study.methods() else {}),
        **({"claims": claims_table(study)} if len(study.seeds) > 1 else {}),
        "final": final_table(study),
        "best of n": best_of_table(study),
        "reward model": reward_model_table(study, unit="prefixes", pairs="pairs"),
        **({"stability": stability_table(study)} if len(study.seeds) > 1 else {}),
        "cost": cost_table(study),
    }


def page(study: FrontierStudy, facts: SentimentFacts) -> str:
    """The study as Markdown."""
    found = tables(study, facts)
    parts = [
        f"# Sentiment of reviews, reward against KL: {study.folder.name}",
        "The controlled experiment of the DPO paper (Rafailov et al. 2023, Section 6.1) on human "
        "text: prompts are the first words of reviews, the reward is what a sentiment classifier "
        "says of how a policy goes on, and every method starts from the same SFT model.",
        _model(study, facts),
        what_was_done(study, facts),
        "## The reward",
        _reward(study, facts),
        "## Reward against KL",
        "![Reward against KL](figures/frontier.svg)",
        markdown(found["frontier"]),
        _plane_note(study),
        *_differences(study, found),
        "## Where each method ends",
        markdown(found["final"]),
        _final_note(study),
        *diverged_runs(study),
        "## Best-of-n",
        markdown(found["best of n"]),
        BEST_OF_NOTE,
        "## The reward model",
        markdown(found["reward model"]),
        *_stability(found),
        "## Cost",
        markdown(found["cost"]),
        COST_NOTE,
        "## What this does not show",
        _limits(facts),
        "`table.csv` has every policy at the end of its training, `figures/frontier.csv` every "
        "policy on the way, `study.json` the configuration and the environment.",
    ]
    return "\n\n".join(parts) + "\n"


def _model(study: FrontierStudy, facts: SentimentFacts) -> str:
    size = f"{facts.num_parameters / 1e6:.1f} million parameters"
    loss = spread(facts.sft_loss)
    sft = f"After SFT its loss on held-out passages is {loss} nats a token."
    if facts.model is not None:
        return f"**The model** is `{facts.model}`, {size}. {sft}"
    return (
        f"**The model** is a small GPT-2 from random weights, {size}, with a tokenizer of "
        f"{facts.vocab_size:,} entries learnt from the same reviews. It has read nothing else: it "
        f"writes in the manner of reviews without making much sense. {sft}"
    )


def what_was_done(study: FrontierStudy, facts: SentimentFacts) -> str:
    """Data and budgets, from the settings."""
    config = study.config
    data, pairs, budget, measure = (config[k] for k in ("data", "pairs", "budget", "measure"))
    fewest, most = data["prefix_words"]
    labels = (
        "the higher reward is chosen"
        if pairs["labels"] == "hard"
        else "the chosen one is drawn with probability sigmoid of the rewards' difference"
    )
    many = pairs["samples"]
    return (
        f"**Data.** Reviews are split by a hash of their text: {facts.reviews['classifier']:,} for "
        f"the classifier, {facts.reviews['model']:,} for the model and its prompts, "
        f"{facts.reviews['held_out']:,} held out. They are cut into passages of whole sentences, "
        f"at most {data['passage_words']} words: {facts.passages[0]:,} to train on, "
        f"{facts.passages[1]:,} held out. A prompt is the first {fewest} to {most} words of a "
        "passage; no held-out prompt is a training prompt.\n\n"
        f"**Preferences.** {many} samples of the SFT model for each of {pairs['prefixes']:,} "
        f"prefixes at most, {many * (many - 1) // 2} pairs a prefix, {labels}: "
        f"{', '.join(f'{n:,}' for n in facts.num_pairs)} pairs. DPO, preferred-FT, unlikelihood "
        f"and the reward model take {budget['steps']} gradient steps of "
        f"{budget['pairs_per_step']} pairs; PPO (and online DPO) samples from the same prefixes. "
        f"{_sampled(study)}\n\n"
        f"**Measured** on {study.num_questions} held-out prefixes, {measure['samples']} samples to "
        "each at temperature 1: the reward, and the KL to the SFT model by the exact divergence "
        "of next-token distributions along the policy's own samples. " + _errors(study)
    )


def _sampled(study: FrontierStudy) -> str:
    parts = []
    for method in (PPO_RM, PPO_TRUE, ONLINE_DPO):
        costs = [run.cost for run in study.runs(method) if run.cost is not None]
        if costs:
            steps, drawn = costs[0].steps, costs[0].responses
            of_pairs = ", the pairs' included" if costs[0].reward_model_seconds else ""
            parts.append(f"{method}: {steps} gradient steps on {drawn:,} samples{of_pairs}")
    return f"{'; '.join(parts)}." if parts else ""


def _errors(study: FrontierStudy) -> str:
    if len(study.seeds) == 1:
        return (
            "One seed: what follows ± is the standard error over prefixes, and what another SFT "
            "model would change is not in it."
        )
    return (
        f"Means over {len(study.seeds)} seeds with Student's 95% interval over seeds in brackets; "
        "what follows ± is the mean standard error over prefixes."
    )


def _reward(study: FrontierStudy, facts: SentimentFacts) -> str:
    reward = study.config["reward"]
    if reward["model"] is None:
        what = (
            'The true reward is the log-odds of "positive" of a logistic regression on TF-IDF of '
            "words, fitted on passages of the classifier's part, each with the label of its "
            "review. It counts words and knows no grammar, so that a policy can please it with "
            "words alone; the KL says how far it went for that."
        )
    else:
        label = f' of "{reward["label"]}"' if reward["label"] else ""
        what = f"The true reward is the log-odds{label} of the classifier `{reward['model']}`."
    reference = spread([seed.reference_reward for seed in study.seeds])
    return (
        f"{what} On held-out labels its sign is right for {facts.of_reviews} reviews and for "
        f"{facts.of_passages} single passages, many of which say nothing of the verdict (95%, "
        f"Wilson). Its mean on the SFT model's samples is {reference}."
    )


# -- tables: the first line is the head ----------------------------------------------------------


def plane_table(study: FrontierStudy) -> list[Cells]:
    """Reward at fixed KL, mean gain up to `MAX_KL`, and the highest reward, a line a method."""
    known = [kl if kl <= study.known_kl else None for kl in FIXED_KLS]
    optimum = [
        "" if kl is None else spread([reward_at_kl(s.curve, kl) for s in study.seeds])
        for kl in known
    ]
    start = spread([s.reference_reward for s in study.seeds])
    lines = [
        [
            "method",
            *(f"reward at {nats(kl)}" for kl in FIXED_KLS),
            f"mean gain up to {MAX_KL:g} nats",
            "highest reward",
            "furthest KL",
        ],
        ["optimum, estimated", *optimum, "", "", ""],
        ["SFT", start, start, start, "0", start, "0"],
    ]
    for method in study.methods():
        own = [seed for seed in study.seeds if points(seed, method)]
        lines.append(
            [
                method,
                *(spread(rewards_at(study, method, kl).values()) for kl in FIXED_KLS),
                spread(mean_gains(study, method).values()),
                spread(highest_rewards(study, method).values()),
                f"{mean([max(p.kl for p in points(seed, method)) for seed in own]):.1f}",
            ]
        )
    return lines


def _plane_note(study: FrontierStudy) -> str:
    samples = study.config["measure"]["reference_samples"]
    error = _typical_error(study)
    return (
        "A method's frontier is the concave hull of the SFT model and all its policies, over "
        "strengths and along training, level beyond the furthest: what one reaches who picks the "
        "best of them. It takes the luckiest measurements, so that it is a little too high for "
        f"every trained method, by a part of their standard error ({error:.2f}). The optimum is "
        f"known from {samples} samples of the SFT model a prefix, up to {study.known_kl:.1f} nats: "
        "beyond, too few samples carry the weight."
    )


def differences_table(study: FrontierStudy) -> list[Cells]:
    """DPO's frontier against the others'."""
    lines = [["DPO minus", *(f"reward at {nats(kl)}" for kl in FIXED_KLS)]]
    for other in study.methods():
        if other != DPO:
            cells = [_difference(study, other, kl) for kl in FIXED_KLS]
            lines.append([other, *(f"{mean(c.values):+.2f} {c}" for c in cells)])
    return lines


def _differences(study: FrontierStudy, found: Tables) -> list[str]:
    """DPO's frontier against the others', and what that says of the paper's claim."""
    if "differences" not in found:
        return []
    how = (
        "Differences, seed by seed, with Student's 95% interval:"
        if len(study.seeds) > 1
        else "Differences. One seed: the interval is 95% by the standard errors over prefixes of "
        "two policies as if they had nothing in common, though all are measured on the same "
        "prefixes and random numbers."
    )
    claims = [markdown(found["claims"])] if "claims" in found else []
    return [how, markdown(found["differences"]), *_claim(study), *claims]


@dataclass(frozen=True, slots=True)
class Difference:
    """DPO's reward less another method's, one value a seed, and its interval."""

    values: list[float]
    low: float
    high: float

    def __str__(self) -> str:
        return f"[{self.low:+.2f}, {self.high:+.2f}]"

    @property
    def verdict(self) -> str:
        return "above" if self.low > 0 else "below" if self.high < 0 else "not told apart"


def _difference(study: FrontierStudy, other: str, kl: float) -> Difference:
    own, theirs = rewards_at(study, DPO, kl), rewards_at(study, other, kl)
    values = [own[seed] - theirs[seed] for seed in own if seed in theirs]
    if len(values) > 1:
        return Difference(values, *mean_interval(values))
    half = NORMAL_95 * math.sqrt(2) * _typical_error(study)
    return Difference(values, values[0] - half, values[0] + half)


def _typical_error(study: FrontierStudy) -> float:
    """Standard error of a measured reward, over prefixes."""
    return mean([run.last.reward_stderr for m in TRAINED for run in study.runs(m)])


def _claim(study: FrontierStudy) -> list[str]:
    """The paper's claim, answered by the differences."""
    rivals = [m for m in (PPO_TRUE, PPO_RM) if m in study.methods()]
    if not rivals:
        return []
    said = []
    for rival in rivals:
        verdicts = [f"{_difference(study, rival, kl).verdict} at {nats(kl)}" for kl in FIXED_KLS]
        said.append(f"- DPO against {rival}: {', '.join(verdicts)}.")
    return [
        "The paper finds DPO's reward the highest at every KL, above that of PPO with the true "
        "reward too. Here:",
        "\n".join(said),
    ]


def final_table(study: FrontierStudy) -> list[Cells]:
    """Every trained method at every strength, at the end of its training."""
    lines = [["method", "strength", "seeds", "KL", "reward", "efficiency"]]
    for method in TRAINED:
        for group in by_strength(study.runs(method)):
            lines.append(
                [
                    method,
                    f"{STRENGTHS[method]} {group[0].strength:g}",
                    str(len(group)),
                    _with_error(group, "kl"),
                    _with_error(group, "reward"),
                    spread(efficiencies(study, group)),
                ]
            )
    return lines


def _with_error(group: Sequence[RunResult], name: str) -> str:
    """Mean over seeds, and the mean standard error over prefixes."""
    values = spread([getattr(run.last, name) for run in group])
    return f"{values} ± {mean([getattr(run.last, f'{name}_stderr') for run in group]):.2f}"


def _final_note(study: FrontierStudy) -> str:
    return (
        "KL in nats a response. Efficiency: reward gained over the SFT model, as a share of what "
        f"the optimum gains at the same KL; left out below {SMALLEST_KL:g} nats and beyond "
        f"{study.known_kl:.1f}. The strength of preferred-FT is its learning rate, for it has no "
        "other."
    )


def _stability(found: Tables) -> list[str]:
    if "stability" not in found:
        return []
    return ["## Stability", markdown(found["stability"])]


BEST_OF_NOTE = """\
Rewards are unbiased: the mean over all subsets of n of the SFT model's samples. Hardly any two
samples score alike, so that the KL is close to the bound `log n - (n - 1)/n`; it is that of the
samples' own distribution, a little too low at large n. It costs n samples for each one given."""

COST_NOTE = """\
Means over strengths. Seconds: in training, the drawing of samples included and measuring left out.
Peak memory: of a process that does nothing but the run, or the reward model's training where that
is more; Python and its libraries are a part of it. Keys: settings that the configuration names
apart from model, data, folder, seed and measuring. The pairs cost their samples and the true
reward of each; PPO with the true reward asks for the true reward of every sample it draws."""


def _limits(facts: SentimentFacts) -> str:
    small = [
        "- The paper's model is GPT-2 large after SFT on IMDb, its reward a RoBERTa classifier, "
        "its prefixes 25,000; the numbers here are for this model, this reward and these reviews, "
        "and only the order of methods at equal KL can be compared."
    ]
    lines = [
        *(small if facts.model is None else []),
        "- A high reward far from the SFT model is no good review: the classifier stands in for a "
        "reader, and past some KL a policy writes for it alone.",
        "- Policies of a method are picked by their true reward when its frontier is drawn; nobody "
        "can do that who has only labels.",
        "- Budgets are short, and strengths and learning rates hardly tuned: a method whose thin "
        "line still rises at its end would go on with more steps or samples.",
        "- The intervals do not hold what other reviews, or another classifier, would change.",
    ]
    return "\n".join(lines)
