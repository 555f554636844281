"""`dpo demo`: the whole method in minutes, on a language whose true reward is known.

A small GPT-2 learns the embedded language (SFT), answers its own training questions, has pairs of
its answers labelled by Bradley-Terry under the true reward, and is trained on them: by imitation
of the chosen answers (preferred-FT) and by DPO at three betas. All are measured on held-out
questions.
"""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dpo.atomic import write_json, write_text
from dpo.config import PreferenceConfig, SFTConfig
from dpo.config_files import validate
from dpo.data.sources import write_jsonl
from dpo.data.synthetic import World, label_pairs
from dpo.evaluate.jobs import Evaluation, evaluate
from dpo.evaluate.winrate import WinRateRow
from dpo.evaluation_config import EvaluateConfig
from dpo.experiment.embedded import (
    MAX_NEW_TOKENS,
    TEST_FRACTION,
    data_settings,
    kl_to_sft,
    make_base,
    run_settings,
    sample_answers,
    train_demonstrator,
)
from dpo.models.divergence import KLEstimate
from dpo.report.diagnostics_figures import leave_diagnosis
from dpo.report.figures import (
    RewardKLPoint,
    TrainingCurve,
    reward_kl_figure,
    training_curves_figure,
    win_rate_figure,
)
from dpo.report.tables import on_screen
from dpo.train.jobs import train_preference, train_sft
from dpo.train.run import environment, read_metrics

log = logging.getLogger("dpo")

BETAS = (1.0, 0.3, 0.1)


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One line of the demo's table, all on held-out questions."""

    model: str
    reward: float
    low: float
    high: float
    right: float
    polite: float
    kl: float
    kl_stderr: float
    win_rate: float | None
    seconds: float


def run_demo(out: Path, *, seed: int = 0, short: bool = False) -> list[DemoRow]:
    """Run everything that has not been run yet, and leave `table.csv`, `figures/`, the models.

    Args:
        out: the demo's folder.
        seed: decides data, weights, order and samples.
        short: a tenth of the steps and fewer samples: enough to see that everything works.

    Raises:
        InputError: `out` holds runs with other settings.
    """
    started = time.perf_counter()
    world = World()
    out.mkdir(parents=True, exist_ok=True)
    scale = 0.1 if short else 1.0
    base = make_base(out / "base", seed, method="Untrained; the demo starts here.")
    sft = train_demonstrator(out / "sft", base, seed, steps=round(700 * scale))
    pairs = _sample_pairs(out, sft, world, seed, num_per_prompt=1 if short else 12)
    models = {
        "base": base,
        "SFT": sft,
        "preferred-FT": _train_preferred(out, sft, pairs, seed, scale),
    }
    for beta in BETAS:
        models[_dpo_name(beta)] = _train_dpo(out, sft, pairs, seed, beta, round(100 * scale))
    log.info("Evaluating %d models on held-out questions.", len(models))
    evaluation = _evaluate(out, models, pairs, seed, samples_per_prompt=2 if short else 4)
    kls = {
        name: _kl(folder, sft, evaluation, seed, samples_per_prompt=1 if short else 4)
        for name, folder in models.items()
    }
    rows = _rows(models, evaluation, kls)
    _figures(out, models, evaluation, rows, seed)
    for beta in BETAS:
        leave_diagnosis(models[_dpo_name(beta)])
    leave_diagnosis(evaluation.folder)
    made_by = {"command": "demo", "seed": seed, "short": short}
    _write(out, rows, made_by, seconds=time.perf_counter() - started)
    _print(out, rows, evaluation)
    return rows


def _dpo_name(beta: float) -> str:
    return f"DPO beta {beta:g}"


# -- training ------------------------------------------------------------------------------------


def _train_preferred(out: Path, sft: Path, pairs: Path, seed: int, scale: float) -> Path:
    """Preferred-FT (Rafailov et al. 2023, Section 6): SFT on the chosen responses, no more."""
    values = run_settings(out / "preferred-ft", sft, seed, round(60 * scale)) | {
        "data": data_settings(str(pairs)),
        "optimizer": {"learning_rate": 1e-3, "schedule": "cosine"},
        "evaluation": {"max_new_tokens": MAX_NEW_TOKENS},
    }
    return train_sft(validate(SFTConfig, values))


def _train_dpo(out: Path, sft: Path, pairs: Path, seed: int, beta: float, steps: int) -> Path:
    values = run_settings(out / f"dpo-beta-{beta:g}", sft, seed, steps) | {
        "data": data_settings(str(pairs)),
        "loss": {"beta": beta},
        "optimizer": {"learning_rate": 2e-4},
        "evaluation": {"every": max(steps // 5, 1), "max_new_tokens": MAX_NEW_TOKENS},
    }
    return train_preference(validate(PreferenceConfig, values))


def _sample_pairs(out: Path, sft: Path, world: World, seed: int, *, num_per_prompt: int) -> Path:
    """Pairs of the SFT model's own answers to all questions, labelled under the true reward.

    Training splits them by question as it split the demonstrations: a question's side depends only
    on the question, the seed and the fraction.
    """
    file = out / "pairs.jsonl"
    if file.exists():
        return file
    answers = sample_answers(sft, world.prompts, num_per_prompt=2 * num_per_prompt, seed=seed)
    prompts = [prompt for prompt in world.prompts for _ in range(num_per_prompt)]
    first = [text for texts in answers for text in texts[::2]]
    second = [text for texts in answers for text in texts[1::2]]
    rows = label_pairs(world, prompts, first, second, seed=seed)
    write_jsonl(rows, file)
    log.info("%d pairs of the SFT model's answers in %s.", len(rows), file)
    return file


# -- measuring -----------------------------------------------------------------------------------


def _evaluate(
    out: Path, models: dict[str, Path], pairs: Path, seed: int, *, samples_per_prompt: int
) -> Evaluation:
    """Sentence-BERT win rates against pairs of held-out questions, and the true reward."""
    config = validate(
        EvaluateConfig,
        {
            "models": {name: str(folder) for name, folder in models.items()},
            "data": {"path": str(pairs), "test_fraction": TEST_FRACTION},
            "out": str(out / "evaluation"),
            "samples_per_prompt": samples_per_prompt,
            "max_new_tokens": MAX_NEW_TOKENS,
            "batch_size": 256,
            "seed": seed,
            "sentence_model": "offline",
        },
    )
    return evaluate(config, world=World())


def _kl(
    folder: Path, sft: Path, evaluation: Evaluation, seed: int, *, samples_per_prompt: int
) -> KLEstimate:
    """KL(model || SFT) on the held-out questions, responses sampled from the model."""
    prompts = list(dict.fromkeys(record.prompt for record in evaluation.scored))
    return kl_to_sft(folder, sft, prompts, seed=seed, samples_per_prompt=samples_per_prompt)


def _rows(
    models: dict[str, Path], evaluation: Evaluation, kls: dict[str, KLEstimate]
) -> list[DemoRow]:
    """The table: everything at temperature 1, the policy itself."""
    rewards = {row.model: row for row in evaluation.rewards if row.temperature == 1.0}
    wins = {row.model: row for row in evaluation.table if row.temperature == 1.0}
    return [
        DemoRow(
            model=name,
            reward=rewards[name].reward,
            low=rewards[name].low,
            high=rewards[name].high,
            right=rewards[name].right,
            polite=rewards[name].polite,
            kl=kls[name].mean,
            kl_stderr=kls[name].stderr,
            win_rate=wins[name].win_rate,
            seconds=_seconds(folder),
        )
        for name, folder in models.items()
    ]


def _seconds(folder: Path) -> float:
    """Time spent in optimizer steps."""
    return round(float(sum(row.get("seconds", 0.0) for row in read_metrics(folder))), 1)


# -- showing -------------------------------------------------------------------------------------


def _figures(
    out: Path,
    models: dict[str, Path],
    evaluation: Evaluation,
    rows: Sequence[DemoRow],
    seed: int,
) -> None:
    figures = out / "figures"
    win_rate_figure(evaluation.table, figures / "win_rate")
    points = [
        RewardKLPoint(
            method=row.model.split(" beta")[0],
            label=row.model,
            kl=row.kl,
            kl_stderr=row.kl_stderr,
            reward=row.reward,
            reward_stderr=(row.high - row.low) / 4,
        )
        for row in rows
        if row.model != "base"
    ]
    reward_kl_figure(points, figures / "reward_kl")
    curves = [
        _curve(name.removeprefix("DPO "), folder, seed)
        for name, folder in models.items()
        if name.startswith("DPO")
    ]
    training_curves_figure(curves, figures / "training", x_label="Optimizer step")


def _curve(label: str, folder: Path, seed: int) -> TrainingCurve:
    held_out = [row for row in read_metrics(folder) if "eval/loss" in row]
    return TrainingCurve(
        label=label,
        seed=seed,
        x=[row["step"] for row in held_out],
        loss=[row["eval/loss"] for row in held_out],
        kl=[row["eval/kl"] for row in held_out],
        kl_stderr=[row["eval/kl_stderr"] for row in held_out],
    )


def _write(
    out: Path, rows: Sequence[DemoRow], made_by: dict[str, object], *, seconds: float
) -> None:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(out / "table.csv", stream.getvalue())
    manifest = {**made_by, "seconds": round(seconds, 1), **environment()}
    write_json(out / "manifest.json", manifest)


def _print(out: Path, rows: Sequence[DemoRow], evaluation: Evaluation) -> None:
    head = ("model", "true reward (95%)", "right", "polite", "KL to SFT", "wins", "time")
    lines = [
        (
            row.model,
            f"{row.reward:.2f} [{row.low:.2f}, {row.high:.2f}]",
            f"{row.right:.0%}",
            f"{row.polite:.0%}",
            f"{row.kl:.3g} ± {row.kl_stderr:.1g}",
            "" if row.win_rate is None else f"{row.win_rate:.0%}",
            f"{row.seconds:.0f} s",
        )
        for row in rows
    ]
    console = Console()
    console.print(on_screen("Held-out questions, temperature 1", [head, *lines]))
    best = _best_null(evaluation.table)
    if best is not None and best.win_rate is not None:
        console.print(
            Text(
                f"Wins: Sentence-BERT, among decided. A response that knows nothing "
                f"({best.model}) gets {best.win_rate:.0%}: read none without it."
            )
        )
    console.print(
        "Small beta moves further from SFT. Where KL has grown and answers are right less often, "
        "the policy is over-optimised: it exploits what few pairs happen to say."
    )
    console.print(Text(f"Figures: {out / 'figures'}   table: {out / 'table.csv'}"))


def _best_null(table: Sequence[WinRateRow]) -> WinRateRow | None:
    nulls = [row for row in table if row.kind == "null" and row.win_rate is not None]
    return max(nulls, key=lambda row: row.win_rate or 0.0, default=None)
