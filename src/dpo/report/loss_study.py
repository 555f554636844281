"""What a study of losses leaves: its table, its figure, and a page that says what they prove."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from dpo.atomic import write_text
from dpo.report.figures import KL_LABEL, Z_95
from dpo.report.style import (
    COLOURS,
    DOUBLE_COLUMN,
    MARKERS,
    MUTED,
    caption,
    label_points,
    new_figure,
    paper_style,
    plain,
    save_figure,
)
from dpo.report.tables import Tables, columns, on_screen, save_tables


@dataclass(frozen=True, slots=True)
class LossRow:
    """One line of the table: a loss over its seeds, the SFT model, or a response that knows
    nothing. Everything on held-out questions at temperature 1; None where it does not apply.
    """

    model: str
    kind: str
    """pair, list or unpaired; start: the SFT model; null: a response that knows nothing."""
    seeds: int
    """Runs that came to their end; the others are `failed`, and `said` has their sentences."""
    failed: int
    reward: float | None = None
    reward_low: float | None = None
    reward_high: float | None = None
    reward_lowest_seed: float | None = None
    reward_highest_seed: float | None = None
    reward_seeds_low: float | None = None
    reward_seeds_high: float | None = None
    right: float | None = None
    polite: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    kl_seeds_low: float | None = None
    kl_seeds_high: float | None = None
    win_rate: float | None = None
    win_rate_low: float | None = None
    win_rate_high: float | None = None
    accuracy: float | None = None
    chosen_change: float | None = None
    seconds: float | None = None
    difference: float | None = None
    """True reward less that of DPO, on the seeds that both finished."""
    difference_low: float | None = None
    difference_high: float | None = None
    seeds_above_dpo: int | None = None
    p: float | None = None
    p_holm: float | None = None
    said: str = ""


@dataclass(frozen=True, slots=True)
class LossStudy:
    """A finished study of losses."""

    folder: Path
    rows: list[LossRow]
    label_accuracy: float
    """Share of the held-out labels that the true reward itself gives."""
    num_questions: int
    config: dict[str, Any]


COLUMNS = (
    "model",
    "kind",
    "true reward",
    "over seeds",
    "minus DPO's",
    "Holm p",
    "right",
    "polite",
    "KL to SFT",
    "win rate",
    "accuracy",
    "log π(chosen), change",
    "seconds",
)

ON_SCREEN = ("model", "true reward", "Holm p", "right", "polite", "KL to SFT")
"""What fits into a terminal."""


def write_loss_study(study: LossStudy) -> None:
    """table.csv, figures/reward_kl and README.md in the study's folder, the table on the screen."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [f.name for f in fields(LossRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in study.rows)
    write_text(study.folder / "table.csv", stream.getvalue())
    loss_figure(study.rows, study.folder / "figures" / "reward_kl")
    save_tables(study.folder, tables(study))
    write_text(study.folder / "README.md", page(study))
    title = f"{study.num_questions} held-out questions, temperature 1"
    console = Console()
    console.print(on_screen(title, columns(tables(study)["losses"], ON_SCREEN)))
    console.print(Text(f"Page: {study.folder / 'README.md'}"))


def cells(row: LossRow) -> list[str]:
    """A line as text, empty where something does not apply."""
    failed = f" ({row.failed} of {row.failed + row.seeds} diverged)" if row.failed else ""
    return [
        row.model + failed,
        row.kind,
        _with_interval(row.reward, row.reward_low, row.reward_high),
        _interval(row.reward_seeds_low, row.reward_seeds_high),
        _with_interval(row.difference, row.difference_low, row.difference_high, signed=True),
        "" if row.p_holm is None else "< 0.001" if row.p_holm < 0.001 else f"{row.p_holm:.3f}",
        _share(row.right),
        _share(row.polite),
        "" if row.kl is None else f"{row.kl:.2f} ± {row.kl_stderr:.2f}",
        _share(row.win_rate),
        _share(row.accuracy),
        _number(row.chosen_change, signed=True),
        "" if row.seconds is None else f"{row.seconds:.0f}",
    ]


def _number(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return ""
    return f"{value:+.2f}" if signed else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None else f"[{_number(low)}, {_number(high)}]"


def _with_interval(
    value: float | None, low: float | None, high: float | None, *, signed: bool = False
) -> str:
    if value is None:
        return ""
    return (
        f"{_number(value, signed=signed)} "
        f"[{_number(low, signed=signed)}, {_number(high, signed=signed)}]"
    )


# -- the figure ----------------------------------------------------------------------------------

KIND_NAMES = {"pair": "pairs", "list": "rankings", "unpaired": "judged responses"}
LINEAR_KL = 0.1
"""Below this KL (nats) the logarithmic axis is linear, so that 0 has a place."""


def loss_figure(rows: Sequence[LossRow], stem: Path) -> list[Path]:
    """True reward against KL, one point a loss: its mean over seeds, named. Losses without a
    finished run have no point.
    """
    start = next((row for row in rows if row.kind == "start"), None)
    with paper_style():
        figure = new_figure(DOUBLE_COLUMN, 6.2)
        axes = figure.add_subplot()
        axes.set_xscale("symlog", linthresh=LINEAR_KL, linscale=0.3)
        if start is not None and start.reward is not None:
            axes.axhline(start.reward, color=MUTED, lw=0.8, ls="--", label="SFT", zorder=1)
        labels: list[tuple[float, float, str, str]] = []
        bars: list[tuple[float, float, float, float]] = []
        for (kind, name), colour, marker in zip(KIND_NAMES.items(), COLOURS, MARKERS, strict=False):
            own = [row for row in rows if row.kind == kind and row.reward is not None]
            if not own:
                continue
            numbers = np.array(
                [(r.kl, r.kl_stderr, r.reward, r.reward_low, r.reward_high) for r in own], float
            )
            kl, stderr, reward, low, high = numbers.T
            axes.errorbar(
                kl,
                reward,
                xerr=[np.minimum(Z_95 * stderr, kl), Z_95 * stderr],
                yerr=[reward - low, high - reward],
                label=name,
                ls="none",
                marker=marker,
                color=colour,
                ecolor=(colour, 0.25),
                elinewidth=0.7,
            )
            labels += [
                (x, y, plain(row.model), colour) for x, y, row in zip(kl, reward, own, strict=True)
            ]
            bars += zip(kl, low, kl, high, strict=True)
        axes.set_xlim(left=0)
        axes.margins(y=0.06)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel=KL_LABEL.replace("reference", "SFT"), ylabel="True reward")
        figure.legend(loc="outside upper left", ncols=4)
        caption(
            figure,
            "Mean over seeds. Bars: 95% interval of the reward over questions; "
            "1.96 standard errors of the KL.",
        )
        label_points(axes, labels, obstacles=np.array(bars).reshape(-1, 4))
        header = [field.name for field in fields(LossRow)]
        return save_figure(figure, stem, header, [astuple(row) for row in rows])


# -- the page ------------------------------------------------------------------------------------


def tables(study: LossStudy) -> Tables:
    """The page's table, and what everything was measured on."""
    return {
        "facts": [
            ["fact", "value"],
            ["held-out questions", str(study.num_questions)],
            ["labels that the true reward agrees with", f"{study.label_accuracy:.0%}"],
        ],
        "losses": [list(COLUMNS), *map(cells, study.rows)],
    }


def page(study: LossStudy) -> str:
    """The study as Markdown: what was done, the table, and what it does and does not prove."""
    parts = [
        f"# Losses on the embedded language: {study.folder.name}",
        _what_was_done(study),
        _markdown(COLUMNS, [cells(row) for row in study.rows]),
        _footnotes(study),
        "![True reward against KL](figures/reward_kl.svg)",
        *_failures(study.rows),
        "## What this shows, and what it does not",
        WHAT_IT_SHOWS,
        "`table.csv` holds all numbers, `study.json` the configuration and the environment.",
    ]
    return "\n\n".join(parts) + "\n"


def _what_was_done(study: LossStudy) -> str:
    config = study.config
    seeds, responses = config["seeds"], config["responses_per_step"]
    lists = config["rankings_per_question"]
    text = (
        f"For each seed ({', '.join(map(str, seeds))}) one small GPT-2 learnt to answer by SFT and "
        f"gave {4 * lists} answers to every question. A judge rated each answer by its true reward "
        "plus Gumbel noise. The ratings of four answers make a ranking (a Plackett-Luce draw); of "
        "two of them, a pair (a Bradley-Terry draw); a pair's two responses, apart, are a "
        "desirable and an undesirable one. Losses that take scores are given, for each answer, the "
        "share of the other answers to its question that were rated lower. Pairs of equal answers, "
        "and rankings of nothing else, are left out.\n\n"
        f"Every loss was trained from the SFT model for {config['steps']} steps of {responses} "
        f"responses ({responses // 2} pairs, {responses // 4} rankings or {responses} judged "
        f"responses) at learning rate {config['learning_rate']:g}, with its paper's options and "
        "the SFT model as its reference, where it has one; questions are held out by the same "
        "split everywhere."
    )
    if not config["losses"]:
        return text
    changes = "\n".join(
        f"- `{name}`: " + ", ".join(f"`{key}={value}`" for key, value in settings.items())
        for name, settings in config["losses"].items()
    )
    return f"{text} Other settings were given to:\n\n{changes}"


def _footnotes(study: LossStudy) -> str:
    nulls = [row for row in study.rows if row.kind == "null" and row.win_rate is not None]
    best = max(nulls, key=lambda row: row.win_rate or 0.0, default=None)
    lines = [
        f"{study.num_questions} held-out questions, "
        f"{study.config['samples_per_question']} answers of each seed's model to each, "
        "temperature 1.",
        "True reward: 95% interval over questions (all answers to a question are one cluster); "
        "beside it Student's 95% interval over seeds, which holds what another SFT model and other "
        "ratings would change.",
        "Minus DPO's: from the same SFT model, question by question, with its 95% interval; p of a "
        "sign-flip test over questions, corrected by Holm over all losses of the table.",
        "KL to SFT: on the model's own answers, nats, with its standard error of sampling.",
        "Win rate: Sentence-BERT, nearer to the chosen than to the rejected response of a held-out "
        "pair, wins among decided.",
        "Accuracy: share of held-out pairs whose chosen response gained more log-probability than "
        "the rejected one. Labels are noisy: the true reward itself agrees with "
        f"{study.label_accuracy:.0%} of them.",
        "Change of log π(chosen): from the SFT model, nats, on held-out pairs. "
        "Seconds: in optimizer steps, a run.",
    ]
    if best is not None:
        lines.insert(
            5,
            f"A response that knows nothing ({best.model}) wins {best.win_rate:.0%}: "
            "read no win rate without it.",
        )
    return "\n".join(f"- {line}" for line in lines)


def _failures(rows: Sequence[LossRow]) -> list[str]:
    said = [f"- `{row.model}`, {row.said}" for row in rows if row.said]
    return ["## Runs that diverged", "\n".join(said)] if said else []


WHAT_IT_SHOWS = """\
It shows what each loss does *with these settings, here*: how far it moved from SFT in the same
number of responses, whether answers became better by the true reward or only more polite, and
whether the likelihood of chosen responses fell. Where the Holm p is below 0.05, the loss ended with
another true reward than DPO on these questions from these SFT models.

It does not show which loss is best:

- No loss was tuned. All share a learning rate, and a paper's options were chosen for its models and
  its data. `beta` means something else in almost every loss, so losses stopped at different KL:
  compare those that are near each other on the figure's KL axis, or tune each first.
- The intervals and tests are over questions. What another SFT model and other ratings would change
  is in the interval over seeds beside the reward, wide because the seeds are few.
- A p above 0.05 does not say that two losses are equal.
- The judge follows Bradley-Terry and Plackett-Luce exactly, which DPO assumes and real judges do
  not do; the model and its language are small. Orders may be others on real data.
- The budget is equal in responses, not in what is said of them: a ranking of four says more than
  its two pairs, a score more than an order, a pair more than its two responses apart."""


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines
    )
