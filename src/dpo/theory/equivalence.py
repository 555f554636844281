"""Chapter 3: your language model is secretly a reward model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpo.core import exact, rewards
from dpo.theory import toys
from dpo.theory.registry import Measurement, check

BETA = 0.7


@check(
    "E01-preference-classes",
    "r and r' have the same Plackett-Luce laws iff r(x,y) − r'(x,y) is a function of x alone.",
    tolerance=1e-12,
)
def same_class_same_preferences(*, factor: float = 1.0) -> Measurement:
    """Shift each prompt's rewards: all laws stay. Recover reward differences from laws by
    logits.
    """
    rankings = toys.all_rankings(4)
    reward, shift = toys.normal(70, 3, 4), 5 * toys.normal(71, 3, 1)
    law = rewards.plackett_luce_log_prob(reward[:, rankings]).exp()
    shifted = rewards.plackett_luce_log_prob((reward + shift)[:, rankings]).exp()
    place = rankings.argsort(dim=-1)
    before = (place.unsqueeze(2) < place.unsqueeze(1)).double()
    pairs = torch.einsum("xn,nij->xij", shifted, before)
    recovered = torch.logit(pairs + 0.5 * torch.eye(4, dtype=torch.float64))
    difference = factor * (reward.unsqueeze(2) - reward.unsqueeze(1))
    return Measurement(max(toys.deviation(law, shifted), toys.deviation(recovered, difference)))


@check(
    "E02-policy-classes",
    "r and r' have the same optimal policy iff r(x,y) − r'(x,y) is a function of x alone.",
    tolerance=1e-8,
)
def same_class_same_policy(*, factor: float = 1.0) -> Measurement:
    """Climb J numerically for r and for r + f(x); read the reward differences back off the
    policy.
    """
    reward, log_ref = toys.normal(72, 4), toys.log_policy(73, 4)

    def climb(r: Tensor) -> Tensor:
        def loss(z: Tensor) -> Tensor:
            pi = torch.softmax(z, dim=-1)
            return -(pi * (r - BETA * (pi.log() - log_ref))).sum()

        return torch.log_softmax(toys.minimise(loss, log_ref.clone()), dim=-1)

    first, second = climb(reward), climb(reward + 3.7)
    read = BETA * (second - log_ref)
    gaps = toys.deviation(factor * (reward - reward[0]), read - read[0])
    return Measurement(max(toys.deviation(first, second), gaps))


@check(
    "E03-canonical-shift",
    "The only c with Σ_y π_ref e^{(r−c)/β} = 1 is c = β log Z: each class has one canonical "
    "reward.",
    tolerance=1e-12,
)
def canonical_shift(*, factor: float = 1.0) -> Measurement:
    """Solve the normalisation for c by bisection, without the formula for Z."""
    reward, log_ref = toys.normal(74, 6), toys.log_policy(75, 6)

    def deficit(c: float) -> float:
        return 1 - float((log_ref.exp() * torch.exp((reward - c) / BETA)).sum())

    c = toys.root(deficit, -20.0, 20.0)
    canonical = exact.canonical_reward(reward, log_ref, beta=BETA)
    log_z = BETA * exact.log_partition(reward, log_ref, beta=BETA)
    return Measurement(
        max(toys.deviation(reward - factor * c, canonical), abs(factor * c - float(log_z)))
    )


@check(
    "E04-projection",
    "f(r) = r − β log Z is idempotent, constant on classes, and equals β log(π_r/π_ref).",
    tolerance=1e-12,
)
def projection(*, factor: float = 1.0) -> Measurement:
    """Apply the projection twice and to shifted rewards; compare with normalised Gibbs weights."""
    reward, log_ref = toys.normal(76, 3, 5), toys.log_policy(77, 3, 5)
    once = exact.canonical_reward(reward, log_ref, beta=BETA)
    twice = exact.canonical_reward(once, log_ref, beta=BETA)
    shifted = exact.canonical_reward(reward + toys.normal(78, 3, 1), log_ref, beta=BETA)
    weights = log_ref.exp() * torch.exp(reward / BETA)
    policy = weights / weights.sum(dim=-1, keepdim=True)
    ratio = factor * BETA * (policy / log_ref.exp()).log()
    return Measurement(max(toys.deviation(once, other) for other in (twice, shifted, ratio)))


@check(
    "E05-bijection",
    "Every full-support policy is optimal for exactly one canonical reward: β log(π/π_ref).",
    tolerance=1e-8,
)
def bijection(*, factor: float = 1.0) -> Measurement:
    """Take random policies as given, build the reward, climb J numerically, and arrive back."""
    error = 0.0
    for seed in range(5):
        policy, log_ref = toys.log_policy(80 + seed, 5), toys.log_policy(90 + seed, 5)
        reward = factor * rewards.implicit_reward(policy, log_ref, beta=BETA)

        def loss(z: Tensor, reward: Tensor = reward, log_ref: Tensor = log_ref) -> Tensor:
            return -exact.objective(torch.log_softmax(z, -1), reward, log_ref, beta=BETA)

        found = torch.log_softmax(toys.minimise(loss, log_ref.clone()), dim=-1)
        error = max(error, toys.deviation(found, policy))
    return Measurement(error)


@check(
    "E06-dpo-equals-reward-mle",
    "On any data min L_DPO = min L_R, and π_r̂ of the reward MLE r̂ is the DPO policy.",
    tolerance=1e-8,
)
def dpo_equals_reward_mle(*, factor: float = 1.0) -> Measurement:
    """Fit a free reward and a free policy to the same 60 noisy comparisons; compare what
    they find.
    """
    truth, log_ref = toys.normal(100, 4), toys.log_policy(101, 4)
    pairs = torch.tensor([[i, j] for i in range(4) for j in range(i)]).repeat(10, 1)
    wins = toys.coin(torch.sigmoid(truth[pairs[:, 0]] - truth[pairs[:, 1]]), 102)

    def nll(r: Tensor) -> Tensor:
        gap = r[pairs[:, 0]] - r[pairs[:, 1]]
        return -(wins * torch.log(torch.sigmoid(gap)) + (1 - wins) * torch.log(torch.sigmoid(-gap)))

    reward = toys.minimise(lambda r: nll(r).mean(), torch.zeros(4, dtype=torch.float64))

    def dpo_loss(z: Tensor) -> Tensor:
        return nll(BETA * (torch.log_softmax(z, -1) - log_ref)).mean()

    found = torch.log_softmax(toys.minimise(dpo_loss, log_ref.clone()), dim=-1)
    claimed = exact.optimal_log_policy(factor * reward, log_ref, beta=BETA)
    gap = float((dpo_loss(found) - nll(reward).mean()).abs())
    return Measurement(
        max(gap, toys.deviation(found, claimed)),
        {
            "min_dpo": float(dpo_loss(found)),
            "min_reward": float(nll(reward).mean()),
            "pairs": float(len(pairs)),
            **{f"dpo{i}": float(found.exp()[i]) for i in range(4)},
            **{f"rlhf{i}": float(claimed.exp()[i]) for i in range(4)},
        },
    )


def token_tree(seed: int, vocabulary: int = 3, horizon: int = 3) -> list[Tensor]:
    """Next-token log-probabilities for every prefix: tables of shape (V,), (V, V), (V, V, V)."""
    return [toys.log_policy(seed + t, *([vocabulary] * (t + 1))) for t in range(horizon)]


def sequence_log_probs(tree: list[Tensor]) -> Tensor:
    """Log-probabilities of all strings, (V, V, V), as sums over tokens."""
    total = tree[0]
    for step in tree[1:]:
        total = total.unsqueeze(-1) + step
    return total


def _soft_values(reward: Tensor, tree: list[Tensor], *, beta: float) -> tuple[list[Tensor], Tensor]:
    """Backward soft Bellman recursion: optimal next-token policies and the value of the prompt."""
    policies: list[Tensor] = []
    q_value = reward
    for step in reversed(tree):
        value = beta * torch.logsumexp(step + q_value / beta, dim=-1)
        policies.append(step + (q_value - value.unsqueeze(-1)) / beta)
        q_value = value
    return policies[::-1], q_value


@check(
    "E07-soft-q",
    "π*(a|s) = π_ref e^{(Q*−V*)/β} by backward recursion multiplies to π_r; V*(x) = β log Z(x).",
    tolerance=1e-12,
)
def soft_q(*, factor: float = 1.0) -> Measurement:
    """Dynamic programming over prefixes against the Gibbs policy over all 27 strings."""
    tree, reward = token_tree(103), toys.normal(106, 3, 3, 3)
    policies, value = _soft_values(reward, tree, beta=factor * BETA)
    log_ref = sequence_log_probs(tree).flatten()
    claimed = exact.optimal_log_policy(reward.flatten(), log_ref, beta=BETA)
    log_z = exact.log_partition(reward.flatten(), log_ref, beta=BETA)
    error = toys.deviation(sequence_log_probs(policies).flatten(), claimed)
    return Measurement(max(error, abs(float(value - BETA * log_z))))


@check(
    "E08-token-rewards-telescope",
    "Σ_t β log π*(a_t|s_t)/π_ref(a_t|s_t) = r(x,y) − V*(x) along every string.",
    tolerance=1e-12,
)
def token_rewards_telescope(*, factor: float = 1.0) -> Measurement:
    """Add per-token log-ratios of the dynamic-programming policy along all 27 strings."""
    tree, reward = token_tree(107), toys.normal(110, 3, 3, 3)
    policies, value = _soft_values(reward, tree, beta=BETA)
    total = torch.zeros(3, 3, 3, dtype=torch.float64)
    for a in range(3):
        for b in range(3):
            for c in range(3):
                total[a, b, c] = BETA * (
                    (policies[0][a] - tree[0][a])
                    + (policies[1][a, b] - tree[1][a, b])
                    + (policies[2][a, b, c] - tree[2][a, b, c])
                )
    return Measurement(toys.deviation(total, reward - factor * value))


@check(
    "E09-shaping",
    "Moving reward between tokens by a potential, r_t + Φ(s_{t+1}) − Φ(s_t), leaves π* unchanged.",
    tolerance=1e-12,
)
def shaping(*, factor: float = 1.0) -> Measurement:
    """Recursion with potential-shaped token rewards: not zero at the prompt, zero at the end."""
    tree, reward = token_tree(111), toys.normal(114, 3, 3, 3)
    plain, _ = _soft_values(reward, tree, beta=BETA)
    first, second = toys.normal(115, 3), toys.normal(116, 3, 3)
    end = reward - second.unsqueeze(-1)
    value_2 = BETA * torch.logsumexp(tree[2] + end / BETA, dim=-1)
    q_1 = second - factor * first.unsqueeze(-1) + value_2
    value_1 = BETA * torch.logsumexp(tree[1] + q_1 / BETA, dim=-1)
    q_0 = first - 1.7 + value_1
    shaped = [
        torch.log_softmax(tree[0] + q_0 / BETA, dim=-1),
        torch.log_softmax(tree[1] + q_1 / BETA, dim=-1),
        torch.log_softmax(tree[2] + end / BETA, dim=-1),
    ]
    return Measurement(toys.deviation(sequence_log_probs(shaped), sequence_log_probs(plain)))


@check(
    "E10-kl-chain-rule",
    "KL(π‖π_ref) of responses is E_{y~π} Σ_t KL(π(·|s_t)‖π_ref(·|s_t)), prefixes drawn from π.",
)
def kl_chain_rule(*, factor: float = 1.0) -> Measurement:
    """Sample responses from the policy, sum the tokens' divergences, compare with enumeration."""
    policy, ref = token_tree(117), token_tree(120)
    log_p, log_q = sequence_log_probs(policy).flatten(), sequence_log_probs(ref).flatten()
    per_token = [exact.kl(p, q) for p, q in zip(policy, ref, strict=True)]
    total = per_token[0] + per_token[1].unsqueeze(1) + per_token[2]
    drawn = toys.draw(log_p.exp(), 200_000, 123)
    wrong = toys.draw(log_q.exp(), 200_000, 124)
    expanded = total.unsqueeze(-1).expand(3, 3, 3).flatten()
    truth = exact.kl(log_p, log_q)
    return Measurement(
        toys.z_score(expanded[drawn], factor * truth),
        {"kl": float(truth), "data_prefixes": float(expanded[wrong].mean())},
    )


@check(
    "E11-tempering",
    "π_ref^{1−λ} π_β^λ, normalised over responses, is π_{β/λ}; mixing token by token is another "
    "policy.",
    tolerance=1e-12,
)
def tempering(*, factor: float = 1.0) -> Measurement:
    """Mix at the level of responses and at the level of tokens; compare both with the exact
    optimum.
    """
    ref, reward, lam = token_tree(125), toys.normal(128, 3, 3, 3).flatten(), 0.5
    log_ref = sequence_log_probs(ref).flatten()
    trained, _ = _soft_values(reward.reshape(3, 3, 3), ref, beta=BETA)
    tuned = sequence_log_probs(trained).flatten()
    mixed = torch.log_softmax((1 - lam) * log_ref + lam * tuned, dim=-1)
    claimed = exact.optimal_log_policy(reward, log_ref, beta=factor * BETA / lam)
    by_token = [
        torch.log_softmax((1 - lam) * q + lam * p, dim=-1)
        for p, q in zip(trained, ref, strict=True)
    ]
    token_mixed = sequence_log_probs(by_token).flatten()
    distance = float(exact.total_variation(token_mixed, claimed))
    gained = float((token_mixed.exp() - claimed.exp()).clamp_min(0).sum())
    error = max(toys.deviation(mixed, claimed), abs(distance - gained))
    return Measurement(error if distance > 1e-3 else math.inf, {"token_tv": distance})
