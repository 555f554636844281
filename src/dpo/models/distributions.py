"""What losses want of single tokens and of whole next-token distributions, along responses."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dpo.core.logps import sum_per_sequence, token_logps
from dpo.data.tokenize import TokenSequence
from dpo.models.scoring import scored_logits

OF_POLICY = frozenset({"policy_token_logps", "policy_token_log_collision"})
OF_REFERENCE = frozenset({"reference_token_logps", "reference_entropy"})
OF_BOTH = frozenset({"forward_kl"})


def along_responses(
    policy: nn.Module,
    reference: nn.Module | None,
    sequences: Sequence[TokenSequence],
    wanted: Collection[str],
    *,
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """What is wanted of each sequence, by name. All logits of the sequences exist at once.

    policy_token_logps,          log-probability of each scored token, (S, T), 0 after a sequence's
    reference_token_logps        end; the policy's carry the gradient
    policy_token_log_collision   log sum_v pi(v)^2 at each, (S, T), no gradient
    forward_kl                   sum_t KL(pi_ref || pi), (S,), with gradient, in nats
    reference_entropy            sum_t of the reference's entropy, (S,), in nats
    """
    names = set(wanted)
    sizes = [s.num_scored for s in sequences]
    found: dict[str, Tensor] = {}
    reference_logs: Tensor | None = None
    if names & (OF_REFERENCE | OF_BOTH):
        assert reference is not None
        with torch.no_grad():
            logits, targets, owner = scored_logits(reference, sequences, precision=precision)
            reference_logs = logits.log_softmax(-1)
            if "reference_token_logps" in names:
                tokens = reference_logs.gather(-1, targets[:, None]).squeeze(-1)
                found["reference_token_logps"] = _rows(tokens, sizes)
            if "reference_entropy" in names:
                entropy = -(reference_logs.exp() * reference_logs).sum(-1)
                found["reference_entropy"] = sum_per_sequence(entropy, owner, len(sizes))
    if names & (OF_POLICY | OF_BOTH):
        logits, targets, owner = scored_logits(policy, sequences, precision=precision)
        if "policy_token_logps" in names:
            found["policy_token_logps"] = _rows(token_logps(logits, targets), sizes)
        if "policy_token_log_collision" in names:
            with torch.no_grad():
                collision = (2 * logits.log_softmax(-1)).logsumexp(-1)
            found["policy_token_log_collision"] = _rows(collision, sizes)
        if "forward_kl" in names:
            assert reference_logs is not None
            gap = reference_logs - logits.log_softmax(-1)
            kl = (reference_logs.exp() * gap).sum(-1)
            found["forward_kl"] = sum_per_sequence(kl, owner, len(sizes))
    return found


def _rows(values: Tensor, sizes: list[int]) -> Tensor:
    """(M,) token values as (S, T), padded with 0."""
    return pad_sequence(list(values.split(sizes)), batch_first=True)
