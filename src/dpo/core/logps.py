"""From logits to the log-probability of a response, and what is computed from whole
distributions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged where it is float32 or float64 already.

    A log-softmax in bfloat16 over 50,257 classes is off by tenths of a nat.
    """
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token, (N,), in nats: `z_target - log sum_v exp z_v`.

    Args:
        logits: (N, V); row n must be the model's output at the position *before* target n.
        targets: (N,), token ids.
    """
    logits = at_least_float32(logits)
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def sum_per_sequence(values: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Sum token values into their sequences, (num_sequences,), in float64.

    A running sum of hundreds of tokens in float32 loses 1e-5 nat; the sum is cheap, so it is exact.

    Args:
        values: (N,), one value a token.
        sequence: (N,), the index of the sequence that each token belongs to.
        num_sequences: how many sequences there are; one without tokens sums to 0.
    """
    total = torch.zeros(num_sequences, dtype=torch.float64, device=values.device)
    return total.index_add(0, sequence, values.double())


def token_entropy(logits: Tensor) -> Tensor:
    """`-sum_v pi(v) log pi(v)` of each next-token distribution, (N,), in nats, from logits (N, V).

    0 where one token is certain, `log V` where all are equally likely.
    """
    logps = at_least_float32(logits).log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def token_kl(policy_logits: Tensor, reference_logits: Tensor) -> Tensor:
    """`KL(policy || reference)` of the next-token distributions, (N,), in nats, never negative.

    Where the two are nearly equal, rounding gives about -1e-7 as often as 1e-7; it is cut at 0.

    Args:
        policy_logits: (N, V).
        reference_logits: (N, V), the same contexts.
    """
    policy = at_least_float32(policy_logits).log_softmax(-1)
    reference = at_least_float32(reference_logits).log_softmax(-1)
    return (policy.exp() * (policy - reference)).sum(-1).clamp(min=0)
