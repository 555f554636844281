"""Losses on single judged responses: one value a response, unreduced, on plain tensors.

Each response of a batch is `desirable` or not; nothing pairs them. With
`h = log pi(y|x) - log pi_ref(y|x)` in nats, summed over the response's tokens, a response's
implicit reward is `beta h`. Where a loss needs a number that is estimated from other responses (the
reference point of `kto`, the shift of `bco`), it takes it as a scalar tensor, and a function of its
own makes the estimate. `aot_unpaired` couples the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def kto(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """KTO loss of each response, (N,): one minus the value that prospect theory gives it.

        desirable:    loss = lambda_D (1 - sigmoid(beta (h - z0)))
        undesirable:  loss = lambda_U (1 - sigmoid(beta (z0 - h)))

    z0 is `kl`, the reference point. The value saturates on both sides, so responses far from z0
    hardly matter. With z0 held fixed the expected loss is monotone in h: it has no finite minimum,
    and pushes a response up or down by whether the probability that it is desirable exceeds
    lambda_U / (lambda_D + lambda_U).

    Ethayarajh et al. 2024 (arXiv:2402.01306), Eq. 7 according to TRL. TRL 1.16's KTOTrainer has
    the same formula.

    Args:
        policy_logps: log pi(y|x), summed over the response's tokens, (N,), in nats.
        reference_logps: log pi_ref(y|x), (N,); no gradient flows through it.
        desirable: whether each response is, (N,), bool.
        kl: the reference point z0, a scalar >= 0 in nats, from `kto_reference_point`; no gradient
            flows through it.
        beta: how fast the value saturates, > 0, per nat.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.

    >>> h, reference = torch.tensor([2.0, 2.0]), torch.zeros(2)
    >>> desirable, kl = torch.tensor([True, False]), torch.tensor(2.0)
    >>> options = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.5}
    >>> kto(h, reference, desirable, kl, **options).tolist()  # at the reference point: lambda / 2
    [0.5, 0.75]
    """
    gain = beta * (policy_logps - reference_logps.detach() - kl.detach())
    # 1 - sigmoid(gain) as sigmoid(-gain): the difference would round to 0 above gain = 17.
    return torch.where(
        desirable,
        desirable_weight * torch.sigmoid(-gain),
        undesirable_weight * torch.sigmoid(gain),
    )


def kto_reference_point(policy_kl_logps: Tensor, reference_kl_logps: Tensor) -> Tensor:
    """KTO's estimate of KL(policy || reference), a scalar >= 0 in nats, without gradient.

    `z0 = max(0, mean_m h(x_m, y_m'))` over mismatched pairs: y' is the response of another row of
    the batch. Not an unbiased estimate of the KL: y' is a row of the data, not a sample of the
    policy.

    Ethayarajh et al. 2024 (arXiv:2402.01306). Give it the global batch: the clamp does not commute
    with a mean over parts. TRL 1.16 takes the mean over the devices' means, then clamps.

    Args:
        policy_kl_logps: log pi(y'|x), summed over the tokens of y', (M,), in nats.
        reference_kl_logps: log pi_ref(y'|x), (M,).

    >>> kto_reference_point(torch.tensor([-1.0, -4.0]), torch.tensor([-3.0, -4.0])).item()
    1.0
    >>> kto_reference_point(torch.tensor([-9.0]), torch.tensor([-3.0])).item()
    0.0
    """
    return (policy_kl_logps - reference_kl_logps).detach().mean().clamp(min=0)


def bco(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    reward_shift: Tensor,
    *,
    beta: float,
) -> Tensor:
    """BCO loss of each response, (N,): a classifier of desirable responses, in nats.

        desirable:    loss = -log sigmoid(beta h - delta)
        undesirable:  loss = -log sigmoid(delta - beta h)

    delta is `reward_shift`. The losses of a desirable and an undesirable response add to more than
    the DPO loss of the pair, whatever delta; delta halfway between their rewards makes the bound
    tightest.

    Jung et al. 2024 (arXiv:2404.04656). Its weights for prompts that differ between the two kinds
    (underlying distribution matching) are left out. TRL 1.16 has no BCOTrainer, which kept the
    shift; the `bco_pair` of its DPOTrainer drops it: delta = 0.

    Args:
        policy_logps: log pi(y|x), summed over the response's tokens, (N,), in nats.
        reference_logps: log pi_ref(y|x), (N,); no gradient flows through it.
        desirable: whether each response is, (N,), bool.
        reward_shift: delta, a scalar in units of the reward, from `update_reward_shift`; no
            gradient flows through it.
        beta: reward per nat of log-ratio, > 0.

    >>> h, reference = torch.tensor([10.0, 10.0]), torch.zeros(2)
    >>> desirable, shift = torch.tensor([True, False]), torch.tensor(1.0)
    >>> loss = bco(h, reference, desirable, shift, beta=0.1)
    >>> [round(value, 4) for value in loss.tolist()]  # at the shift: log 2
    [0.6931, 0.6931]
    """
    logit = beta * (policy_logps - reference_logps.detach()) - reward_shift.detach()
    return torch.where(desirable, -logsigmoid(logit), -logsigmoid(-logit))


def update_reward_shift(
    reward_shift: Tensor,
    num_seen: Tensor,
    policy_logps: Tensor,
    reference_logps: Tensor,
    *,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """BCO's shift and count after one more batch: the mean of all rewards seen, without gradient.

        delta' = delta + (mean_n beta h_n - delta) N / (num_seen + N),   num_seen' = num_seen + N

    Start from zeros. Give it the global batch, before the loss of that batch is computed.

    Jung et al. 2024 (arXiv:2404.04656), as the BCOTrainer of TRL 0.24 has it; the paper itself was
    not checked. Responses count alike, whatever their kind: delta is halfway between the mean
    rewards of the two kinds only if both are equally many. Old batches never fade: late in training
    it lags behind.

    Args:
        reward_shift: delta so far, a scalar in units of the reward.
        num_seen: how many responses it is the mean of, a scalar.
        policy_logps: log pi(y|x) of the batch, (N,), in nats; N >= 1.
        reference_logps: log pi_ref(y|x), (N,).
        beta: reward per nat of log-ratio, > 0.

    >>> shift, seen = torch.tensor(0.0), torch.tensor(0)
    >>> shift, seen = update_reward_shift(shift, seen, torch.ones(2), torch.zeros(2), beta=0.5)
    >>> shift, seen = update_reward_shift(shift, seen, -torch.ones(6), torch.zeros(6), beta=0.5)
    >>> shift.item(), seen.item()
    (-0.25, 8)
    """
    rewards = beta * (policy_logps - reference_logps).detach()
    total = num_seen + rewards.numel()
    return reward_shift + (rewards.mean() - reward_shift) * rewards.numel() / total, total


def nca_unpaired(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    *,
    beta: float,
    desirable_fraction: float,
) -> Tensor:
    """NCA loss of each response, (N,): tell desirable responses from the reference's, in nats.

        desirable:    loss = -log sigmoid(beta h) - rho log sigmoid(-beta h)
        undesirable:  loss =                      - rho log sigmoid(-beta h)

    Every response also stands for the reference, the noise of noise-contrastive estimation, with
    weight rho = `desirable_fraction`. With rho = 1/2 a desirable and an undesirable response
    together cost `losses.nca_pair` of the pair. If p is the probability that a response is
    desirable, the gradient vanishes at `exp(beta h) = p / rho`. For beta = 1 that is
    `pi(y|x) = pi_ref(y|x) p(y) / rho`; it sums to one, and is the distribution of the reference's
    desirable responses, only if rho is the share of desirable responses.

    Chen et al. 2024 (arXiv:2402.05369), whose loss is over the K responses of a prompt with noise
    weight 1/K each; here K = 2, hard labels, split by response. Other values of rho than 1/2, for
    data where the two kinds are not equally many, are our extension. TRL 1.16 has only the paired
    form.

    Args:
        policy_logps: log pi(y|x), summed over the response's tokens, (N,), in nats.
        reference_logps: log pi_ref(y|x), (N,); no gradient flows through it.
        desirable: whether each response is, (N,), bool.
        beta: reward per nat of log-ratio, > 0.
        desirable_fraction: rho in (0, 1): the share of desirable responses in the data.

    >>> h, reference = torch.zeros(2), torch.zeros(2)
    >>> desirable = torch.tensor([True, False])
    >>> loss = nca_unpaired(h, reference, desirable, beta=0.1, desirable_fraction=0.5)
    >>> [round(value, 4) for value in loss.tolist()]  # (3/2) log 2 and (1/2) log 2
    [1.0397, 0.3466]
    """
    reward = beta * (policy_logps - reference_logps.detach())
    noise = -desirable_fraction * logsigmoid(-reward)
    return torch.where(desirable, noise - logsigmoid(reward), noise)


def aot_unpaired(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    *,
    beta: float,
) -> Tensor:
    """AOT loss of each response, (N,): its mean DPO loss against its match in the other kind.

        mean_n loss_n = integral_0^1 -log sigmoid(beta (Q_D(t) - Q_U(t))) dt

    Q_D and Q_U are the empirical quantile functions of h over the batch's desirable and undesirable
    responses: the i-th best desirable response is compared with the i-th best undesirable one, so
    that the whole distribution of the first lies above that of the second. With n desirable and m
    undesirable responses, n = m, these are n pairs; else both step functions are cut where either
    steps, and a response meets every response whose quantiles overlap its own, in proportion. A
    loss is that mean over the matches, so both kinds have the same mean, and so has the batch.

    **Depends on the batch**, which must be the whole batch of a step. A batch of one kind only has
    no match: its losses are 0.

    Melnyk et al. 2024 (arXiv:2406.05882), unpaired form, with the logistic loss. Different numbers
    of the two kinds are our extension. TRL 1.16's `aot_unpaired` has the same mean for n = m, which
    it needs; it sorts each device's part on its own and can smooth labels.

    Args:
        policy_logps: log pi(y|x), summed over the response's tokens, (N,), in nats.
        reference_logps: log pi_ref(y|x), (N,); no gradient flows through it.
        desirable: whether each response is, (N,), bool.
        beta: strength of the pull towards the reference, > 0.

    >>> h, reference = torch.tensor([5.0, 0.0, 1.0, 6.0]), torch.zeros(4)
    >>> desirable = torch.tensor([True, False, True, False])
    >>> loss = aot_unpaired(h, reference, desirable, beta=1.0)  # pairs 1 - 0 and 5 - 6
    >>> [round(value, 4) for value in loss.tolist()]
    [1.3133, 0.3133, 0.3133, 1.3133]
    """
    log_ratio = policy_logps - reference_logps.detach()
    up, down = desirable.nonzero().squeeze(-1), (~desirable).nonzero().squeeze(-1)
    losses = 0.0 * log_ratio
    if len(up) == 0 or len(down) == 0:
        return losses
    up = up[log_ratio.detach()[up].argsort(stable=True)]
    down = down[log_ratio.detach()[down].argsort(stable=True)]

    # In units of 1 / (n m) both functions step at integers: no rounding decides who meets whom.
    n, m = len(up), len(down)
    steps = [torch.arange(k + 1, device=up.device) * (n * m // k) for k in (n, m)]
    cuts = torch.cat(steps).unique()
    width, start = cuts.diff(), cuts[:-1]
    first, second = up[start // m], down[start // n]
    matched = -logsigmoid(beta * (log_ratio[first] - log_ratio[second]))
    losses = losses.index_add(0, first, matched * width / m)
    return losses.index_add(0, second, matched * width / n)
