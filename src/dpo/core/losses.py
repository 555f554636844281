"""Preference losses of a pair, from the DPO loss on: per pair, unreduced, on plain tensors.

Every function takes tensors by position, hyper-parameters by keyword, and returns the loss of each
pair, (B,). The names of the tensors say what they are:

    policy_chosen_logps, ...      log pi(y|x) summed over the response's tokens, (B,), in nats
    reference_chosen_logps, ...   the same under the reference; no gradient flows through it
    chosen_lengths, ...           number of tokens in that sum, (B,), at least 1
    chosen_scores, ...            a rating of the response that came with the data, (B,)
    running_margin, reward_shift  running means that the caller keeps and updates, 0-dimensional

In the equations `h_w, h_l` are the log-ratios `log pi(y|x) - log pi_ref(y|x)` of the chosen and the
rejected response, `|w|, |l|` their lengths, `u = beta (h_w - h_l)` the margin, `s` the sigmoid and
`sp(u) = log(1 + e^u)`, so that `sp(-u) = -log s(u)` is the loss of DPO.

A loss depends on its own pair alone unless its docstring says otherwise. Losses that need no
reference are in `reference_free`, those that look at single tokens in `token_level`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo.errors import InputError


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
    a label is flipped ("conservative DPO", E. Mitchell 2023) and 0 gives the paper's loss. TRL's
    `sigmoid` is that one, and ignores its label smoothing.

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


def robust(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """Robust DPO (rDPO), (B,): DPO's loss, kept unbiased when labels are flipped at a known rate.

        loss = [(1 - eps) sp(-u) - eps sp(u)] / (1 - 2 eps),    eps = label_smoothing

    Averaged over labels flipped with probability `eps` it is the DPO loss of the true label. Its
    slope tends to `-eps / (1 - 2 eps)`: it has no lower bound, and on separable data no minimum.

    Chowdhury et al. 2024 (arXiv:2403.00409). TRL's `robust` is the same.

    >>> zero = torch.zeros(1)
    >>> u = torch.tensor([math.log(3.0)])  # sp(-u) = log 4/3, sp(u) = log 4
    >>> round(robust(u, zero, zero, zero, beta=1.0, label_smoothing=0.25).item(), 4)
    -0.2616
    """
    u = beta * margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    true, flipped = softplus(-u), softplus(u)
    return ((1 - label_smoothing) * true - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """IPO, (B,): squared distance of the log-ratio margin from a finite target, in nats squared.

        loss = (h_w - h_l - 1 / (2 beta))^2

    `beta` is the paper's `tau`. Where every pair has one sure winner DPO's margin grows without
    bound; this one stops at `1 / (2 beta)`.

    Azar et al. 2023 (arXiv:2310.12036), Eq. 17. Log-ratios are sums over tokens, as in the paper.
    TRL's `ipo` differs: it divides each log-ratio by its response's length.

    >>> zero = torch.zeros(1)
    >>> ipo(zero, zero, zero, zero, beta=0.5).item()  # policy = reference: 1 / (4 beta^2)
    1.0
    """
    gap = margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return (gap - 1 / (2 * beta)) ** 2


def hinge(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Hinge loss on DPO's margin, (B,): nothing to gain beyond a margin of 1.

        loss = max(0, 1 - u)

    T. Liu et al. 2023, RSO (arXiv:2309.06657), there "hinge-norm". TRL's `hinge` is the same.
    SLiC's hinge has no reference and is `reference_free.slic`.

    >>> zero = torch.zeros(2)
    >>> hinge(torch.tensor([0.0, 3.0]), zero, zero, zero, beta=0.5).tolist()
    [1.0, 0.0]
    """
    u = beta * margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return (1 - u).clamp(min=0)


def exo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """EXO on pairs, (B,): KL(model || label), where smoothed DPO is KL(label || model); in nats.

        loss = s(u) log[s(u) / (1 - eps)] + s(-u) log[s(-u) / eps],    eps = label_smoothing > 0

    It is 0 where `u = logit(1 - eps)`, and almost flat where the model is surely wrong.

    Ji et al. 2024 (arXiv:2402.00856), Eq. 16. TRL's `exo_pair` is the same; its `label_smoothing`
    is 1e-3 when none is given, the authors' code uses e^-10.

    >>> zero = torch.zeros(1)
    >>> u = torch.tensor([math.log(9.0)])
    >>> round(abs(exo(u, zero, zero, zero, beta=1.0, label_smoothing=0.1).item()), 4)
    0.0
    """
    u = beta * margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    log_right, log_wrong = logsigmoid(u), logsigmoid(-u)
    return log_right.exp() * (log_right - math.log1p(-label_smoothing)) + log_wrong.exp() * (
        log_wrong - math.log(label_smoothing)
    )


def nca_pair(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """NCA on pairs, (B,): each response is told from noise by itself; in nats.

        loss = sp(-beta h_w) + sp(beta h_w) / 2 + sp(beta h_l) / 2

    Raising both log-ratios alike is not free, as it is in DPO: chosen likelihoods are held up.

    H. Chen et al. 2024 (arXiv:2402.05369). TRL's `nca_pair` is the same.

    >>> zero = torch.zeros(1)
    >>> round(nca_pair(zero, zero, zero, zero, beta=0.1).item(), 4)  # 2 log 2
    1.3863
    """
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps.detach()
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps.detach()
    chosen_reward, rejected_reward = beta * chosen_log_ratio, beta * rejected_log_ratio
    return softplus(-chosen_reward) + softplus(chosen_reward) / 2 + softplus(rejected_reward) / 2


def bco_pair(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    reward_shift: Tensor,
    *,
    beta: float,
) -> Tensor:
    """BCO on pairs, (B,): chosen rewards are classified above a threshold, rejected below; nats.

        loss = sp(-(beta h_w - delta)) + sp(beta h_l - delta),    delta = reward_shift

    `delta` is the mean of all rewards seen, chosen and rejected, without gradient; keep it with
    `unpaired.update_reward_shift`. `unpaired.bco` is the same loss on single responses.

    Jung et al. 2024 (arXiv:2404.04656). TRL's `bco_pair` differs: it drops `delta`.

    >>> zero = torch.zeros(1)
    >>> round(bco_pair(zero, zero, zero, zero, torch.tensor(0.0), beta=0.1).item(), 4)  # 2 log 2
    1.3863
    """
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps.detach()
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps.detach()
    shift = reward_shift.detach()
    return softplus(shift - beta * chosen_log_ratio) + softplus(beta * rejected_log_ratio - shift)


def sppo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """SPPO with hard labels, (B,): log-ratios are regressed on +-1 / (2 beta); nats squared.

        loss = (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2

    Y. Wu et al. 2024 (arXiv:2405.00675), Eq. 4.7, with `eta = 1 / beta` and the winning probability
    P set to 1 for the chosen response and 0 for the rejected; `sppo_soft` takes P from the data.
    TRL's `sppo_hard` is the same. The authors' code halves it.

    >>> zero = torch.zeros(1)
    >>> sppo(zero, zero, zero, zero, beta=0.5).item()  # policy = reference: 1 / (2 beta^2)
    2.0
    """
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps.detach()
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps.detach()
    target = 1 / (2 * beta)
    return (chosen_log_ratio - target) ** 2 + (rejected_log_ratio + target) ** 2


def sppo_soft(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float,
) -> Tensor:
    """SPPO, (B,): log-ratios are regressed on how often a response beats the policy's own.

        loss = (h_w - (P_w - 1/2) / beta)^2 + (h_l - (P_l - 1/2) / beta)^2

    `P = scores` in [0, 1] is the probability that the response is preferred to one of the current
    policy. In nats squared.

    Y. Wu et al. 2024 (arXiv:2405.00675), Eq. 4.7, with `eta = 1 / beta`. Absent from TRL.

    >>> zero, half = torch.zeros(1), torch.full((1,), 0.5)
    >>> sppo_soft(zero, zero, zero, zero, half, half, beta=0.5).item()
    0.0
    """
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps.detach()
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps.detach()
    chosen_target = (chosen_scores.detach().to(chosen_log_ratio.dtype) - 0.5) / beta
    rejected_target = (rejected_scores.detach().to(rejected_log_ratio.dtype) - 0.5) / beta
    return (chosen_log_ratio - chosen_target) ** 2 + (rejected_log_ratio - rejected_target) ** 2


def aot(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """AOT on pairs, (B,): the policy's margins are to dominate the reference's as distributions.

        loss_i = sp(-beta (m_i - n_(i)))

    with `m_i = log pi(w|x) - log pi(l|x)` the margin of pair i, `n` the same of the reference, and
    `n_(i)` the reference's margin of the rank that `m_i` has among the policy's; in nats.

    **Depends on the batch**: ranks are taken in the batch given, which must be the whole batch of a
    step. A batch of one is DPO.

    Melnyk et al. 2024 (arXiv:2406.05882), with the logistic loss. TRL's `aot` has the same mean; it
    sorts each device's part on its own.

    >>> zero = torch.zeros(2)
    >>> m, n = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 3.0])
    >>> [round(x, 4) for x in aot(m, zero, n, zero, beta=1.0).tolist()]  # the same margins, sorted
    [0.6931, 0.6931]
    """
    policy_margin = policy_chosen_logps - policy_rejected_logps
    reference_margin = (reference_chosen_logps - reference_rejected_logps).detach()
    rank = policy_margin.detach().argsort(stable=True).argsort()
    return softplus(-beta * (policy_margin - reference_margin.sort().values[rank]))


def apo_zero(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """APO-zero, (B,), in [0, 2]: chosen responses become likelier, rejected ones less likely.

        loss = 1 - s(beta h_w) + s(beta h_l)

    For chosen responses that are better than what the model would say.

    D'Oosterlinck et al. 2024 (arXiv:2408.06266), Eq. 7. TRL's `apo_zero` is the same.

    >>> zero = torch.zeros(1)
    >>> apo_zero(zero, zero, zero, zero, beta=0.1).item()
    1.0
    """
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps.detach()
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps.detach()
    return torch.sigmoid(-beta * chosen_log_ratio) + torch.sigmoid(beta * rejected_log_ratio)


def apo_down(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """APO-down, (B,), in [0, 2]: both responses become less likely, the rejected one faster.

        loss = s(beta h_w) + 1 - s(u)

    For chosen responses that are worse than what the model would say.

    D'Oosterlinck et al. 2024 (arXiv:2408.06266), Eq. 8. TRL's `apo_down` is the same.

    >>> zero = torch.zeros(1)
    >>> apo_down(zero, zero, zero, zero, beta=0.1).item()
    1.0
    """
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps.detach()
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps.detach()
    u = beta * (chosen_log_ratio - rejected_log_ratio)
    return torch.sigmoid(beta * chosen_log_ratio) + torch.sigmoid(-u)


def discopop(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    tau: float,
) -> Tensor:
    """DiscoPOP, (B,): a loss found by a language model, logistic on the left, exponential right.

        loss = (1 - g) sp(-u) + g e^-u,    g = s(u / tau),  0 < tau <= 1

    C. Lu et al. 2024 (arXiv:2406.08414), Eq. 5 (their `tau` is 0.05). TRL's `discopop` is the same
    where it is finite: `e^-u` overflows there for large negative margins, and here `g e^-u` is one
    exponential.

    >>> zero = torch.zeros(1)
    >>> round(discopop(zero, zero, zero, zero, beta=0.1, tau=0.05).item(), 4)  # (log 2 + 1) / 2
    0.8466
    """
    u = beta * margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    logistic = torch.sigmoid(-u / tau) * softplus(-u)
    exponential = torch.exp(logsigmoid(u / tau) - u)
    return logistic + exponential


def f_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"],
    alpha: float | None,
) -> Tensor:
    """f-DPO, (B,): DPO for a policy kept near the reference by another f-divergence; in nats.

        loss = sp(-beta [f'(rho_w) - f'(rho_l)]),    rho = e^h = pi / pi_ref

        reverse_kl   f'(rho) = log rho                DPO itself
        forward_kl   f'(rho) = -1 / rho
        js           f'(rho) = log(2 rho / (1 + rho))
        alpha        f'(rho) = -rho^-alpha / alpha    0 < alpha < 1: from reverse to forward KL

    each up to a constant, which cancels. `alpha` is a number for that divergence and None for the
    others.

    C. Wang et al. 2023 (arXiv:2309.16240). Where `rho` is below e^-30 the powers of `1 / rho` go on
    along their tangent, so that no pair overflows. TRL's `f_alpha_divergence_coef` is `1 - alpha`;
    its powers are cut at e^80, where it has no gradient any more.

    Raises:
        InputError: the divergence is unknown, or `alpha` is missing or has no effect.

    >>> zero = torch.zeros(1)
    >>> w = torch.tensor([math.log(2.0)])  # f'(2) - f'(1) = -1/2 + 1
    >>> round(f_dpo(w, zero, zero, zero, beta=1.0, divergence="forward_kl", alpha=None).item(), 4)
    0.4741
    """
    if (alpha is None) == (divergence == "alpha"):
        raise InputError(f"alpha belongs to the divergence 'alpha', got {alpha} and {divergence!r}")
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps.detach()
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps.detach()
    if divergence == "reverse_kl":
        slope_gap = chosen_log_ratio - rejected_log_ratio
    elif divergence == "forward_kl":
        slope_gap = bounded_exp(-rejected_log_ratio) - bounded_exp(-chosen_log_ratio)
    elif divergence == "js":
        slope_gap = logsigmoid(chosen_log_ratio) - logsigmoid(rejected_log_ratio)
    elif divergence == "alpha":
        assert alpha is not None
        powers = bounded_exp(-alpha * rejected_log_ratio) - bounded_exp(-alpha * chosen_log_ratio)
        slope_gap = powers / alpha
    else:
        raise InputError(
            f"divergence must be reverse_kl, forward_kl, js or alpha, got {divergence!r}"
        )
    return softplus(-beta * slope_gap)


def chi_po(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    max_reward: float,
) -> Tensor:
    """Chi-squared preference optimisation, (B,): DPO with a link that fears unseen responses; nats.

        loss = sp(-clip(beta [(rho_w + h_w) - (rho_l + h_l)])),    rho = e^h = pi / pi_ref

    `clip` cuts at +-2 R, `R = max_reward`, the largest reward; infinity for no cut. Pairs beyond it
    have no gradient.

    A. Huang et al. 2024 (arXiv:2407.13399): `f'(rho) = rho + log rho` in f-DPO, the sum of the
    chi-squared and the KL divergence. Not XPO. Where `rho` exceeds e^30 it goes on along its
    tangent, so that no pair overflows. Absent from TRL.

    >>> zero = torch.zeros(1)
    >>> round(chi_po(zero, zero, zero, zero, beta=0.1, max_reward=1.0).item(), 4)  # log 2
    0.6931
    """
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps.detach()
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps.detach()
    chosen_link = bounded_exp(chosen_log_ratio) + chosen_log_ratio
    rejected_link = bounded_exp(rejected_log_ratio) + rejected_log_ratio
    u = beta * (chosen_link - rejected_link)
    return softplus(-u.clamp(min=-2 * max_reward, max=2 * max_reward))


def squared_po(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """SquaredPO, (B,): f-DPO with `f(rho) = (log rho)^2 / 2`, against falling likelihoods; nats.

        loss = sp(-beta [h_w / rho_w - h_l / rho_l]),    rho = e^h = pi / pi_ref

    `f' = log(rho) / rho` rises only up to `rho = e`: there is nothing to gain from a chosen
    response that is more than e times as likely as under the reference.

    Pipano et al. 2026 (arXiv:2602.06788); derived here from their f, not compared with their own
    equation. Where `rho` is below e^-30, `1 / rho` goes on along its tangent, so that no pair
    overflows. Absent from TRL.

    >>> zero = torch.zeros(1)
    >>> w = torch.ones(1)  # f'(e) = 1 / e
    >>> round(squared_po(w, zero, zero, zero, beta=1.0).item(), 4)
    0.526
    """
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps.detach()
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps.detach()
    chosen_slope = chosen_log_ratio * bounded_exp(-chosen_log_ratio)
    rejected_slope = rejected_log_ratio * bounded_exp(-rejected_log_ratio)
    return softplus(-beta * (chosen_slope - rejected_slope))


def r_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
    alpha: float,
) -> Tensor:
    """Length-regularised DPO (R-DPO), (B,): DPO for the reward minus `alpha` per token; in nats.

        loss = sp(-[u + alpha (|w| - |l|)])

    A longer winner is explained by its length first. The sign is the one that penalises length:
    the minimiser is the optimal policy of `r - alpha |y|`.

    Park et al. 2024 (arXiv:2403.19159). Absent from TRL; other code has the opposite sign.

    >>> zero, short, long = torch.zeros(1), torch.tensor([2]), torch.tensor([12])
    >>> round(r_dpo(zero, zero, zero, zero, long, short, beta=0.1, alpha=0.1).item(), 4)  # sp(-1)
    0.3133
    """
    u = beta * margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    return softplus(-(u + alpha * (chosen_lengths - rejected_lengths).to(u.dtype)))


def length_normalised_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
) -> Tensor:
    """DPO on log-ratios per token, (B,); in nats.

        loss = sp(-beta (h_w / |w| - h_l / |l|))

    Lambert et al. 2024, Tülu 3 (arXiv:2411.15124). TRL's `sigmoid_norm` is the same.

    >>> zero = torch.zeros(1)
    >>> w, length = torch.tensor([8.0]), torch.tensor([4])
    >>> round(length_normalised_dpo(w, zero, zero, zero, length, length, beta=0.5).item(), 4)
    0.3133
    """
    gap = average_margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        chosen_lengths,
        rejected_lengths,
    )
    return softplus(-beta * gap)


def dpop(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    penalty: float,
) -> Tensor:
    """DPO-Positive (Smaug), (B,): DPO that charges for chosen responses becoming less likely; nats.

        loss = sp(-beta [h_w - h_l - lambda max(0, -h_w)]),    lambda = penalty

    Pal et al. 2024 (arXiv:2402.13228). The penalty is inside the sigmoid, as in the paper; some
    accounts put it outside. Absent from TRL.

    >>> zero = torch.zeros(1)
    >>> both_fell = torch.tensor([-1.0]), torch.tensor([-3.0])  # margin 2, penalty 2 x 1
    >>> round(dpop(*both_fell, zero, zero, beta=0.1, penalty=2.0).item(), 4)
    0.6931
    """
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps.detach()
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps.detach()
    drop = (-chosen_log_ratio).clamp(min=0)
    return softplus(-beta * (chosen_log_ratio - rejected_log_ratio - penalty * drop))


def beta_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    running_margin: Tensor,
    *,
    beta: float,
    margin_scale: float,
) -> Tensor:
    """beta-DPO, (B,): DPO whose beta rises in batches with larger margins than usual; in nats.

        loss = sp(-beta' D),    beta' = max(beta (1 + a (mean D - M0)), 0.001),    D = h_w - h_l

    without gradient through beta'; `a = margin_scale`, `M0 = running_margin`: the running mean of
    D, to be updated with the batch's own (`moving_average`, their momentum is 0.9) before the loss.

    **Depends on the batch**: the mean is over the pairs given, which must be the whole batch of a
    step, after the filter if there is one (`beta_dpo_selection`).

    J. Wu et al. 2024 (arXiv:2407.08639); the floor of 0.001 is in the authors' code. Absent from
    TRL.

    >>> zero = torch.zeros(1)
    >>> w = torch.tensor([2.0])  # beta' = 0.1 (1 + 0.5 (2 - 1)) = 0.15
    >>> loss = beta_dpo(w, zero, zero, zero, torch.tensor(1.0), beta=0.1, margin_scale=0.5)
    >>> round(loss.item(), 4)  # sp(-0.3)
    0.5544
    """
    gap = margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    surplus = gap.detach().mean() - running_margin.detach()
    batch_beta = (beta * (1 + margin_scale * surplus)).clamp(min=1e-3)
    return softplus(-batch_beta * gap)


def beta_dpo_selection(
    margins: Tensor,
    running_margin: Tensor,
    running_margin_std: Tensor,
    *,
    keep: float,
    generator: torch.Generator,
) -> Tensor:
    """beta-DPO's filter: which pairs of a batch to train on, (K,) ascending indices.

    `K = floor(keep B)` pairs, at least 1, drawn without replacement with weights
    `exp(-(D - M0)^2 / (2 std^2))`, so that outliers on either side are dropped first.

    J. Wu et al. 2024 (arXiv:2407.08639); they keep 80%. Drawn as the largest log-weights plus
    Gumbel noise, the same law, in which no weight underflows.

    >>> margins = torch.tensor([0.0, 900.0, 0.1, -0.1])
    >>> one = torch.tensor(1.0)
    >>> draw = torch.Generator().manual_seed(0)
    >>> beta_dpo_selection(margins, 0 * one, one, keep=0.75, generator=draw).tolist()
    [0, 2, 3]
    """
    count = max(1, math.floor(keep * len(margins)))
    standardised = (margins.detach() - running_margin) / running_margin_std
    uniform = torch.rand(
        margins.shape, generator=generator, dtype=torch.float64, device=margins.device
    ).clamp(min=torch.finfo(torch.float64).tiny)
    keys = -(standardised.double() ** 2) / 2 - torch.log(-torch.log(uniform))
    return keys.topk(count).indices.sort().values


def cal_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Cal-DPO, (B,): DPO plus a calibration of each log-ratio at +-1 / (2 beta).

        loss = sp(-(h_w - h_l)) + [(h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2] / 2

    There is no beta in the first term.

    Xiao et al. 2024 (arXiv:2412.14516); the weight 1/2 is the one of the authors' code. Absent from
    TRL.

    >>> zero = torch.zeros(1)
    >>> round(cal_dpo(zero, zero, zero, zero, beta=0.5).item(), 4)  # log 2 + (1 + 1) / 2
    1.6931
    """
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps.detach()
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps.detach()
    target = 1 / (2 * beta)
    calibration = (chosen_log_ratio - target) ** 2 + (rejected_log_ratio + target) ** 2
    return softplus(rejected_log_ratio - chosen_log_ratio) + calibration / 2


def odpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float,
    alpha: float,
) -> Tensor:
    """DPO with an offset (ODPO), (B,): the more a response is better, the wider its margin; nats.

        loss = sp(-[u - alpha log(r_w - r_l)]),    r = scores

    Amini et al. 2024 (arXiv:2402.10571), with the logarithm of the score difference as the offset.
    Absent from TRL's DPO.

    Raises:
        InputError: a chosen response does not score higher than its rejected one.

    >>> zero, one = torch.zeros(1), torch.ones(1)
    >>> round(odpo(zero, zero, zero, zero, one, zero, beta=0.1, alpha=1.0).item(), 4)  # log 1 = 0
    0.6931
    """
    u = beta * margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    score_gap = (chosen_scores - rejected_scores).detach().to(u.dtype)
    if not bool((score_gap > 0).all()):
        raise InputError(
            "ODPO takes the logarithm of chosen score - rejected score, which must be positive; "
            f"the smallest here is {score_gap.min().item():g}"
        )
    return softplus(-(u - alpha * score_gap.log()))


def rpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    beta: float,
    reward_scale: float,
    divergence: Literal["backward_kl", "forward_kl", "squared"],
) -> Tensor:
    """Reward-aware preference optimisation, (B,): the margin is to equal the reward difference.

    With `v = eta (r_w - r_l)`, `eta = reward_scale`, `r = scores`, and `q = s(v)` the probability
    that the scores give to the label:

        backward_kl   KL(q || s(u)) = q log[q / s(u)] + (1 - q) log[(1 - q) / s(-u)]    nats
        forward_kl    KL(s(u) || q)                                                     nats
        squared       (u - v)^2

    Each is 0 where `u = v`. The names are those of NeMo-Aligner, which calls the divergence
    with the *model* first "forward".

    S. Sun et al. 2025 (arXiv:2502.00203). Not the "RPO" of arXiv:2404.19733 and 2405.16436, which
    is DPO plus `reference_free.nll`. In NeMo-Aligner `rpo_bwd_kl`, `rpo_fwd_kl`,
    `rpo_sq`; absent from TRL.

    Raises:
        InputError: the divergence is unknown.

    >>> zero, one = torch.zeros(1), torch.ones(1)
    >>> options = dict(beta=0.5, reward_scale=1.0)
    >>> rpo(zero, zero, zero, zero, one, zero, divergence="squared", **options).item()
    1.0
    >>> rpo(2 * one, zero, zero, zero, one, zero, divergence="forward_kl", **options).item()
    0.0
    """
    u = beta * margin(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
    )
    v = reward_scale * (chosen_scores - rejected_scores).detach().to(u.dtype)
    if divergence == "squared":
        return (u - v) ** 2
    if divergence == "backward_kl":
        return _bernoulli_kl(v, u)
    if divergence == "forward_kl":
        return _bernoulli_kl(u, v)
    raise InputError(f"divergence must be backward_kl, forward_kl or squared, got {divergence!r}")


def alpha_dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    running_margin: Tensor,
    running_margin_std: Tensor,
    *,
    beta: float,
    gamma: float,
    alpha: float,
) -> Tensor:
    """AlphaDPO, (B,): SimPO whose target margin grows with the pair's own DPO margin; in nats.

        loss = sp(-[beta (l_w / |w| - l_l / |l|) - gamma - beta alpha z]),    l = log pi(y|x)
        z = (D - mean D) / std D,    D = h_w / |w| - h_l / |l|

    without gradient through z: the reference only sets the target. The mean and standard deviation
    are `running_margin` and `running_margin_std`, running over batches (`moving_average`, their
    momentum is 0.9) and updated with the batch's own before the loss. Given them, the loss depends
    on no other pair.

    J. Wu et al. 2024 (arXiv:2410.10148), scaled as in the authors' code: `gamma / beta` is their
    `gamma_beta_ratio`. They start both running values at 0, which makes the first z about ten times
    too large; start from the first batch's own. Absent from TRL.

    >>> zero, length, one = torch.zeros(1), torch.tensor([4]), torch.tensor(1.0)
    >>> tensors = torch.tensor([4.0]), zero, zero, zero, length, length, one, one  # D = 1, z = 0
    >>> round(alpha_dpo(*tensors, beta=2.0, gamma=1.0, alpha=0.2).item(), 4)  # sp(-1)
    0.3133
    """
    gap = policy_chosen_logps / chosen_lengths - policy_rejected_logps / rejected_lengths
    reference_gap = reference_chosen_logps / chosen_lengths
    reference_gap = (reference_gap - reference_rejected_logps / rejected_lengths).detach()
    deviation = (gap.detach() - reference_gap) - running_margin.detach()
    z = deviation / running_margin_std.detach()
    return softplus(-(beta * gap - gamma - beta * alpha * z))


# What several losses share.


def margin(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> Tensor:
    """`h_w - h_l`, (B,), in nats: how far the policy prefers the chosen response more than the
    reference does. No gradient to the reference.
    """
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps.detach()
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps.detach()
    return chosen_log_ratio - rejected_log_ratio


def average_margin(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
) -> Tensor:
    """`h_w / |w| - h_l / |l|`, (B,), in nats per token. No gradient to the reference."""
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps.detach()
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps.detach()
    return chosen_log_ratio / chosen_lengths - rejected_log_ratio / rejected_lengths


def moving_average(running: Tensor, batch_value: Tensor, *, momentum: float) -> Tensor:
    """`momentum running + (1 - momentum) batch_value`, without gradient.

    Start from the first batch's own value, not from 0.

    >>> moving_average(torch.tensor(2.0), torch.tensor(4.0), momentum=0.75).item()
    2.5
    """
    return momentum * running.detach() + (1 - momentum) * batch_value.detach()


def softplus(x: Tensor) -> Tensor:
    """`sp(x) = log(1 + e^x)`. torch's own is x itself beyond 20, which is off by up to 2e-9."""
    return -logsigmoid(-x)


EXP_LIMIT = 30.0
"""Where `bounded_exp` leaves the exponential: e^30 = 1e13 is beyond any useful loss, and its square
still fits into float32, as a gradient's norm must.
"""


def bounded_exp(x: Tensor) -> Tensor:
    """`e^x`, and beyond `x = 30` its tangent there: finite, with a finite gradient that is not 0.

    >>> bounded_exp(torch.tensor([0.0, 1e4])).isfinite().tolist()
    [True, True]
    """
    bounded = x.clamp(max=EXP_LIMIT)
    return bounded.exp() * (1 + x - bounded)


def _bernoulli_kl(logit: Tensor, other: Tensor) -> Tensor:
    """`KL(s(logit) || s(other))` of two coins given by their logits, (B,), in nats."""
    agree = torch.sigmoid(logit) * (logsigmoid(logit) - logsigmoid(other))
    return agree + torch.sigmoid(-logit) * (logsigmoid(-logit) - logsigmoid(-other))
