"""Chapter 1, second half: reinforcement learning from human feedback, and PPO."""

from __future__ import annotations

import torch
from torch import Tensor

from dpo.core import exact, rewards
from dpo.theory import toys
from dpo.theory.registry import Measurement, check


def _scores(logits: Tensor) -> Tensor:
    """Scores `s(y) = grad log softmax(logits)_y`, one row per response: `e_y - pi`."""
    return torch.eye(logits.shape[0], dtype=torch.float64) - torch.softmax(logits, dim=-1)


@check(
    "R01-reward-model-likelihood",
    "The reward model's loss −log σ(r_w−r_l) has slope −σ(r_l−r_w); BT labels make its mean zero "
    "at r*.",
)
def reward_model_likelihood(*, factor: float = 1.0) -> Measurement:
    """Sample pairs and labels from a true reward; the score of the likelihood there
    averages to 0.
    """
    reward, num_pairs = toys.normal(20, 5), 200_000
    pairs = toys.draw(torch.ones(5), 2 * num_pairs, 21).reshape(num_pairs, 2)
    first, second = pairs[:, 0], pairs[:, 1]
    wins = toys.coin(torch.sigmoid(reward[first] - reward[second]), 22)
    winner = torch.where(wins > 0, first, second)
    loser = torch.where(wins > 0, second, first)
    slope = -torch.sigmoid(factor * (reward[loser] - reward[winner])).unsqueeze(1)
    eye = torch.eye(5, dtype=torch.float64)
    return Measurement(toys.z_score(slope * (eye[winner] - eye[loser]), 0.0))


@check(
    "R02-policy-gradient",
    "∇E_π r = E_π[(r−b)∇log π] for every constant b (the score-function identity).",
    tolerance=1e-9,
)
def policy_gradient(*, factor: float = 1.0) -> Measurement:
    """Finite differences of the expected reward against the score-function formula."""
    logits, reward = toys.normal(23, 6), toys.normal(24, 6)

    def expected(z: Tensor) -> Tensor:
        return torch.softmax(z, dim=-1) @ reward

    weights = torch.softmax(logits, dim=-1) * (reward - 0.7)
    claimed = factor * weights @ _scores(logits)
    return Measurement(toys.deviation(claimed, toys.gradient(expected, logits)))


@check(
    "R03-kl-penalised-gradient",
    "∇J = E_π[(r − β log π/π_ref)∇log π]: the KL enters as a reward, its own slope averages to "
    "zero.",
)
def kl_penalised_gradient(*, factor: float = 1.0) -> Measurement:
    """Average the formula over sampled responses; compare with finite differences of the
    exact J.
    """
    logits, reward, log_ref = toys.normal(25, 5), toys.normal(26, 5), toys.log_policy(27, 5)
    beta = 0.5

    def objective(z: Tensor) -> Tensor:
        return exact.objective(torch.log_softmax(z, dim=-1), reward, log_ref, beta=beta)

    log_pi = torch.log_softmax(logits, dim=-1)
    drawn = toys.draw(log_pi.exp(), 400_000, 28)
    per_response = (reward - factor * beta * (log_pi - log_ref)).unsqueeze(1) * _scores(logits)
    return Measurement(toys.z_score(per_response[drawn], toys.gradient(objective, logits)))


@check(
    "R04-gae",
    "GAE Σ_l (γλ)^l δ_{t+l} is the λ-weighted average of the k-step advantages, bootstrapped at "
    "the end.",
    tolerance=1e-12,
)
def generalised_advantage(*, factor: float = 1.0) -> Measurement:
    """Recursive GAE against explicit k-step advantages with weights (1-lambda) lambda^(k-1)."""
    horizon, gamma, lam = 7, 0.97, 0.8
    reward, value = toys.normal(29, horizon), toys.normal(30, horizon + 1)
    error = 0.0
    carry = 0.0
    for t in reversed(range(horizon)):
        td = reward[t] + gamma * value[t + 1] - value[t]
        carry = float(td) + gamma * lam * carry
        left = horizon - t
        average = 0.0
        for k in range(1, left + 1):
            discounts = gamma ** torch.arange(k, dtype=torch.float64)
            ret = discounts @ reward[t : t + k] + gamma**k * value[t + k]
            weight = (1 - lam) * lam ** (k - 1) if k < left else lam ** (left - 1)
            average += weight * float(ret - value[t])
        error = max(error, abs(factor * carry - average))
    return Measurement(error)


@check(
    "R05-ppo-clip",
    "min(ρA, clip(ρ,1±ε)A) is A·min(ρ,1+ε) for A>0 and A·max(ρ,1−ε) for A<0; slope A at ρ=1, 0 "
    "where clipped.",
    tolerance=1e-9,
)
def ppo_clip(*, factor: float = 1.0) -> Measurement:
    """The surrogate on a grid against its two cases, its slope at the sampling policy and beyond
    the clip.
    """
    epsilon = 0.2
    ratio = torch.linspace(0.1, 2.5, 400, dtype=torch.float64)
    error = 0.0
    for advantage in (1.7, -0.6):

        def surrogate(rho: Tensor, advantage: float = advantage) -> Tensor:
            clipped = rho.clamp(1 - epsilon, 1 + epsilon)
            return torch.minimum(rho * advantage, clipped * advantage)

        bound = factor * epsilon
        cases = ratio.clamp(max=1 + bound) if advantage > 0 else ratio.clamp(min=1 - bound)
        error = max(error, toys.deviation(surrogate(ratio), advantage * cases))
        slope = toys.gradient(surrogate, torch.tensor(1.0, dtype=torch.float64))
        error = max(error, abs(float(slope) - advantage))
        beyond = torch.tensor(1.5 if advantage > 0 else 0.5, dtype=torch.float64)
        error = max(error, abs(float(toys.gradient(surrogate, beyond))))
    return Measurement(error)


@check(
    "R06-kl-estimators",
    "With y~π and w=π_ref/π, both −log w and w−1−log w have mean KL(π‖π_ref); the second is never "
    "negative.",
)
def kl_estimators(*, factor: float = 1.0) -> Measurement:
    """Average both estimators over samples; compare with the enumerated divergence."""
    log_pi, log_ref = toys.log_policy(31, 8), toys.log_policy(32, 8)
    truth = exact.kl(log_pi, log_ref)
    drawn = toys.draw(log_pi.exp(), 400_000, 33)
    log_ratio = (log_ref - log_pi)[drawn]
    plain, corrected = -log_ratio, log_ratio.exp() - 1 - log_ratio
    error = toys.z_score(torch.stack([plain, corrected], dim=1), factor * truth)
    if float(corrected.min()) < 0:
        error = float("inf")
    values = {
        "kl": float(truth),
        "std_plain": float(plain.std()),
        "std_corrected": float(corrected.std()),
        "squared": float(0.5 * (log_ratio**2).mean()),
    }
    return Measurement(error, values)


@check(
    "R07-baseline",
    "A constant baseline b lowers E‖(r−b)s‖² iff 0<b/b*<2, with b*=E[r‖s‖²]/E‖s‖²; b = E r can "
    "raise it.",
)
def baseline(*, factor: float = 1.0) -> Measurement:
    """Sampled second moments at b = 2b* equal those at b = 0; the mean reward is outside here."""
    logits, reward = toys.vector(3.0, 0.0, 0.0), toys.vector(1.0, 0.2, -0.3)
    probs = torch.softmax(logits, dim=-1)
    drawn = toys.draw(probs, 400_000, 34)
    size = (_scores(logits) ** 2).sum(-1)

    def moment(b: float) -> Tensor:
        return (reward - b) ** 2 * size

    best = float((probs @ (reward * size)) / (probs @ size))
    mean = float(probs @ reward)
    twice = 2 * factor * best
    error = toys.z_score((moment(twice) - moment(0.0))[drawn], 0.0)
    values = {
        "best": best,
        "mean": mean,
        "at_zero": float(probs @ moment(0.0)),
        "at_mean": float(probs @ moment(mean)),
        "at_best": float(probs @ moment(best)),
    }
    if not values["at_best"] < values["at_zero"] < values["at_mean"]:
        error = float("inf")
    return Measurement(error, values)


@check(
    "R08-all-pairs",
    "Fitting Bradley-Terry to all K(K−1)/2 pairs of Plackett-Luce rankings recovers r.",
    tolerance=1e-8,
)
def all_pairs_consistent(*, factor: float = 1.0) -> Measurement:
    """Minimise the population loss over all K(K-1)/2 pairs of PL rankings; compare with
    the truth.
    """
    reward = toys.normal(35, 4)
    rankings = toys.all_rankings(4)
    law = rewards.plackett_luce_log_prob(reward[rankings]).exp()

    def loss(r: Tensor) -> Tensor:
        ordered = r[rankings]
        pairwise = rewards.bradley_terry_nll(ordered.unsqueeze(2), ordered.unsqueeze(1))
        return law @ torch.triu(pairwise, diagonal=1).sum(dim=(1, 2))

    found = toys.minimise(loss, torch.zeros(4, dtype=torch.float64))
    truth = factor * (reward - reward.mean())
    return Measurement(toys.deviation(found - found.mean(), truth))
