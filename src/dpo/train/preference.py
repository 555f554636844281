"""Training on preferences: any loss of the family, on pairs, rankings or judged responses."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo.config import MovingReferenceConfig
from dpo.core.unpaired import kto_reference_point
from dpo.data.order import split_among, split_by_tokens
from dpo.errors import InputError
from dpo.loss_config import LossConfig
from dpo.models.distributions import OF_BOTH, OF_POLICY, OF_REFERENCE, along_responses
from dpo.models.parts import is_sharded, local, settle
from dpo.models.scoring import MAX_LOGIT_BYTES, response_logps
from dpo.train import ranks
from dpo.train.encoded import KINDS, EncodedJudgement, Kind, num_tokens
from dpo.train.held_out import HeldOutPair, held_out_pairs, sequence_logps
from dpo.train.loop import BatchResult, PlainMethod
from dpo.train.objective import Objective, make_objective, reward_scale
from dpo.train.sharding import tokens_at_once

ALONG = OF_POLICY | OF_REFERENCE | OF_BOTH
MISMATCHED = ("policy_mismatched_logps", "reference_mismatched_logps")


@dataclass
class PreferenceMethod(PlainMethod):
    """A loss on encoded rows.

    Reference log-probabilities are those of all rows' sequences, in the order of
    `Kind.sequences(rows)`; None where the loss has no reference, or where it moves and is asked
    again at every step.
    """

    train: Sequence[Any]
    test: Sequence[Any]
    train_reference: Tensor | None
    test_reference: Tensor | None
    loss_config: LossConfig
    precision: str
    max_tokens: int
    on_policy: Callable[[nn.Module], dict[str, float]] | None
    """What is measured of the policy's own samples, if anything."""
    save: Callable[[nn.Module, Path], None]
    max_logit_bytes: int = MAX_LOGIT_BYTES
    reference: nn.Module | None = None
    """Only where the loss asks more of the reference than `train_reference` holds."""
    vocab_size: int = 0
    moving: MovingReferenceConfig | None = None
    keep_held_out: Callable[[Sequence[HeldOutPair]], None] | None = None
    """Called at every evaluation with what the held-out pairs were given."""
    objective: Objective = field(init=False)
    kind: Kind = field(init=False)

    def __post_init__(self) -> None:
        self.objective = make_objective(self.loss_config, vocab_size=self.vocab_size)
        self.kind = KINDS[self.objective.kind]

    @property
    def num_rows(self) -> int:
        return len(self.train)

    @property
    def whole_batch(self) -> bool:
        return self.objective.whole_batch

    def num_tokens(self, row: int) -> int:
        return num_tokens(self.train[row])

    def weight(self, rows: Sequence[int]) -> int:
        """Rows: every pair or list counts the same, whatever its lengths."""
        return len(rows)

    def loss(self, policy: nn.Module, rows: Sequence[int]) -> BatchResult:
        shared = self.whole_batch and ranks.size() > 1
        if shared:
            tensors = self._shared_tensors(policy, rows)
        else:
            tensors = self._tensors(policy, self.train, rows, self.train_reference)
        tensors = _with_reference_point(tensors)
        with torch.no_grad():
            metrics = self.kind.metrics(tensors, reward_scale(self.objective))
        sums = {name: value.sum().item() for name, value in metrics.items()}
        seed = zlib.crc32(np.asarray(rows, np.int64).tobytes())
        loss = self.objective.training_loss(tensors, seed=seed)
        if shared and not ranks.is_first():  # the gradient is the rank's own, the number is all's
            return BatchResult(loss - loss.detach(), {})
        return BatchResult(loss, sums)

    def _shared_tensors(self, policy: nn.Module, rows: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of a batch whose rows act on one another, (B,), where each rank has run its
        share of the rows: the others' values are numbers, without a graph.

        Every rank computes the whole loss; the gradients of all, each through its own rows, add up
        to that of one process.
        """
        costs = [self.num_tokens(row) for row in rows]
        shares = split_among(costs, parts=ranks.size())
        own = shares[ranks.rank()]
        run = [rows[i] for i in own] or [rows[costs.index(min(costs))]]  # all run the model
        found = self._tensors(policy, self.train, run, self.train_reference)
        if any(values.dim() != 1 for values in found.values()):
            raise InputError(
                "loss: this mixture compares the rows of a batch, which are not together where "
                "several processes train; start it without torchrun or accelerate."
            )
        found = {name: values[: len(own)] for name, values in found.items()}
        by_rank = ranks.gather({name: values.tolist() for name, values in found.items()})
        whole = {}
        for name, values in found.items():
            whole[name] = values.new_empty(len(rows))
            for places, of_rank in zip(shares, by_rank, strict=True):
                whole[name][places] = values.new_tensor(of_rank[name])
            whole[name][own] = values
        return whole

    def evaluate(self, policy: nn.Module) -> dict[str, float]:
        """Held-out loss, rewards and accuracy, and what the policy's own samples show.

        Ranks share the passes; where the policy is sharded, one without a pass runs another's, to
        keep step.
        """
        costs = [num_tokens(row) for row in self.test]
        passes = split_by_tokens(costs, max_tokens=self.max_tokens)
        if self.objective.whole_batch:
            passes = [list(range(len(self.test)))]

        def measure(groups: Sequence[list[int]]) -> list[Any]:
            measured = [self._measured(policy, rows) for rows in groups]
            if is_sharded(policy) and len(groups) < -(-len(passes) // ranks.size()):
                self._measured(policy, passes[-1])
            return measured

        by_pass = ranks.shared_out(measure, passes)
        sums: dict[str, float] = {}
        logps: dict[str, dict[int, float]] = {"policy": {}, "reference": {}}
        for rows, (of_pass, sequences) in zip(passes, by_pass, strict=True):
            for name, value in of_pass.items():
                sums[name] = sums.get(name, 0.0) + value
            for model, values in sequences.items():
                logps[model] |= zip(self.kind.places(self.test, rows), values, strict=True)
        found = {f"eval/{name}": value / len(self.test) for name, value in sums.items()}
        if not math.isfinite(found["eval/loss"]):  # NaN cannot be sampled from
            return found
        if self.keep_held_out is not None:
            pairs = held_out_pairs(self.test, self.kind.sequences(self.test), **logps)
            self.keep_held_out(pairs)
        if self.on_policy is not None:
            found |= self.on_policy(policy)
        return found

    def _measured(
        self, policy: nn.Module, rows: Sequence[int]
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Sums over some held-out rows of what is logged; and log-probabilities of their sequences
        under each model, in the order of `Kind.sequences`.
        """
        tensors = self._tensors(policy, self.test, rows, self.test_reference)
        tensors = _with_reference_point(tensors)
        values = {"loss": self.objective(tensors)}
        values |= self.kind.metrics(tensors, reward_scale(self.objective))
        sequences = {name: sequence_logps(tensors, name) for name in ("policy", "reference")}
        return (
            {name: value.sum().item() for name, value in values.items()},
            {name: logps.tolist() for name, logps in sequences.items() if logps is not None},
        )

    def _tensors(
        self,
        policy: nn.Module,
        all_rows: Sequence[Any],
        rows: Sequence[int],
        reference: Tensor | None,
    ) -> dict[str, Tensor]:
        """Everything that the loss takes of some rows, by name, but for KTO's reference point."""
        members = [all_rows[row] for row in rows]
        sequences = self.kind.sequences(members)
        found = self._along(policy, sequences)
        if "policy_token_logps" in found:  # log-probabilities come with them
            policy_logps = found["policy_token_logps"].double().sum(-1)
        else:
            policy_logps = self._score(policy, sequences)
        found = _by_side(found)
        found |= self.kind.tensors(members, "policy", policy_logps)
        found |= self.kind.facts(members, policy_logps.device)
        if reference is not None:
            values = reference[self.kind.places(all_rows, rows)].to(policy_logps.device)
            found |= self.kind.tensors(members, "reference", values)
        elif self.objective.needs_reference:
            found |= self.kind.tensors(members, "reference", self._reference_logps(sequences))
        if "kl" in self.objective.wants:
            found |= self._mismatched(policy, members)
        return found

    def _score(self, model: nn.Module, sequences: Sequence[Any]) -> Tensor:
        return response_logps(
            model,
            sequences,
            precision=self.precision,
            max_tokens=tokens_at_once(model, self.max_tokens),
            max_logit_bytes=self.max_logit_bytes,
        )

    def _reference_logps(self, sequences: Sequence[Any]) -> Tensor:
        assert self.reference is not None
        with torch.no_grad():
            return self._score(self.reference, sequences)

    def _along(self, policy: nn.Module, sequences: Sequence[Any]) -> dict[str, Tensor]:
        """What the loss wants of single tokens and distributions."""
        wanted = {without_side(name) for name in self.objective.wants} & ALONG
        if not wanted:
            return {}
        return along_responses(policy, self.reference, sequences, wanted, precision=self.precision)

    def _mismatched(self, policy: nn.Module, rows: Sequence[EncodedJudgement]) -> dict[str, Tensor]:
        """Log-probabilities of the rows' mismatched responses, without gradient."""
        sequences = [row.mismatched for row in rows]
        with torch.no_grad():
            scores = self._score(policy, sequences), self._reference_logps(sequences)
        return dict(zip(MISMATCHED, scores, strict=True))

    def after_step(self, policy: nn.Module, step: int) -> None:
        """Move the reference towards the policy, where it moves (`move_reference`)."""
        if self.moving is not None and step % self.moving.every == 0:
            assert self.reference is not None
            move_reference(self.reference, policy, mix=self.moving.mix)

    def companion(self) -> nn.Module | None:
        return self.reference if self.moving is not None else None

    def state(self) -> dict[str, Any]:
        return {"running": self.objective.state()}

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.objective.restore(state["running"])

    def describe(self, row: int) -> str:
        return str(self.train[row].source)

    def save_model(self, policy: nn.Module, folder: Path) -> None:
        self.save(policy, folder)


def _with_reference_point(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """KTO's z0 in place of the mismatched responses that it is the mean of, where there are any."""
    if not tensors.keys() >= set(MISMATCHED):
        return tensors
    rest = {name: values for name, values in tensors.items() if name not in MISMATCHED}
    return rest | {"kl": kto_reference_point(*(tensors[name] for name in MISMATCHED))}


@torch.no_grad()
def move_reference(reference: nn.Module, policy: nn.Module, *, mix: float) -> None:
    """`theta_ref <- mix theta + (1 - mix) theta_ref`: the reference follows the policy.

    TR-DPO, Gorbatovski et al. 2024 (arXiv:2404.09656); `mix = 1` copies the policy.
    """
    for model in (reference, policy):
        settle(model)
    for own, other in zip(reference.parameters(), policy.parameters(), strict=True):
        local(own).lerp_(local(other), mix)


def asks_reference(wanted: Collection[str]) -> bool:
    """Whether a loss wants more of a frozen reference than the log-probabilities of its rows."""
    names = {without_side(name) for name in wanted}
    return bool(names & (OF_REFERENCE | OF_BOTH | {"kl"}))


def without_side(name: str) -> str:
    """`policy_chosen_token_logps` as `policy_token_logps`; `chosen_forward_kl` as `forward_kl`."""
    for side in ("chosen_", "rejected_"):
        name = name.replace(side, "", 1)
    return name


def _by_side(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values of all chosen and then all rejected responses, under the names of their sides."""
    split: dict[str, Tensor] = {}
    for name, values in found.items():
        model, _, rest = name.partition("_")
        for side, half in zip(("chosen", "rejected"), values.chunk(2), strict=True):
            key = f"{model}_{side}_{rest}" if model in ("policy", "reference") else f"{side}_{name}"
            split[key] = half
    return split
