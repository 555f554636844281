"""Supervised fine-tuning: the next-token loss on response tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dpo.data.pack import packed_tokens
from dpo.data.rows import DemonstrationRow
from dpo.data.tokenize import Encoder, TokenSequence
from dpo.models.scoring import MAX_LOGIT_BYTES, response_logps
from dpo.train.loop import BatchResult, PlainMethod
from dpo.train.prepare import report_cuts
from dpo.train.reference import score_all
from dpo.train.sharding import tokens_at_once


def encode_demonstrations(
    encoder: Encoder, rows: Sequence[DemonstrationRow], *, train_on_prompt: bool, what: str
) -> list[TokenSequence]:
    """One sequence a row; with `train_on_prompt` all tokens but the first are scored."""
    encoded = [encoder.encode(row.prompt, [row.response]) for row in rows]
    report_cuts(encoded, what=what)
    sequences = [row.sequences[0] for row in encoded]
    return [TokenSequence(s.ids, 1) for s in sequences] if train_on_prompt else sequences


@dataclass
class SupervisedMethod(PlainMethod):
    """Maximum likelihood of the responses: the mean of `-log pi(y_t | x, y_<t)` over scored
    tokens.
    """

    train: list[TokenSequence]
    test: list[TokenSequence]
    sources: list[str]
    precision: str
    max_tokens: int
    save: Callable[[nn.Module, Path], None]
    max_logit_bytes: int = MAX_LOGIT_BYTES

    @property
    def num_rows(self) -> int:
        return len(self.train)

    def num_tokens(self, row: int) -> int:
        return packed_tokens([self.train[row]])

    def weight(self, rows: Sequence[int]) -> int:
        """The batch's scored tokens: every token counts the same, whatever response it is in."""
        return sum(self.train[row].num_scored for row in rows)

    def loss(self, policy: nn.Module, rows: Sequence[int]) -> BatchResult:
        logps = response_logps(
            policy,
            [self.train[row] for row in rows],
            precision=self.precision,
            max_tokens=tokens_at_once(policy, self.max_tokens),
            max_logit_bytes=self.max_logit_bytes,
        )
        return BatchResult(-logps.sum(), {})

    def evaluate(self, policy: nn.Module) -> dict[str, float]:
        """Held-out loss per token, in nats, and perplexity, its exponential."""
        logps = score_all(policy, self.test, precision=self.precision, max_tokens=self.max_tokens)
        loss = -logps.sum().item() / sum(s.num_scored for s in self.test)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"eval/loss": loss, "eval/perplexity": perplexity}

    def describe(self, row: int) -> str:
        return self.sources[row]

    def save_model(self, policy: nn.Module, folder: Path) -> None:
        self.save(policy, folder)
