"""The Direct Preference Optimization loss: per pair, unreduced, on plain tensors."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO loss of each pair, (B,): the negative log-likelihood of the preference, in nats.

    With the implicit reward `r(x, y) = beta log(pi(y|x) / pi_ref(y|x))`, the Bradley-Terry model
    gives `P(chosen > rejected) = sigmoid(u)`, `u = r(x, chosen) - r(x, rejected)` the margin, and

        loss = -(1 - eps) log sigmoid(u) - eps log sigmoid(-u).

    Rafailov et al. 2023 (arXiv:2305.18290), Eq. 7; `eps = label_smoothing` is the probability that
    a label is flipped ("conservative DPO", E. Mitchell 2023) and 0 gives the paper's loss.

    Args:
        policy_chosen_logps: log pi(chosen|x), summed over the response's tokens, (B,), in nats.
        policy_rejected_logps: log pi(rejected|x), (B,).
        reference_chosen_logps: log pi_ref(chosen|x), (B,); no gradient flows through it.
        reference_rejected_logps: log pi_ref(rejected|x), (B,).
        beta: strength of the pull towards the reference, > 0; the reward is in units of it.
        label_smoothing: in [0, 1/2).

    >>> import torch
    >>> w, l, ref = torch.tensor([-10.0]), torch.tensor([-12.0]), torch.tensor([-11.0])
    >>> round(dpo(w, l, ref, ref, beta=0.5).item(), 4)  # log(1 + e^-1)
    0.3133
    >>> round(dpo(w, l, w, l, beta=0.5).item(), 4)  # policy = reference: log 2
    0.6931
    """
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps.detach()
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps.detach()
    margin = beta * (chosen_log_ratio - rejected_log_ratio)
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
