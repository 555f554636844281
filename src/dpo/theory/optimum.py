"""Chapter 2: the KL-constrained optimum and the DPO loss, its gradients and its minimiser."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dpo.core import exact, rewards
from dpo.theory import toys
from dpo.theory.registry import Measurement, check

LOG_REF = toys.vector(0.4, 0.3, 0.2, 0.1).log()
REWARD = toys.vector(0.0, 1.0, 2.0, -1.0)
"""One prompt with four responses: the chapter's worked example."""


@check(
    "O01-gibbs-identity",
    "J(π) = β log Z − β KL(π‖π_r) for every policy π.",
    tolerance=1e-12,
)
def gibbs_identity(*, factor: float = 1.0) -> Measurement:
    """Both sides written out by sums of probabilities, for 100 random policies and three betas."""
    ref, error = LOG_REF.exp(), 0.0
    for beta in (0.2, 1.0, 5.0):
        weights = ref * torch.exp(REWARD / beta)
        optimal = weights / weights.sum()
        for seed in range(100):
            pi = toys.log_policy(seed, 4).exp()
            left = (pi * (REWARD - beta * (pi / ref).log())).sum()
            gap = (pi * (pi / optimal).log()).sum()
            right = beta * weights.sum().log() - factor * beta * gap
            error = max(error, abs(float(left - right)))
    return Measurement(error)


@check(
    "O02-gibbs-optimum",
    "The maximiser of E_π r − β KL(π‖π_ref) is π_ref e^{r/β}/Z, and the maximum is β log Z.",
    tolerance=1e-9,
)
def gibbs_optimum(*, factor: float = 1.0) -> Measurement:
    """Climb the objective numerically from five random policies; compare where they all end."""
    beta = 0.5

    def loss(logits: Tensor) -> Tensor:
        pi = torch.softmax(logits, dim=-1)
        return -(pi * (REWARD - beta * (pi.log() - LOG_REF))).sum()

    claimed = exact.optimal_log_policy(REWARD, LOG_REF, beta=factor * beta)
    value = beta * exact.log_partition(REWARD, LOG_REF, beta=beta)
    error = 0.0
    for seed in range(5):
        found = toys.minimise(loss, toys.normal(40 + seed, 4))
        error = max(error, toys.deviation(torch.softmax(found, dim=-1), claimed.exp()))
        error = max(error, abs(float(value + loss(found))))
    probs = claimed.exp()
    return Measurement(
        error,
        {
            **{f"p{i}": float(probs[i]) for i in range(4)},
            "z": float(exact.log_partition(REWARD, LOG_REF, beta=beta).exp()),
            "value": float(value),
            "reward": float(exact.expectation(REWARD, claimed)),
            "kl": float(exact.kl(claimed, LOG_REF)),
            "ref_reward": float(exact.expectation(REWARD, LOG_REF)),
        },
    )


@check(
    "O03-partition-sampling",
    "Z(x) = E_{y~π_ref} e^{r/β} and J(π) = E_{y~π}[r − β log π/π_ref], by sampling.",
)
def partition_sampling(*, factor: float = 1.0) -> Measurement:
    """Sample means of e^{r/beta} under the reference and of the penalised reward under a policy."""
    beta = 0.5
    drawn = toys.draw(LOG_REF.exp(), 400_000, 45)
    z = exact.log_partition(REWARD, LOG_REF, beta=factor * beta).exp()
    error = toys.z_score(torch.exp(REWARD / beta)[drawn], z)
    pi = toys.log_policy(46, 4)
    drawn = toys.draw(pi.exp(), 400_000, 47)
    value = exact.objective(pi, REWARD, LOG_REF, beta=factor * beta)
    return Measurement(max(error, toys.z_score((REWARD - beta * (pi - LOG_REF))[drawn], value)))


@check(
    "O04-infinite-partition",
    "With π_ref(|y|=n) ∝ q^n and r = c|y|, Z is finite iff β > c/log(1/q); otherwise sup J = ∞.",
    tolerance=1e-9,
)
def infinite_partition(*, factor: float = 1.0) -> Measurement:
    """Best objective on responses of at most n tokens: it converges or grows linearly in n."""
    q, c = 0.5, 1.0
    critical = factor * c / math.log(1 / q)
    length = torch.arange(1, 4001, dtype=torch.float64)
    log_ref = length * math.log(q) + math.log((1 - q) / q)

    def best(beta: float, n: int) -> float:
        return beta * float(exact.log_partition(c * length[:n], log_ref[:n], beta=beta))

    beta = 1.1 * critical
    ratio = q * math.exp(c / beta)
    limit = beta * math.log((1 - q) / q * ratio / (1 - ratio)) if ratio < 1 else math.inf
    error = abs(best(beta, 4000) - limit)
    beta = 0.9 * critical
    slope = c - beta * math.log(1 / q)
    error = max(error, abs((best(beta, 4000) - best(beta, 2000)) / 2000 - slope))
    if slope <= 0:
        error = math.inf
    return Measurement(error, {"critical": critical, "slope": slope, "limit": limit})


def _tilt(beta: float, reward: Tensor = REWARD) -> tuple[float, float, float]:
    """Expected reward, KL and reward variance of the optimum at beta."""
    policy = exact.optimal_log_policy(reward, LOG_REF, beta=beta)
    mean = exact.expectation(reward, policy)
    variance = exact.expectation((reward - mean) ** 2, policy)
    return float(mean), float(exact.kl(policy, LOG_REF)), float(variance)


@check(
    "O05-beta-monotone",
    "dE_{π_β}r/dβ = −Var_{π_β}(r)/β² and dKL/dβ = −Var_{π_β}(r)/β³: both fall as β grows.",
    tolerance=1e-7,
)
def beta_monotone(*, factor: float = 1.0) -> Measurement:
    """Finite differences in beta of the exact reward and KL."""
    error, step = 0.0, 1e-5
    for beta in (0.3, 1.0, 3.0):
        _, _, variance = _tilt(beta)
        (up_reward, up_kl, _), (low_reward, low_kl, _) = _tilt(beta + step), _tilt(beta - step)
        reward_slope, kl_slope = (
            (up_reward - low_reward) / (2 * step),
            (up_kl - low_kl) / (2 * step),
        )
        error = max(error, abs(reward_slope + factor * variance / beta**2))
        error = max(error, abs(kl_slope + factor * variance / beta**3))
    table: dict[str, float] = {}
    for name, beta in (("a", 0.25), ("b", 0.5), ("c", 1.0), ("d", 2.0)):
        table[f"beta_{name}"] = beta
        table[f"reward_{name}"], table[f"kl_{name}"], _ = _tilt(beta)
    return Measurement(error, table)


@check(
    "O06-beta-limits",
    "KL ≈ Var_ref(r)/(2β²) as β→∞, and KL → −log π_ref(argmax r) as β→0.",
    tolerance=2e-3,
)
def beta_limits(*, factor: float = 1.0) -> Measurement:
    """The exact KL at beta = 1000 and at beta = 0.01 against the two limits."""
    mean = exact.expectation(REWARD, LOG_REF)
    variance = float(exact.expectation((REWARD - mean) ** 2, LOG_REF))
    _, large, _ = _tilt(1000.0)
    _, small, _ = _tilt(0.01)
    error = abs(large * 2 * 1000.0**2 / (factor * variance) - 1)
    return Measurement(max(error, abs(small + float(LOG_REF[REWARD.argmax()]) * factor)))


@check(
    "O07-frontier",
    "π_β has the largest expected reward at its KL, and the frontier's slope is dE/dKL = β.",
    tolerance=1e-6,
)
def frontier(*, factor: float = 1.0) -> Measurement:
    """Search 20,000 random policies for one above the frontier; take its slope by differences."""
    policies = toys.log_policy(50, 20_000, 4) * torch.rand(
        20_000, 1, generator=toys.generator(51), dtype=torch.float64
    ).mul(3)
    policies = torch.log_softmax(policies, dim=-1)
    error = 0.0
    for beta in (0.4, 1.0, 2.5):
        mean, divergence, _ = _tilt(beta)
        allowed = exact.kl(policies, LOG_REF) <= divergence
        error = max(error, float((exact.expectation(REWARD, policies)[allowed] - mean).max()))
        (up_r, up_k, _), (low_r, low_k, _) = _tilt(beta + 1e-4), _tilt(beta - 1e-4)
        error = max(error, abs((up_r - low_r) / (up_k - low_k) - factor * beta))
    curve: dict[str, float] = {}
    for index in range(31):
        beta = 0.15 * 1.2**index
        curve[f"reward_{index:02d}"], curve[f"kl_{index:02d}"], _ = _tilt(beta)
    for index in range(0, 20_000, 100):
        curve[f"other_kl_{index // 100:03d}"] = float(exact.kl(policies[index], LOG_REF))
        mean = float(exact.expectation(REWARD, policies[index]))
        curve[f"other_reward_{index // 100:03d}"] = mean
    return Measurement(error, curve)


def _ordered_loss(h: Tensor, preference: Tensor, weights: Tensor, *, beta: float) -> Tensor:
    """Population DPO loss of log-ratios h, (Y,): pairs drawn with `weights`, labels by
    `preference`.
    """
    u = beta * (h.unsqueeze(1) - h.unsqueeze(0))
    return (weights * (preference * softplus(-u) + preference.T * softplus(u))).sum()


@check(
    "O08-dpo-at-reference",
    "At π_θ = π_ref every pair's DPO loss is log 2, for every β.",
    tolerance=1e-14,
)
def dpo_at_reference(*, factor: float = 1.0) -> Measurement:
    """The loss of a policy equal to the reference, from the Bradley-Terry likelihood."""
    error = 0.0
    for beta in (0.01, 0.1, 10.0):
        implicit = rewards.implicit_reward(LOG_REF, LOG_REF, beta=beta)
        losses = rewards.bradley_terry_nll(implicit[0], implicit[1:])
        error = max(error, toys.deviation(losses, factor * math.log(2)))
    return Measurement(error)


@check(
    "O09-dpo-minimiser",
    "With Bradley-Terry labels and connected pairs (or Plackett-Luce rankings) the population DPO "
    "loss is minimised by π_r*, whatever the sampler.",
    tolerance=1e-8,
)
def dpo_minimiser(*, factor: float = 1.0) -> Measurement:
    """Minimise over all policies for three samplers of pairs and for rankings of three, or their
    first places; compare with the Gibbs policy.
    """
    beta, error = 0.5, 0.0
    claimed = exact.optimal_log_policy(factor * REWARD, LOG_REF, beta=beta)
    preference = rewards.preference_table(REWARD)
    chain = torch.zeros(4, 4, dtype=torch.float64)
    chain[0, 1], chain[1, 2], chain[2, 3] = 0.7, 0.2, 0.1
    uniform = torch.full((4, 4), 1 / 16, dtype=torch.float64)
    skewed = torch.outer(LOG_REF.exp(), toys.vector(0.7, 0.1, 0.1, 0.1))
    for weights in (chain, uniform, skewed):

        def loss(logits: Tensor, weights: Tensor = weights) -> Tensor:
            h = torch.log_softmax(logits, dim=-1) - LOG_REF
            return _ordered_loss(h, preference, weights, beta=beta)

        found = torch.log_softmax(toys.minimise(loss, LOG_REF.clone()), dim=-1)
        error = max(error, toys.deviation(found, claimed))
    for top_k in (1, 2):
        found = _ranking_minimiser(beta, top_k)
        error = max(error, toys.deviation(found, claimed))
    return Measurement(error)


def _ranking_minimiser(beta: float, top_k: int) -> Tensor:
    """Minimiser over policies of the population listwise loss: two overlapping sets of three
    responses are ranked, and the first top_k places are seen.
    """
    orders = toys.all_rankings(3)
    orders = torch.cat([orders, orders + 1])
    law = rewards.plackett_luce_log_prob(REWARD[orders]).exp()

    def loss(logits: Tensor) -> Tensor:
        h = torch.log_softmax(logits, dim=-1) - LOG_REF
        return -(law * rewards.plackett_luce_log_prob(beta * h[orders], top_k=top_k)).sum()

    return torch.log_softmax(toys.minimise(loss, LOG_REF.clone()), dim=-1)


@check(
    "O10-dpo-gradient",
    "∇L_DPO = −β σ(−u)(s_w − s_l), s = ∇log π_θ: the weight is the model's probability of being "
    "wrong.",
    tolerance=1e-9,
)
def dpo_gradient(*, factor: float = 1.0) -> Measurement:
    """Finite differences of the loss of a softmax policy with shared features."""
    features, theta = toys.normal(52, 4, 3), toys.normal(53, 3)
    beta, chosen, rejected = 0.3, 2, 0

    def loss(point: Tensor) -> Tensor:
        h = torch.log_softmax(features @ point, dim=-1) - LOG_REF
        return torch.log1p(torch.exp(-beta * (h[chosen] - h[rejected])))

    pi = torch.softmax(features @ theta, dim=-1)
    score = features - pi @ features
    h = pi.log() - LOG_REF
    wrong = torch.sigmoid(-beta * (h[chosen] - h[rejected]))
    claimed = -factor * beta * wrong * (score[chosen] - score[rejected])
    return Measurement(toys.deviation(claimed, toys.gradient(loss, theta)), _one_step())


def _one_step() -> dict[str, float]:
    """One gradient step on free logits from the reference, its gradient by finite differences."""
    beta, rate, chosen, rejected = 0.5, 1.0, 0, 2

    def loss(logits: Tensor) -> Tensor:
        h = torch.log_softmax(logits, dim=-1) - LOG_REF
        return torch.log1p(torch.exp(-beta * (h[chosen] - h[rejected])))

    moved = LOG_REF - rate * toys.gradient(loss, LOG_REF.clone())
    h = torch.log_softmax(moved, dim=-1) - LOG_REF
    u = float(beta * (h[chosen] - h[rejected]))
    values = {f"p{i}": float((h + LOG_REF).exp()[i]) for i in range(4)}
    values |= {"h_w": float(h[chosen]), "h_l": float(h[rejected]), "u": u}
    return values | {
        "before": float(loss(LOG_REF)),
        "after": float(loss(moved)),
        "weight": 1 / (1 + math.exp(u)),
    }


@check(
    "O11-dpo-gradient-sampling",
    "Sampled pairs and labels average to the gradient −β E[σ(−u)(s_w − s_l)] of the population "
    "loss.",
)
def dpo_gradient_sampling(*, factor: float = 1.0) -> Measurement:
    """Draw pairs and Bradley-Terry labels; compare the mean per-pair formula with differences."""
    beta, num_pairs = 0.5, 300_000
    ref, logits = LOG_REF.exp(), toys.normal(54, 4)
    preference = rewards.preference_table(REWARD)

    def loss(z: Tensor) -> Tensor:
        h = torch.log_softmax(z, dim=-1) - LOG_REF
        return _ordered_loss(h, preference, torch.outer(ref, ref), beta=beta)

    pairs = toys.draw(ref, 2 * num_pairs, 55).reshape(-1, 2)
    wins = toys.coin(preference[pairs[:, 0], pairs[:, 1]], 56) > 0
    chosen = torch.where(wins, pairs[:, 0], pairs[:, 1])
    rejected = torch.where(wins, pairs[:, 1], pairs[:, 0])
    h = torch.log_softmax(logits, dim=-1) - LOG_REF
    wrong = torch.sigmoid(-beta * (h[chosen] - h[rejected])).unsqueeze(1)
    eye = torch.eye(4, dtype=torch.float64)
    per_pair = -factor * beta * wrong * (eye[chosen] - eye[rejected])
    return Measurement(toys.z_score(per_pair, toys.gradient(loss, logits)))


@check(
    "O12-pl-gradient",
    "∇L_PL-DPO = −β Σ_k [s_τ(k) − Σ_{j≥k} w_kj s_τ(j)] with w = softmax(βh); coefficients sum to "
    "zero.",
    tolerance=1e-9,
)
def pl_gradient(*, factor: float = 1.0) -> Measurement:
    """Finite differences of the listwise loss; for K = 2 the formula is DPO's."""
    features, theta, beta = toys.normal(57, 5, 3), toys.normal(58, 3), 0.4
    log_ref, error = toys.log_policy(59, 5), 0.0
    for ranking in (torch.tensor([3, 1, 4, 0, 2]), torch.tensor([2, 4])):

        def loss(point: Tensor, ranking: Tensor = ranking) -> Tensor:
            h = torch.log_softmax(features @ point, dim=-1) - log_ref
            return -rewards.plackett_luce_log_prob(beta * h[ranking])

        pi = torch.softmax(features @ theta, dim=-1)
        score, h = features - pi @ features, pi.log() - log_ref
        coefficients = torch.zeros(5, dtype=torch.float64)
        for k in range(len(ranking)):
            rest = ranking[k:]
            coefficients[ranking[k]] += 1.0
            coefficients[rest] -= torch.softmax(beta * h[rest], dim=-1)
        claimed = -factor * beta * coefficients @ score
        error = max(error, toys.deviation(claimed, toys.gradient(loss, theta)))
        error = max(error, abs(float(coefficients.sum())))
    return Measurement(error)


@check(
    "O13-convexity",
    "For π_θ ∝ π_ref e^{θ·φ} DPO is logistic regression on φ_w−φ_l; Hessian β²E[σσ'ΔφΔφᵀ] ⪰ 0.",
    tolerance=1e-6,
)
def convexity(*, factor: float = 1.0) -> Measurement:
    """Finite differences of the gradient of the loss against the formula, and its least
    eigenvalue.
    """
    features, theta, beta = toys.normal(60, 4, 3), toys.normal(61, 3), 0.7
    pairs = torch.tensor([[0, 1], [2, 1], [3, 0], [2, 3]])

    def loss(point: Tensor) -> Tensor:
        h = torch.log_softmax(features @ point + LOG_REF, dim=-1) - LOG_REF
        return softplus(-beta * (h[pairs[:, 0]] - h[pairs[:, 1]])).mean()

    def slope(i: int, p: Tensor) -> Tensor:
        return toys.gradient(loss, p)[i]

    found = torch.stack([toys.gradient(partial(slope, i), theta, step=1e-4) for i in range(3)])
    difference = features[pairs[:, 0]] - features[pairs[:, 1]]
    p = torch.sigmoid(beta * difference @ theta)
    claimed = (
        factor * beta**2 * torch.einsum("n,ni,nj->ij", p * (1 - p), difference, difference) / 4
    )
    smallest = float(torch.linalg.eigvalsh(claimed).min())
    return Measurement(toys.deviation(claimed, found) if smallest > 0 else math.inf)


@check(
    "O14-early-stopping",
    "Gradient flow of the DPO loss from π_ref has KL = β²t² gᵀFg/8 at first: the order in β "
    "reverses at convergence.",
    tolerance=0.03,
)
def early_stopping(*, factor: float = 1.0) -> Measurement:
    """Integrate the flow for two betas; compare the early KL with the formula, and see that its
    ratio is above 1 and the late one below.
    """
    preference = rewards.preference_table(REWARD)
    uniform = torch.full((4, 4), 1 / 16, dtype=torch.float64)

    def flow(beta: float, rate: float, steps: int) -> float:
        logits = LOG_REF.clone()
        for _ in range(steps):
            leaf = logits.clone().requires_grad_()
            h = torch.log_softmax(leaf, dim=-1) - LOG_REF
            loss = _ordered_loss(h, preference, uniform, beta=beta)
            logits = logits - rate * torch.autograd.grad(loss, leaf)[0]
        return float(exact.kl(torch.log_softmax(logits, dim=-1), LOG_REF))

    ref, eye = LOG_REF.exp(), torch.eye(4, dtype=torch.float64)
    score = eye - ref
    fisher = torch.einsum("y,yi,yj->ij", ref, score, score)
    sign = (preference - preference.T) * uniform
    g = torch.einsum("ij,ijk->k", sign, score.unsqueeze(1) - score.unsqueeze(0))
    rate, steps, error = 1e-3, 20, 0.0
    early: list[float] = []
    for beta in (0.5, 1.0):
        early.append(flow(beta, rate, steps))
        claimed = factor * (beta * rate * steps) ** 2 / 8 * float(g @ fisher @ g)
        error = max(error, abs(early[-1] / claimed - 1))
    small, large = _tilt(0.5)[1], _tilt(1.0)[1]
    values = {"early_ratio": early[1] / early[0], "late_ratio": large / small}
    return Measurement(error if large < small else math.inf, values)


@check(
    "O15-pl-gradient-sampling",
    "Sampled rankings average to the gradient −β E Σ_k [s_τ(k) − Σ_{j≥k} w_kj s_τ(j)] of the "
    "population loss.",
)
def pl_gradient_sampling(*, factor: float = 1.0) -> Measurement:
    """Draw Plackett-Luce rankings; compare the mean of the per-ranking formula with differences."""
    beta, logits = 0.5, toys.normal(62, 4)
    rankings = toys.all_rankings(4)
    law = rewards.plackett_luce_log_prob(REWARD[rankings]).exp()

    def loss(z: Tensor) -> Tensor:
        h = torch.log_softmax(z, dim=-1) - LOG_REF
        return -(law * rewards.plackett_luce_log_prob(beta * h[rankings])).sum()

    h = torch.log_softmax(logits, dim=-1) - LOG_REF
    ordered = rewards.sample_rankings(REWARD, 200_000, generator=toys.generator(63))
    score = torch.eye(4, dtype=torch.float64) - torch.softmax(logits, dim=-1)
    per_ranking = torch.zeros(len(ordered), 4, dtype=torch.float64)
    for k in range(3):
        rest = ordered[:, k:]
        weight = torch.softmax(beta * h[rest], dim=-1)
        mean = (weight.unsqueeze(-1) * score[rest]).sum(dim=1)
        per_ranking -= factor * beta * (score[ordered[:, k]] - mean)
    return Measurement(toys.z_score(per_ranking, toys.gradient(loss, logits)))


@check(
    "O16-gibbs-inequality",
    "KL(p‖q) = Σ_y q φ(p/q) with φ(t) = t log t − t + 1 ≥ 0, zeros of p included; so KL ≥ 0.",
    tolerance=1e-12,
)
def gibbs_inequality(*, factor: float = 1.0) -> Measurement:
    """The divergence of random distributions, some with zeros, against the sum of terms of one
    sign.
    """
    error = 0.0
    for seed in range(50):
        p, q = toys.log_policy(300 + seed, 6), toys.log_policy(400 + seed, 6)
        if seed % 2:
            p = torch.log_softmax(p.index_fill(0, torch.tensor([1, 4]), -math.inf), dim=-1)
        ratio = (p - q).exp()
        terms = torch.special.xlogy(ratio, ratio) - ratio + 1
        error = max(error, abs(float(exact.kl(p, q) - factor * (q.exp() * terms).sum())))
        if float(terms.min()) < 0:
            error = math.inf
    return Measurement(error)


@check(
    "O17-beta-sampling",
    "Sampled variances give −β² dE_{π_β}r/dβ and −β³ dKL/dβ, and under π_ref the limit of 2β² KL.",
)
def beta_sampling(*, factor: float = 1.0) -> Measurement:
    """Squared deviations of rewards drawn from the optimum and from the reference against finite
    differences of the exact reward and KL, and the exact KL at beta = 1000.
    """
    beta, step, num_samples = 0.7, 1e-4, 400_000
    policy = exact.optimal_log_policy(REWARD, LOG_REF, beta=beta)
    (up_r, up_k, _), (low_r, low_k, _) = _tilt(beta + step), _tilt(beta - step)
    slopes = (beta**2 * (up_r - low_r), beta**3 * (up_k - low_k))
    error = 0.0
    for log_probs, seed, found in (
        (policy, 64, [-slope / (2 * step) for slope in slopes]),
        (LOG_REF, 65, [2 * 1000.0**2 * _tilt(1000.0)[1]]),
    ):
        drawn = REWARD[toys.draw(log_probs.exp(), num_samples, seed)]
        squared = factor * (drawn - exact.expectation(REWARD, log_probs)) ** 2
        error = max(error, *(toys.z_score(squared, value) for value in found))
    return Measurement(error)
