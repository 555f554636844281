"""Time an SFT step, a DPO step and generation on fixed random weights.

    python benchmarks/steps.py [--layers 6 --width 768 --vocab 50257 --steps 5 --precision fp32]

Prints one table and appends one line of JSON to benchmarks/results/steps.jsonl. Lengths are drawn,
seeded, like those of the instruction set. Never a test: speed is measured, not asserted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

from dpo.config import PreferenceConfig, SFTConfig, validate
from dpo.data.tokenize import TokenSequence
from dpo.models.generate import generate
from dpo.train.loop import peak_memory_bytes, training_step
from dpo.train.preference import EncodedPair, PreferenceMethod, sequences_of
from dpo.train.reference import score_all
from dpo.train.run import environment
from dpo.train.schedule import adamw
from dpo.train.sft import SupervisedMethod

RESULTS = Path(__file__).parent / "results" / "steps.jsonl"


def draw_pairs(num_pairs: int, vocab: int) -> list[EncodedPair]:
    """Random tokens with lengths like the instruction set's: prompts 35-65, responses 2-60."""
    rng = np.random.default_rng(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(int(t) for t in rng.integers(1, vocab, size=n))

    pairs = []
    for _ in range(num_pairs):
        prompt = tokens(int(rng.integers(35, 66)))
        lengths = np.clip(rng.lognormal(2.7, 0.55, size=2).astype(int), 2, 60)
        chosen, rejected = (TokenSequence(prompt + tokens(int(n)), len(prompt)) for n in lengths)
        pairs.append(EncodedPair(chosen, rejected, "drawn"))
    return pairs


def settings(arguments: argparse.Namespace, schema: Any) -> Any:
    values = {
        "model": "random",
        "out": "nowhere",
        "max_steps": arguments.steps + 1,
        "batch": {"size": arguments.batch, "max_tokens": arguments.max_tokens},
        "precision": arguments.precision,
    }
    return validate(schema, values)


def time_steps(method: Any, policy: torch.nn.Module, config: Any, steps: int) -> list[float]:
    """Seconds of each optimizer step; the first, which warms up, is left out."""
    optimizer = adamw(policy, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0)
    seconds = []
    for step in range(steps + 1):
        started = time.perf_counter()
        training_step(method, policy, optimizer, config, step=step)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50_257)
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    shape = {"n_layer": arguments.layers, "n_embd": arguments.width}
    config = GPT2Config(vocab_size=arguments.vocab, n_head=arguments.width // 64, **shape)
    policy = GPT2LMHeadModel(config).eval()
    pairs = draw_pairs(arguments.batch * (arguments.steps + 1), arguments.vocab)
    common = {
        "precision": arguments.precision,
        "max_tokens": arguments.max_tokens,
        "save": lambda model, folder: None,
    }
    reference = score_all(
        policy,
        sequences_of(pairs),
        precision=arguments.precision,
        max_tokens=arguments.max_tokens,
    )
    preference_config = settings(arguments, PreferenceConfig)
    dpo = PreferenceMethod(
        train=pairs,
        test=[],
        train_reference=reference,
        test_reference=reference[:0],
        loss_config=preference_config.loss,
        kl=None,
        **common,
    )
    chosen = [pair.chosen for pair in pairs]
    sft = SupervisedMethod(train=chosen, test=[], sources=[], **common)
    dpo_seconds = time_steps(dpo, policy, preference_config, arguments.steps)
    sft_seconds = time_steps(sft, policy, settings(arguments, SFTConfig), arguments.steps)
    prompts = [pair.chosen.ids[: pair.chosen.prompt_length] for pair in pairs[: arguments.batch]]
    started = time.perf_counter()
    responses = generate(
        policy,
        prompts,
        keys=[str(i) for i in range(len(prompts))],
        temperature=1.0,
        max_new_tokens=32,
        stop_ids=[0],
        seed=0,
        precision=arguments.precision,
    )
    generation_seconds = time.perf_counter() - started
    report(arguments, pairs, dpo_seconds, sft_seconds, generation_seconds, responses)


def report(
    arguments: argparse.Namespace,
    pairs: list[EncodedPair],
    dpo_seconds: list[float],
    sft_seconds: list[float],
    generation_seconds: float,
    responses: list[Any],
) -> None:
    """The table, and the line that records it."""
    pair_tokens = sum(len(p.chosen) + len(p.rejected) for p in pairs) / len(pairs)
    chosen_tokens = sum(len(p.chosen) for p in pairs) / len(pairs)
    new_tokens = sum(len(r.ids) for r in responses)
    row = {
        **vars(arguments),
        "dpo_step_seconds": [round(s, 4) for s in dpo_seconds],
        "sft_step_seconds": [round(s, 4) for s in sft_seconds],
        "dpo_tokens_per_second": arguments.batch * pair_tokens / statistics.median(dpo_seconds),
        "sft_tokens_per_second": arguments.batch * chosen_tokens / statistics.median(sft_seconds),
        "generated_tokens_per_second": new_tokens / generation_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "environment": environment(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
    table = Table("what", "median seconds", "range", "tokens/s")
    for name, seconds, rate in (
        ("DPO step", dpo_seconds, row["dpo_tokens_per_second"]),
        ("SFT step", sft_seconds, row["sft_tokens_per_second"]),
    ):
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        table.add_row(name, f"{statistics.median(seconds):.3f}", spread, f"{rate:,.0f}")
    generated = f"{row['generated_tokens_per_second']:,.0f}"
    table.add_row("generation", f"{generation_seconds:.3f}", "one run", generated)
    console = Console()
    console.print(table)
    console.print(f"Peak memory: {row['peak_memory_bytes'] / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
