"""The model and the batches: the same weights and the same token ids for every contestant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scenario import WARMUP_STEPS, Scenario
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from dpo.config import DataConfig
from dpo.data.order import batch_rows, epoch_order
from dpo.data.tokenize import TokenSequence
from dpo.models.load import find_tokenizer, load_tokenizer
from dpo.train.encoded import EncodedPair, encode_pairs
from dpo.train.prepare import choose_template, load_preferences, make_encoder

FILES = {"hh": "hh-harmless-sample.jsonl", "instruction": "instruction-preferences.json"}
TOKENIZER = "gpt2-tokenizer"


@dataclass(frozen=True)
class Workload:
    """Pairs in the order of their rows; `batch_rows` decides, as in training, which step takes
    which.
    """

    pairs: list[EncodedPair]
    batch_size: int
    seed: int

    @property
    def num_steps(self) -> int:
        return len(self.pairs) // self.batch_size

    def batch(self, step: int) -> list[EncodedPair]:
        """The pairs of one optimizer step, in their order within it."""
        rows = batch_rows(
            step, num_rows=len(self.pairs), batch_size=self.batch_size, seed=self.seed
        )
        return [self.pairs[row] for row in rows]

    def batches(self) -> list[list[EncodedPair]]:
        """The batches of all steps, in order."""
        return [self.batch(step) for step in range(self.num_steps)]

    def of_steps(self, steps: Sequence[int]) -> Workload:
        """A workload whose step i is step `steps[i]` of this one."""
        wanted = [pair for step in steps for pair in self.batch(step)]
        order = epoch_order(len(wanted), seed=self.seed, epoch=0)
        pairs = list(wanted)
        for position, row in enumerate(order):
            pairs[row] = wanted[position]
        return replace(self, pairs=pairs)


def make_workload(scenario: Scenario) -> Workload:
    """Pairs for the warm-up and all timed steps, a seeded choice from the scenario's data.

    Raises:
        SystemExit: the data has fewer pairs than the steps need.
    """
    num_pairs = scenario.batch * (scenario.steps + WARMUP_STEPS)
    if scenario.data == "random":
        pairs = _draw_pairs(scenario, num_pairs)
    else:
        loaded = _load_pairs(scenario)
        if len(loaded) < num_pairs:
            raise SystemExit(
                f"--data {scenario.data} has {len(loaded)} pairs to train on, but "
                f"{scenario.steps} steps of {scenario.batch} (and a warm-up) need {num_pairs}; "
                "take fewer --steps or a smaller --batch."
            )
        order = epoch_order(len(loaded), seed=scenario.seed, epoch=0)
        pairs = [loaded[row] for row in order[:num_pairs]]
    return Workload(pairs, scenario.batch, scenario.seed)


def _load_pairs(scenario: Scenario) -> list[EncodedPair]:
    """The training pairs that `dpo train` would make of the data set, with GPT-2's tokenizer."""
    data = DataConfig(path=str(scenario.file(FILES[scenario.data])), max_length=scenario.max_length)
    tokenizer = load_tokenizer(find_tokenizer(str(scenario.file(TOKENIZER))))
    if len(tokenizer) > scenario.vocab:
        raise SystemExit(f"--data {scenario.data} needs a --vocab of at least {len(tokenizer)}.")
    rows = load_preferences(data)
    template = choose_template(None, None, shape=rows.shape, conversational=rows.conversational)
    encoder = make_encoder(
        tokenizer, template, max_length=data.max_length, positions=scenario.positions
    )
    return encode_pairs(encoder, rows.train, max_dropped=1.0, what=scenario.data)


def _draw_pairs(scenario: Scenario, num_pairs: int) -> list[EncodedPair]:
    """Random tokens with log-normal lengths like those of hh-rlhf's harmless pairs.

    Mean and deviation of the logarithms are those of that data set under GPT-2's tokenizer: prompts
    of about 80 tokens, responses of about 30.
    """
    rng = np.random.default_rng(scenario.seed)
    longest_prompt = scenario.max_length // 2

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(int(token) for token in rng.integers(1, scenario.vocab, size=count))

    pairs = []
    for number in range(num_pairs):
        prompt = tokens(int(np.clip(rng.lognormal(4.36, 0.96), 12, longest_prompt)))
        room = scenario.max_length - len(prompt)
        chosen, rejected = (
            TokenSequence(prompt + tokens(int(length)), len(prompt))
            for length in np.clip(rng.lognormal(3.45, 0.87, size=2), 2, room)
        )
        pairs.append(EncodedPair(chosen, rejected, f"drawn {number}"))
    return pairs


def make_model(scenario: Scenario) -> nn.Module:
    """A GPT-2 with seeded random weights and no dropout, so that all contestants compute the same
    loss.
    """
    config = GPT2Config(
        vocab_size=scenario.vocab,
        n_positions=scenario.positions,
        n_embd=scenario.width,
        n_layer=scenario.layers,
        n_head=scenario.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(scenario.seed)
        model: nn.Module = GPT2LMHeadModel(config).eval()
    return model


def make_stop_ids(scenario: Scenario) -> list[int]:
    """The tokens that end a generated response: a seeded share of the vocabulary."""
    rng = np.random.default_rng([scenario.seed, 1])
    count = max(1, round(scenario.stop_share * scenario.vocab))
    return sorted(int(token) for token in rng.choice(scenario.vocab, size=count, replace=False))
