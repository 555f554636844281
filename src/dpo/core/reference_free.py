"""Preference losses of a pair that need no reference model: per pair, unreduced.

Tensors, shapes and notation are those of `losses`; `l_w, l_l` are log pi(y|x) of the chosen and the
rejected response, summed over their `|w|, |l|` tokens. Losses with a likelihood term have its
weight as `nll_weight`; 0 leaves it out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpo.core.losses import bounded_exp, softplus


def nll(policy_chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """Negative log-likelihood of the chosen response per token, (B,), in nats: SFT on the winners.

        loss = -l_w / |w|

    Added to DPO it is the "RPO" of Pang et al. 2024 (arXiv:2404.19733), divided by the length as
    here, and of Z. Liu et al. 2024 (arXiv:2405.16436), not divided. TRL's `sft` differs: it
    averages over all tokens of a batch, so that long responses weigh more; here pairs weigh the
    same.

    >>> nll(torch.tensor([-6.0]), torch.tensor([3])).item()
    2.0
    """
    return -policy_chosen_logps / chosen_lengths


def unlikelihood(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, *, alpha: float
) -> Tensor:
    """Unlikelihood, (B,): the chosen response likelier, the rejected one less likely; nats.

        loss = -l_w + alpha l_l

    A baseline of Rafailov et al. 2023 (arXiv:2305.18290), Section 6, after Welleck et al. 2019
    (arXiv:1908.04319), whose own loss is -log(1 - p) of single tokens. Its gradient is DPO's
    without the weight `beta sigmoid(-u)` (when alpha is 1): nothing tells it that a pair is learnt,
    so it has no lower bound, and trained for long it takes the policy apart. TRL has no such loss.

    >>> unlikelihood(torch.tensor([-6.0]), torch.tensor([-9.0]), alpha=0.5).item()
    1.5
    """
    return alpha * policy_rejected_logps - policy_chosen_logps


def simpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    gamma: float,
) -> Tensor:
    """SimPO, (B,): the mean log-probability of a token is the reward, with a target margin; nats.

        loss = sp(-[beta (l_w / |w| - l_l / |l|) - gamma])

    Meng et al. 2024 (arXiv:2405.14734). TRL's CPO trainer with `loss_type="simpo"` is the
    same when its `cpo_alpha` is 0.

    >>> length = torch.tensor([4])
    >>> w, l = torch.tensor([-4.0]), torch.tensor([-8.0])
    >>> round(simpo(w, l, length, length, beta=2.0, gamma=1.0).item(), 4)  # sp(-1)
    0.3133
    """
    gap = policy_chosen_logps / chosen_lengths - policy_rejected_logps / rejected_lengths
    return softplus(-(beta * gap - gamma))


def cpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    *,
    beta: float,
    nll_weight: float,
) -> Tensor:
    """CPO, (B,): DPO with a uniform reference, and the likelihood of the chosen response; nats.

        loss = sp(-beta (l_w - l_l)) + nll_weight (-l_w / |w|)

    H. Xu et al. 2024 (arXiv:2401.08417), Eq. 3 for the first term. The paper writes the likelihood
    as `-l_w`, a sum over tokens, which for long responses outweighs the preference; here it is per
    token, as in TRL's CPO trainer (`cpo_alpha`). TRL averages over all tokens of a batch, this
    function over those of one response.

    >>> w, l, length = torch.tensor([-4.0]), torch.tensor([-4.0]), torch.tensor([4])
    >>> round(cpo(w, l, length, beta=0.1, nll_weight=1.0).item(), 4)  # log 2 + 1
    1.6931
    """
    preference = softplus(-beta * (policy_chosen_logps - policy_rejected_logps))
    return preference - nll_weight * policy_chosen_logps / chosen_lengths


def orpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    nll_weight: float,
) -> Tensor:
    """ORPO, (B,): likelihood of the chosen response, and its odds against the rejected one; nats.

        loss = nll_weight (-m_w) + beta sp(-[lo(m_w) - lo(m_l)])
        lo(m) = m - log(1 - e^m),    m = log pi(y|x) / |y|

    Hong et al. 2024 (arXiv:2403.07691), Eqs. 4 and 7; `beta` is the paper's `lambda` and the
    paper has `nll_weight = 1`. Where m is closer to 0 than rounding lets `1 - e^m` be seen, it is
    taken to be there, so that the odds stay finite.

    TRL's odds term is the same. Its likelihood term differs: it counts the prompt's tokens too, and
    averages over all tokens of a batch.

    >>> length = torch.tensor([2])
    >>> w = 2 * torch.tensor([0.75]).log()  # odds 3 against 1
    >>> l = 2 * torch.tensor([0.5]).log()
    >>> round(orpo(w, l, length, length, beta=1.0, nll_weight=0.0).item(), 4)  # -log(3 / 4)
    0.2877
    """
    chosen, rejected = (
        policy_chosen_logps / chosen_lengths,
        policy_rejected_logps / rejected_lengths,
    )
    return -nll_weight * chosen + beta * softplus(_log_odds(rejected) - _log_odds(chosen))


def _log_odds(log_probability: Tensor) -> Tensor:
    """`log(p / (1 - p))` from log p <= 0, any shape."""
    log_probability = log_probability.clamp(max=-torch.finfo(log_probability.dtype).eps)
    return log_probability - torch.log(-torch.expm1(log_probability))


def alpha_po(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    gamma: float,
    alpha: float,
) -> Tensor:
    """AlphaPO, (B,): SimPO with the reward bent by a power; in nats.

        loss = sp(-[beta (r_w - r_l) - gamma]),    r = (1 - e^(-alpha m)) / alpha,  m = l / |y|

    `alpha` is not 0; towards 0 it is SimPO. For `alpha > 0` the reward falls faster the less likely
    a response is.

    Gupta et al. 2025 (arXiv:2501.03884). Where `-alpha m` exceeds 30 the power goes on along its
    tangent, so that no pair overflows. TRL's CPO trainer with `alpha` is the same where it is
    finite.

    >>> length = torch.tensor([1])
    >>> w, l = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()  # alpha = 1: r = 1 - 1 / p
    >>> round(alpha_po(w, l, length, length, beta=1.0, gamma=1.0, alpha=1.0).item(), 4)  # sp(-1)
    0.3133
    """
    chosen, rejected = (
        policy_chosen_logps / chosen_lengths,
        policy_rejected_logps / rejected_lengths,
    )
    reward_gap = (bounded_exp(-alpha * rejected) - bounded_exp(-alpha * chosen)) / alpha
    return softplus(-(beta * reward_gap - gamma))


def slic(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    delta: float,
    nll_weight: float,
) -> Tensor:
    """SLiC, (B,): the chosen response is to be likelier by a margin, and likely by itself; nats.

        loss = max(0, delta - l_w + l_l) + nll_weight (-l_w)

    Y. Zhao et al. 2023, SLiC-HF (arXiv:2305.10425), with the chosen response as the target of the
    likelihood term, a sum over tokens as in the paper. TRL's `hinge` is another loss: RSO's, on
    log-ratios (`losses.hinge`).

    >>> w, l = torch.tensor([-4.0]), torch.tensor([-4.5])
    >>> slic(w, l, delta=1.0, nll_weight=0.25).item()  # 0.5 + 1
    1.5
    """
    shortfall = (delta - policy_chosen_logps + policy_rejected_logps).clamp(min=0)
    return shortfall - nll_weight * policy_chosen_logps
