"""Direct Preference Optimization: pairs, their reference log-probabilities, and the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dpo.config import DPOLossConfig
from dpo.core import losses
from dpo.data.pack import packed_tokens
from dpo.data.rows import PreferenceRow
from dpo.data.tokenize import Encoder, TokenSequence
from dpo.models.divergence import KLEstimate
from dpo.models.scoring import MAX_LOGIT_BYTES, response_logps
from dpo.train.loop import BatchResult
from dpo.train.prepare import check_dropped, report_cuts
from dpo.train.reference import score_all

TIE_NATS = 1e-4
"""Log-ratios that differ by less are equal: sums of float32 log-probabilities carry such errors."""


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A chosen and a rejected response after the same prompt tokens."""

    chosen: TokenSequence
    rejected: TokenSequence
    source: str


def encode_pairs(
    encoder: Encoder, rows: Sequence[PreferenceRow], *, max_dropped: float, what: str
) -> list[EncodedPair]:
    """Pairs as tokens; those whose two responses are the same tokens teach nothing and are dropped.

    Raises:
        InputError: more than the share `max_dropped` would be dropped.
    """
    encoded = [encoder.encode(row.prompt, [row.chosen, row.rejected]) for row in rows]
    report_cuts(encoded, what=what)
    pairs = [
        EncodedPair(pair.sequences[0], pair.sequences[1], row.source)
        for pair, row in zip(encoded, rows, strict=True)
        if pair.sequences[0] != pair.sequences[1]
    ]
    check_dropped(
        len(rows) - len(pairs),
        len(rows),
        reason=f"{what}: chosen and rejected are the same tokens",
        allowed=max_dropped,
    )
    return pairs


def sequences_of(pairs: Sequence[EncodedPair]) -> list[TokenSequence]:
    """All chosen, then all rejected responses, (2B,)."""
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probabilities of chosen and rejected responses under policy and reference, (B,) each."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor

    def loss(self, config: DPOLossConfig) -> Tensor:
        """The configured loss of each pair, (B,)."""
        return losses.dpo(
            self.policy_chosen,
            self.policy_rejected,
            self.reference_chosen,
            self.reference_rejected,
            beta=config.beta,
            label_smoothing=config.label_smoothing,
        )

    def metrics(self, beta: float) -> dict[str, Tensor]:
        """What is logged of each pair, (B,) each. A margin within rounding of 0 is a tie, no
        hit.
        """
        chosen = beta * (self.policy_chosen - self.reference_chosen)
        rejected = beta * (self.policy_rejected - self.reference_rejected)
        margin = chosen - rejected
        tie = margin.abs() <= beta * TIE_NATS
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margin": margin,
            "rewards/accuracy": ((margin > 0) & ~tie).double(),
            "rewards/ties": tie.double(),
            "logps/chosen": self.policy_chosen,
            "logps/rejected": self.policy_rejected,
            "logps/chosen_change": self.policy_chosen - self.reference_chosen,
            "logps/rejected_change": self.policy_rejected - self.reference_rejected,
        }


@dataclass
class PreferenceMethod:
    """DPO on encoded pairs. Reference log-probabilities are (2N,): all chosen, then all
    rejected.
    """

    train: list[EncodedPair]
    test: list[EncodedPair]
    train_reference: Tensor
    test_reference: Tensor
    loss_config: DPOLossConfig
    precision: str
    max_tokens: int
    kl: Callable[[nn.Module], KLEstimate] | None
    save: Callable[[nn.Module, Path], None]
    max_logit_bytes: int = MAX_LOGIT_BYTES

    @property
    def num_rows(self) -> int:
        return len(self.train)

    def num_tokens(self, row: int) -> int:
        return packed_tokens([self.train[row].chosen, self.train[row].rejected])

    def weight(self, rows: Sequence[int]) -> int:
        """Pairs: every pair counts the same, whatever its lengths."""
        return len(rows)

    def loss(self, policy: nn.Module, rows: Sequence[int]) -> BatchResult:
        sequences = sequences_of([self.train[row] for row in rows])
        logps = response_logps(
            policy,
            sequences,
            precision=self.precision,
            max_tokens=self.max_tokens,
            max_logit_bytes=self.max_logit_bytes,
        )
        index = torch.tensor([*rows, *[len(self.train) + row for row in rows]])
        pair = _pair_logps(logps, self.train_reference[index].to(logps.device))
        with torch.no_grad():
            metrics = pair.metrics(self.loss_config.beta)
        sums = {name: value.sum().item() for name, value in metrics.items()}
        return BatchResult(pair.loss(self.loss_config).sum(), sums)

    def evaluate(self, policy: nn.Module) -> dict[str, float]:
        """Held-out loss, rewards and accuracy, and the on-policy KL with its standard error."""
        logps = score_all(
            policy, sequences_of(self.test), precision=self.precision, max_tokens=self.max_tokens
        )
        pair = _pair_logps(logps, self.test_reference)
        found = {"eval/loss": pair.loss(self.loss_config).mean().item()}
        for name, value in pair.metrics(self.loss_config.beta).items():
            found[f"eval/{name}"] = value.mean().item()
        if self.kl is not None and math.isfinite(found["eval/loss"]):  # NaN cannot be sampled from
            estimate = self.kl(policy)
            found["eval/kl"], found["eval/kl_stderr"] = estimate.mean, estimate.stderr
            found["eval/kl_truncated"] = estimate.truncated
            found["eval/sample_tokens"] = estimate.tokens
        return found

    def describe(self, row: int) -> str:
        return self.train[row].source

    def save_model(self, policy: nn.Module, folder: Path) -> None:
        self.save(policy, folder)


def _pair_logps(policy: Tensor, reference: Tensor) -> PairLogps:
    """Split (2B,) values, all chosen and then all rejected, into pairs."""
    policy_chosen, policy_rejected = policy.chunk(2)
    reference_chosen, reference_rejected = reference.chunk(2)
    return PairLogps(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
