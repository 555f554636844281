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
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo.atomic import replace_folder, write_json, write_text
from dpo.config import EvaluateConfig, PreferenceConfig, SFTConfig, validate
from dpo.data.prompts import resolve_template
from dpo.data.sources import write_jsonl
from dpo.data.synthetic import World, demonstrations, label_pairs
from dpo.data.tokenize import Encoder
from dpo.evaluate.jobs import Evaluation, evaluate
from dpo.evaluate.winrate import WinRateRow
from dpo.models.divergence import KLEstimate, on_policy_kl
from dpo.models.export import model_card, save_pretrained
from dpo.models.fresh import fresh_gpt2, train_tokenizer
from dpo.models.generate import generate
from dpo.models.load import find_model, load_model, load_tokenizer, pick_device
from dpo.report.figures import (
    RewardKLPoint,
    TrainingCurve,
    reward_kl_figure,
    training_curves_figure,
    win_rate_figure,
)
from dpo.train.jobs import train_preference, train_sft
from dpo.train.run import environment, read_metrics

log = logging.getLogger("dpo")

BETAS = (1.0, 0.3, 0.1)
TEMPLATE = "question"
TEST_FRACTION = 0.25
MAX_NEW_TOKENS = 48
MAX_LENGTH = 96


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
    base = _make_base(out, seed)
    sft = _train_sft(out, base, seed, steps=round(700 * scale))
    pairs = _sample_pairs(out, sft, world, seed, num_per_prompt=1 if short else 12)
    models = {
        "base": base,
        "SFT": sft,
        "preferred-FT": _train_preferred(out, sft, pairs, seed, scale),
    }
    for beta in BETAS:
        models[f"DPO beta {beta:g}"] = _train_dpo(out, sft, pairs, seed, beta, round(100 * scale))
    log.info("Evaluating %d models on held-out questions.", len(models))
    evaluation = _evaluate(out, models, pairs, seed, samples_per_prompt=2 if short else 4)
    kls = {
        name: _kl(folder, sft, evaluation, seed, samples_per_prompt=1 if short else 4)
        for name, folder in models.items()
    }
    rows = _rows(models, evaluation, kls)
    _figures(out, models, evaluation, rows, seed)
    _write(out, rows, seed, seconds=time.perf_counter() - started)
    _print(out, rows, evaluation)
    return rows


# -- training ------------------------------------------------------------------------------------


def _make_base(out: Path, seed: int) -> Path:
    """A fresh GPT-2 of 242k parameters, with a tokenizer learnt from the demonstrations."""
    folder = out / "base"
    if (folder / "config.json").exists():
        return folder
    rows = demonstrations(num_rows=2000, seed=seed)
    tokenizer = train_tokenizer((f"{r.prompt}\n{r.response}" for r in rows), vocab_size=512)
    model = fresh_gpt2(width=96, layers=2, heads=2, positions=128, tokenizer=tokenizer, seed=seed)
    template = resolve_template(TEMPLATE)
    card = model_card(
        title="base",
        base="random weights",
        data="none",
        template=template,
        method="Untrained; the demo starts here.",
        settings="{}",
    )
    stop_ids = Encoder(tokenizer, template, MAX_LENGTH).stop_ids
    with replace_folder(folder) as new:
        save_pretrained(model, tokenizer, template, new, card=card, stop_ids=stop_ids)
    return folder


def _common(out: Path, model: Path, seed: int, steps: int) -> dict[str, Any]:
    return {
        "model": str(model),
        "out": str(out),
        "seed": seed,
        "max_steps": max(steps, 2),
        "batch": {"size": 64, "max_tokens": 16_384},
    }


def _train_sft(out: Path, base: Path, seed: int, *, steps: int) -> Path:
    values = _common(out / "sft", base, seed, steps) | {
        "data": _data("synthetic", synthetic={"num_rows": 2000, "seed": seed}),
        "optimizer": {"learning_rate": 3e-3, "schedule": "cosine"},
        "evaluation": {"max_new_tokens": MAX_NEW_TOKENS},
    }
    return train_sft(validate(SFTConfig, values))


def _train_preferred(out: Path, sft: Path, pairs: Path, seed: int, scale: float) -> Path:
    """Preferred-FT (Rafailov et al. 2023, Section 6): SFT on the chosen responses, no more."""
    values = _common(out / "preferred-ft", sft, seed, round(60 * scale)) | {
        "data": _data(str(pairs)),
        "optimizer": {"learning_rate": 1e-3, "schedule": "cosine"},
        "evaluation": {"max_new_tokens": MAX_NEW_TOKENS},
    }
    return train_sft(validate(SFTConfig, values))


def _train_dpo(out: Path, sft: Path, pairs: Path, seed: int, beta: float, steps: int) -> Path:
    values = _common(out / f"dpo-beta-{beta:g}", sft, seed, steps) | {
        "data": _data(str(pairs)),
        "loss": {"beta": beta},
        "optimizer": {"learning_rate": 2e-4},
        "evaluation": {"every": max(steps // 5, 1), "max_new_tokens": MAX_NEW_TOKENS},
    }
    return train_preference(validate(PreferenceConfig, values))


def _data(path: str, **more: Any) -> dict[str, Any]:
    return {
        "path": path,
        "test_fraction": TEST_FRACTION,
        "max_length": MAX_LENGTH,
        "max_dropped": 1.0,
        **more,
    }


def _sample_pairs(out: Path, sft: Path, world: World, seed: int, *, num_per_prompt: int) -> Path:
    """Pairs of the SFT model's own answers to all questions, labelled under the true reward.

    Training splits them by question as it split the demonstrations: a question's side depends only
    on the question, the seed and the fraction.
    """
    file = out / "pairs.jsonl"
    if file.exists():
        return file
    encoder, model = _open(sft)
    places = [(i, s) for i in range(len(world.prompts)) for s in range(2 * num_per_prompt)]
    ids = [encoder.prompt_ids(prompt) for prompt in world.prompts]
    responses = generate(
        model,
        [ids[i] for i, _ in places],
        keys=[f"pairs/{i}/{s}" for i, s in places],
        temperature=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        stop_ids=encoder.stop_ids,
        seed=seed,
        batch_size=256,
    )
    texts = [encoder.decode(response.ids) for response in responses]
    prompts = [world.prompts[i] for i, _ in places[::2]]
    rows = label_pairs(world, prompts, texts[::2], texts[1::2], seed=seed)
    write_jsonl(rows, file)
    log.info("%d pairs of the SFT model's answers in %s.", len(rows), file)
    return file


def _open(folder: Path) -> tuple[Encoder, Any]:
    source = find_model(str(folder))
    model = load_model(source).to(pick_device())
    return Encoder(load_tokenizer(source), resolve_template(TEMPLATE), MAX_LENGTH), model


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
    encoder, model = _open(folder)
    _, reference = _open(sft)
    prompts = list(dict.fromkeys(record.prompt for record in evaluation.scored))
    return on_policy_kl(
        model,
        reference,
        [encoder.prompt_ids(prompt) for prompt in prompts],
        stop_ids=encoder.stop_ids,
        max_new_tokens=MAX_NEW_TOKENS,
        samples_per_prompt=samples_per_prompt,
        seed=seed,
    )


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


def _write(out: Path, rows: Sequence[DemoRow], seed: int, *, seconds: float) -> None:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(out / "table.csv", stream.getvalue())
    manifest = {"seed": seed, "seconds": round(seconds, 1), **environment()}
    write_json(out / "manifest.json", manifest)


def _print(out: Path, rows: Sequence[DemoRow], evaluation: Evaluation) -> None:
    table = Table(title="Held-out questions, temperature 1")
    table.add_column("model")
    names = ("true reward", "95% interval", "right", "polite", "KL to SFT", "win rate", "seconds")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.model,
            f"{row.reward:.2f}",
            Text(f"[{row.low:.2f}, {row.high:.2f}]"),
            f"{row.right:.0%}",
            f"{row.polite:.0%}",
            f"{row.kl:.2f} ± {row.kl_stderr:.2f}",
            "" if row.win_rate is None else f"{row.win_rate:.0%}",
            f"{row.seconds:.0f}",
        )
    console = Console()
    console.print(table)
    best = _best_null(evaluation.table)
    if best is not None and best.win_rate is not None:
        console.print(
            Text(
                f"Win rate: Sentence-BERT, wins among decided. A response that knows nothing "
                f"({best.model}) gets {best.win_rate:.0%}: read no win rate without it."
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
