"""Preference losses of a pair that look at single tokens or next-token distributions.

Notation is that of `losses`. Besides its tensors there are, all without gradient unless said:

    policy_chosen_token_logps, ...     log pi(y_t | x, y_<t), (B, T), with gradient
    reference_chosen_token_logps, ...  the same under the reference
    policy_chosen_token_log_collision, ...   log sum_v pi(v | x, y_<t)^2, (B, T)
    chosen_forward_kl, ...             sum_t KL(pi_ref(. | x, y_<t) || pi(. | x, y_<t)), (B,), in
                                       nats, over the response's tokens, with gradient
    reference_chosen_entropy, ...      sum_t of the entropy of pi_ref(. | x, y_<t), (B,), in nats

The first `chosen_lengths` columns of a (B, T) tensor are the response's tokens, the rest is padding
and 0. T may differ between chosen and rejected.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpo.core.losses import dpo, margin, softplus


def tdpo1(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_forward_kl: Tensor,
    rejected_forward_kl: Tensor,
    *,
    beta: float,
) -> Tensor:
    """TDPO1, (B,): DPO with each token's divergence from the reference in the margin; in nats.

        loss = sp(-beta [h_w - h_l - (D_l - D_w)]),    D = sum_t KL(pi_ref || pi) = forward_kl

    Both divergences have a gradient.

    Zeng et al. 2024 (arXiv:2404.11999). Absent from TRL.

    >>> zero, one = torch.zeros(1), torch.ones(1)
    >>> round(tdpo1(zero, zero, zero, zero, one, zero, beta=1.0).item(), 4)  # sp(-1)
    0.3133
    """
    gap = margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return softplus(-beta * (gap - (rejected_forward_kl - chosen_forward_kl)))


def tdpo2(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_forward_kl: Tensor,
    rejected_forward_kl: Tensor,
    *,
    beta: float,
    alpha: float,
) -> Tensor:
    """TDPO2, (B,): TDPO1 with a weight, in which only the rejected response's divergence shrinks.

        loss = sp(-beta [h_w - h_l - alpha (D_l - D_w)]),    D = sum_t KL(pi_ref || pi) = forward_kl

    without gradient through D_w; in nats.

    Zeng et al. 2024 (arXiv:2404.11999). Absent from TRL.

    >>> zero, one = torch.zeros(1), torch.ones(1)
    >>> round(tdpo2(zero, zero, zero, zero, one, zero, beta=1.0, alpha=0.5).item(), 4)  # sp(-1/2)
    0.4741
    """
    gap = margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return softplus(-beta * (gap - alpha * (rejected_forward_kl - chosen_forward_kl.detach())))


def ld_dpo(
    policy_chosen_token_logps: Tensor,
    policy_rejected_token_logps: Tensor,
    reference_chosen_token_logps: Tensor,
    reference_rejected_token_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    alpha: float,
) -> Tensor:
    """LD-DPO, (B,): DPO in which the longer response's surplus tokens count less; in nats.

        loss = sp(-beta (h_w - h_l)),    h = sum_{t <= n} h_t + alpha sum_{t > n} h_t

    with `h_t` the log-ratio of token t and `n = min(|w|, |l|)`; `alpha = 1` is DPO and `alpha = 0`
    cuts both responses to the same length.

    W. Liu et al. 2024 (arXiv:2409.06411), on the log-probabilities of both models. TRL's `ld_alpha`
    is the same; some code weights the policy's alone.

    >>> w, l = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0]])
    >>> tensors = w, l, 0 * w, 0 * l, torch.tensor([3]), torch.tensor([1])
    >>> round(ld_dpo(*tensors, beta=1.0, alpha=0.5).item(), 4)  # sp(-(1 + 6/2 - 1))
    0.0486
    """
    shared = torch.minimum(chosen_lengths, rejected_lengths).unsqueeze(-1)

    def desensitised_log_ratio(policy: Tensor, reference: Tensor) -> Tensor:
        position = torch.arange(policy.shape[-1], device=policy.device)
        token_log_ratio = policy - reference.detach()
        return torch.where(position < shared, token_log_ratio, alpha * token_log_ratio).sum(-1)

    chosen = desensitised_log_ratio(policy_chosen_token_logps, reference_chosen_token_logps)
    rejected = desensitised_log_ratio(policy_rejected_token_logps, reference_rejected_token_logps)
    return softplus(-beta * (chosen - rejected))


def wpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    policy_chosen_token_logps: Tensor,
    policy_rejected_token_logps: Tensor,
    policy_chosen_token_log_collision: Tensor,
    policy_rejected_token_log_collision: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    max_weight: float,
) -> Tensor:
    """WPO, (B,): DPO's loss, times how likely the policy itself is to say the two responses; nats.

        loss = W sp(-u),    W = min(W_w W_l, max_weight)

    with the weights of `wpo_weight`. There is no gradient through W, hence none to the (B, T)
    tensors.

    W. Zhou et al. 2024 (arXiv:2406.11827), Eq. 2. The authors' code has `max_weight = 1`. TRL's
    `use_weighting` is the same with infinity: it does not cut.

    >>> zero, token = torch.zeros(1), torch.full((1, 2), 0.5).log()
    >>> sums, lengths = (zero, zero, zero, zero), (torch.tensor([2]), torch.tensor([2]))
    >>> collision = torch.full((1, 2), 0.5).log()  # one of two tokens by a fair coin: W = 1
    >>> tensors = *sums, token, token, collision, collision, *lengths
    >>> round(wpo(*tensors, beta=1.0, max_weight=1.0).item(), 4)
    0.6931
    """
    weight = wpo_weight(
        policy_chosen_token_logps, policy_chosen_token_log_collision, chosen_lengths
    ) * wpo_weight(
        policy_rejected_token_logps, policy_rejected_token_log_collision, rejected_lengths
    )
    loss = dpo(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
    )
    return weight.clamp(max=max_weight) * loss


def wpo_weight(token_logps: Tensor, token_log_collision: Tensor, lengths: Tensor) -> Tensor:
    """WPO's weight of one response, (B,), without gradient.

        W_y = exp( mean_t [log pi(y_t) - log sum_v pi(v)^2] )

    The second term is the mean of the first over tokens drawn from pi, on the scale of
    probabilities: a response that the policy itself would have written has a weight near 1.

    >>> fair = torch.full((1, 3), 0.5).log()
    >>> wpo_weight(fair, fair, torch.tensor([3])).item()
    1.0
    """
    aligned = (token_logps - token_log_collision).detach()
    return (aligned.sum(-1) / lengths).exp()


def mallows_po(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    reference_chosen_entropy: Tensor,
    reference_rejected_entropy: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    dispersion_scale: float,
    vocab_size: int,
) -> Tensor:
    """MallowsPO-theta, (B,): DPO with a margin that counts less where opinions are dispersed; nats.

        loss = sp(-phi u),    phi = -c log( (H_w / |w| + H_l / |l|) / (2 log V) )

    with `c = dispersion_scale`, `V = vocab_size` and H the reference's entropy summed over tokens:
    the logarithm is of the mean entropy of a token as a share of the largest possible. phi is 0 for
    a reference that could say anything, and large for one that is sure.

    H. Chen et al. 2024 (arXiv:2405.14953), with the entropy estimate of the authors' code. By
    default that code also has log-probabilities per token and no reference. Absent from TRL.

    >>> zero, one, length = torch.zeros(1), torch.ones(1), torch.tensor([1])
    >>> half = torch.full((1,), math.log(8) / 2)  # half of the largest entropy: phi = c log 2
    >>> tensors = one, zero, zero, zero, half, half, length, length
    >>> loss = mallows_po(*tensors, beta=1.0, dispersion_scale=1 / math.log(2), vocab_size=8)
    >>> round(loss.item(), 4)  # sp(-1)
    0.3133
    """
    u = beta * margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    chosen_entropy = reference_chosen_entropy.detach() / chosen_lengths
    rejected_entropy = reference_rejected_entropy.detach() / rejected_lengths
    share = (chosen_entropy + rejected_entropy) / (2 * math.log(vocab_size))
    # A reference that is certain of every token has share 0, whose logarithm is not finite.
    dispersion = -dispersion_scale * share.clamp(min=torch.finfo(share.dtype).tiny).log()
    return softplus(-dispersion * u)
