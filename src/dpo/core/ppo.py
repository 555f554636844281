"""Proximal policy optimisation of a language model: rewards, advantages, losses, diagnostics.

A response is an episode: the prompt and the tokens so far are the state, the next token is the
action, and the end token, or the token limit, ends it. Tensors of tokens have shape (B, T): row b
is a response, column t its token t, and `mask` tells tokens (true, or 1) from the padding on the
right. What stands in the padding has no effect on anything, whatever it is.

    logps             log pi(y_t | x, y_<t) of the policy that is trained, with gradient
    old_logps         the same under the policy as it was when it drew the response
    reference_logps   the same under the reference
    values            V(x, y_<t), what is expected of the rewards from token t on
    old_values        the same as it was when the response was drawn
    rewards           of each token, in the units of the score

Log-probabilities are in nats. Losses are means over the tokens of all responses: a long response
counts for more than a short one. That, and what is not said otherwise, is as in the code of Ziegler
et al. 2019 (arXiv:1909.08593, github.com/openai/lm-human-preferences, `train_policy.py`), which
Huang et al. describe detail by detail ("The N implementation details of RLHF with PPO", 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens, a scalar.

    >>> masked_mean(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[1, 1, 0]])).item()
    2.0
    """
    return _only(values, mask).sum() / mask.sum()


def _only(values: Tensor, mask: Tensor) -> Tensor:
    """The values with 0 in the padding.

    What enters a product goes through here first: a NaN times a gradient of 0 is a NaN.
    """
    return values.masked_fill(~mask.bool(), 0.0)


# -- rewards and advantages ----------------------------------------------------------------------


def kl_k1(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """`log pi - log pi_ref` of each token, (B, T): unbiased for the KL, of either sign.

        E_{y_t ~ pi} k1 = KL(pi(. | x, y_<t) || pi_ref(. | x, y_<t))

    As a reward it is also right in its gradient: `E_pi [k1 grad log pi] = grad KL`.

    J. Schulman, "Approximating KL divergence", 2020, joschu.net/blog/kl-approx.html.
    """
    return logps - reference_logps


def kl_k3(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """`e^-d - 1 + d` of each token, (B, T), `d = log pi - log pi_ref`: unbiased and never negative.

    It is k1 with a control variate, `pi_ref/pi - 1`, whose mean under pi is 0. As a measure it is
    the better one near the reference; its variance is infinite where pi lacks mass that pi_ref has.
    As a reward it pushes its own token elsewhere than the KL that it measures,

        E_pi [k3 grad log pi] = grad KL(pi || pi_ref) - grad KL(pi_ref || pi)

    which is 0 to first order near the reference, where the two KLs are the same.

    J. Schulman, "Approximating KL divergence", 2020. On its gradient: Tang and Munos 2025
    (arXiv:2506.09477).

    >>> kl_k3(torch.tensor([0.0]), torch.tensor([0.0])).item()
    0.0
    """
    d = logps - reference_logps
    return torch.expm1(-d) + d


def penalised_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, coefficient: float) -> Tensor:
    """The reward of each token, (B, T): its KL penalty, and at the last token the score as well.

        r_t = -coefficient kl_t + [t is the last token] score

    Their undiscounted sum is the objective of RLHF, `score - coefficient KL`.

    Ziegler et al. 2019, Eq. 2.

    Args:
        scores: of each response, (B,).
        kl: an estimate for each token, (B, T): `kl_k1` or `kl_k3`.

    >>> kl = torch.tensor([[1.0, 2.0, 99.0]])
    >>> mask = torch.tensor([[1, 1, 0]])
    >>> penalised_rewards(torch.tensor([5.0]), kl, mask, coefficient=0.5).tolist()
    [[-0.5, 4.0, 0.0]]
    """
    rewards = _only(-coefficient * kl, mask)
    last = mask.long().sum(-1, keepdim=True) - 1
    return rewards.scatter_add(-1, last, scores.to(rewards.dtype).unsqueeze(-1))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that values are fitted to, both (B, T).

        delta_t = r_t + gamma V_{t+1} - V_t          V = 0 after the last token
        A_t     = sum_{l >= 0} (gamma lam)^l delta_{t+l}
        R_t     = A_t + V_t

    `lam = 1` gives what came minus what was expected, `lam = 0` the one-step error. Nothing follows
    the last token of a response, of one cut by the token limit as little as of a finished one. Both
    results are 0 in the padding and have no gradient.

    Schulman et al. 2016 (arXiv:1506.02438), Eq. 16.

    >>> rewards, values = torch.tensor([[0.0, 0.0, 4.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    >>> advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam=1.0)
    >>> advantages.tolist(), returns.tolist()
    ([[3.0, 2.0, 1.0]], [[4.0, 4.0, 4.0]])
    """
    rewards, values = _only(rewards.detach(), mask), _only(values.detach(), mask)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """The values with mean 0 and variance 1 over all tokens, (B, T), 0 in the padding.

        (v - mean) / sqrt(variance + 1e-8)

    The variance is the mean squared deviation. The code of Ziegler et al. whitens each minibatch;
    whoever calls this with all responses of a round makes a step independent of how it is split.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return _only((values - mean) * (variance + 1e-8).rsqrt(), mask)


# -- losses --------------------------------------------------------------------------------------


def clipped_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, clip: float
) -> Tensor:
    """PPO's loss of the policy, a scalar: its mean over tokens.

        max(-A rho, -A min(max(rho, 1 - clip), 1 + clip)),    rho = pi / pi_old

    A token has no gradient once its ratio is beyond the clip on the side that its advantage asks
    for; on the other side it always has.

    Schulman et al. 2017 (arXiv:1707.06347), Eq. 7, with the sign of a loss.

    >>> zero, up = torch.zeros(1, 1), torch.full((1, 1), 0.5)  # rho = e^0.5 = 1.65
    >>> one = torch.ones(1, 1)
    >>> round(clipped_policy_loss(up, zero, one, one, clip=0.2).item(), 4)  # A = 1
    -1.2
    >>> round(clipped_policy_loss(up, zero, -one, one, clip=0.2).item(), 4)  # A = -1
    1.6487
    """
    plain, clipped = _policy_losses(logps, old_logps, advantages, mask, clip)
    return masked_mean(torch.maximum(plain, clipped), mask)


def _policy_losses(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The loss of each token without and with the clip, (B, T)."""
    ratio = _only(logps - old_logps.detach(), mask).exp()
    advantages = _only(advantages.detach(), mask)
    return -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float
) -> Tensor:
    """The loss of the values, a scalar: its mean over tokens.

        1/2 max((V - R)^2, (V_clip - R)^2),    V_clip = V kept within `clip` of V_old

    A value is not paid for moving further than `clip` in a round; `clip = inf` is half the squared
    error. Schulman et al. do not describe it; it is in the code of Ziegler et al. and in OpenAI's
    baselines before it. `clip` is in the units of the return.
    """
    values = _only(values, mask)
    old_values, returns = _only(old_values.detach(), mask), _only(returns.detach(), mask)
    clipped = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    worse = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * masked_mean(worse, mask)


# -- the penalty's coefficient -------------------------------------------------------------------


def adapted_coefficient(coefficient: float, kl: float, *, target: float, gain: float) -> float:
    """The KL coefficient of the next round, moved towards one that keeps the KL at its target.

        coefficient (1 + gain min(max(kl/target - 1, -0.2), 0.2))

    Ziegler et al. 2019, section 2.2, where `gain` is 0.1; their code has batch size / 10,000.

    Args:
        kl: measured in the round, in nats per response, as is `target`.

    >>> round(adapted_coefficient(1.0, 60.0, target=6.0, gain=0.1), 6)
    1.02
    >>> round(adapted_coefficient(1.0, 5.4, target=6.0, gain=0.1), 6)
    0.99
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + gain * error)


# -- diagnostics ---------------------------------------------------------------------------------


def approximate_kl(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    """`KL(pi_old || pi)` per token, a scalar in nats, by k3: how far a round's steps have gone.

    The responses are samples of pi_old, so that this is unbiased; 0 before the first step.
    """
    return masked_mean(kl_k3(old_logps, logps), mask)


def clip_fraction(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, clip: float
) -> Tensor:
    """Share of the tokens whose gradient the clip has taken away, a scalar."""
    plain, clipped = _policy_losses(logps, old_logps, advantages, mask, clip)
    return masked_mean((clipped > plain).to(plain.dtype), mask)


def sampled_entropy(old_logps: Tensor, mask: Tensor) -> Tensor:
    """`-mean log pi_old` over tokens that pi_old drew, a scalar in nats.

    Unbiased for the mean entropy of its next-token distributions along its own responses.
    """
    return -masked_mean(old_logps, mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """`1 - var(R - V) / var(R)` over tokens, a scalar: 1 is perfect, 0 as good as any constant.

    0 where returns do not vary: there is nothing to explain.
    """
    error = returns - values
    total = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    left = masked_mean((error - masked_mean(error, mask)) ** 2, mask)
    return torch.where(total > 0, 1 - left / total, 0.0)
