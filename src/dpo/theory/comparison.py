"""Chapter 4: DPO against reward modelling and reinforcement learning."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dpo.core import exact, rewards
from dpo.theory import toys
from dpo.theory.registry import Z_LIMIT, Measurement, check

LOG_REF = toys.vector(0.35, 0.3, 0.2, 0.15).log()
REWARD = toys.vector(1.2, 0.4, -0.3, -1.0)


def _loss(h: Tensor, wins: Tensor, *, beta: float) -> Tensor:
    """DPO loss of log-ratios h (Y,), summed over a table of wins (i beat j that often)."""
    return (wins * softplus(-beta * (h.unsqueeze(1) - h.unsqueeze(0)))).sum()


def _score(logits: Tensor) -> Tensor:
    """Scores of a tabular softmax policy, a row per response."""
    return torch.eye(len(logits), dtype=torch.float64) - torch.softmax(logits, dim=-1)


@check(
    "C01-solution-sets",
    "With full support and finite reward minimisers, {π_r : r ∈ argmin L_R} = argmin L_DPO, unseen "
    "responses included.",
    tolerance=1e-9,
)
def solution_sets(*, factor: float = 1.0) -> Measurement:
    """Both inclusions, with one response in no pair: random members of each set are in the
    other.
    """
    beta = 0.5
    wins = torch.zeros(4, 4, dtype=torch.float64)
    wins[0, 1], wins[1, 0], wins[1, 2], wins[2, 1], wins[0, 2] = 5, 2, 3, 1, 2
    reward = toys.minimise(lambda r: _loss(r, wins, beta=1.0), torch.zeros(4, dtype=torch.float64))
    least = _loss(reward, wins, beta=1.0)
    start = LOG_REF + toys.normal(130, 4)
    found = toys.minimise(
        lambda z: _loss(torch.log_softmax(z, -1) - LOG_REF, wins, beta=beta), start
    )
    error = 0.0
    for free in (-4.0, 0.0, 4.0):
        member = factor * reward + toys.vector(0, 0, 0, free)
        policy = exact.optimal_log_policy(member, LOG_REF, beta=beta)
        error = max(error, abs(float(_loss(policy - LOG_REF, wins, beta=beta) - least)))
        moved = torch.log_softmax(found + toys.vector(0, 0, 0, free), dim=-1)
        implicit = factor * rewards.implicit_reward(moved, LOG_REF, beta=beta)
        error = max(error, abs(float(_loss(implicit, wins, beta=1.0) - least)))
    return Measurement(error)


@check(
    "C02-support",
    "If π_ref(y₃)=0 and y₃ is in no pair, some minimisers of L_DPO have π(y₃)>0, hence J = −∞: "
    "RLHF never "
    "returns them.",
    tolerance=1e-9,
)
def support(*, factor: float = 1.0) -> Measurement:
    """Move mass to the unsupported response: the loss stays at its minimum, the KL becomes
    infinite.
    """
    beta, log_ref = 0.5, toys.vector(0.5, 0.5, 0.0).log()
    p = 0.8
    least = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    error = 0.0
    for outside in (0.0, 0.1, 0.9):
        inside = torch.softmax(toys.vector(math.log(p / (1 - p)) / beta, 0.0), -1) * (1 - outside)
        policy = torch.cat([inside, toys.vector(outside)]).log()
        u = beta * (policy[0] - policy[1] - log_ref[0] + log_ref[1])
        loss = float(p * softplus(-u) + (1 - p) * softplus(u))
        error = max(error, abs(loss - factor * least))
        divergence = float(exact.kl(policy, log_ref))
        if math.isfinite(divergence) != (outside == 0.0):
            error = math.inf
    return Measurement(error)


def _initial_gradient(preference: Tensor, beta: float) -> Tensor:
    """Gradient at the reference of the population DPO loss, pairs i.i.d. from the reference."""
    ref = LOG_REF.exp()
    weights = torch.outer(ref, ref)

    def loss(z: Tensor) -> Tensor:
        h = torch.log_softmax(z, dim=-1) - LOG_REF
        return 2 * _loss(h, weights * preference, beta=beta)  # the pair (i, j) and the pair (j, i)

    return toys.gradient(loss, LOG_REF.clone())


@check(
    "C03-first-step",
    "At π_θ = π_ref with on-policy pairs ∇L_DPO = −2β∇p(π_θ≻π_ref) = −2β Cov_ref(p(y≻π_ref), s).",
    tolerance=1e-9,
)
def first_step(*, factor: float = 1.0) -> Measurement:
    """Differences of the loss and of the win rate, and the covariance, for a preference
    without BT.
    """
    beta = 0.3
    table = torch.sigmoid(toys.normal(131, 4, 4))
    preference = torch.triu(table, 1) + torch.tril(1 - table.T, -1) + 0.5 * torch.eye(4)
    ref = LOG_REF.exp()

    def win(z: Tensor) -> Tensor:
        return exact.win_rate(torch.log_softmax(z, dim=-1), LOG_REF, preference)

    slope = _initial_gradient(preference, beta)
    covariance = (ref * (preference @ ref)) @ _score(LOG_REF)
    error = toys.deviation(slope, -2 * factor * beta * covariance)
    by_win_rate = -2 * factor * beta * toys.gradient(win, LOG_REF.clone())
    return Measurement(max(error, toys.deviation(slope, by_win_rate)))


@check(
    "C04-first-step-small-gaps",
    "For Bradley-Terry with small reward gaps that first gradient is −(β/2)∇E_π r, a "
    "policy-gradient step.",
)
def first_step_small_gaps(*, factor: float = 1.0) -> Measurement:
    """Sample pairs and labels at gaps of a few hundredths; the mean slope is that of the reward."""
    beta, reward, num_pairs = 0.3, 0.02 * REWARD, 4_000_000
    ref = LOG_REF.exp()
    pairs = toys.draw(ref, 2 * num_pairs, 132).reshape(-1, 2)
    gap = reward[pairs[:, 0]] - reward[pairs[:, 1]]
    wins = toys.coin(torch.sigmoid(gap), 133)
    sign = 2 * wins - 1
    direction = _score(LOG_REF) @ ((ref * reward) @ _score(LOG_REF))
    per_pair = -beta * 0.5 * sign * (direction[pairs[:, 0]] - direction[pairs[:, 1]])
    slope = (ref * reward) @ _score(LOG_REF)
    return Measurement(toys.z_score(per_pair, -factor * beta / 2 * float(slope @ slope)))


@check(
    "C05-variance-at-reference",
    "At π_ref with on-policy pairs E‖g_DPO‖² = (β²/2) tr F, for every reward: noise that no gap "
    "shrinks.",
)
def variance_at_reference(*, factor: float = 1.0) -> Measurement:
    """Squared norms of sampled per-pair gradients against the trace of the Fisher information."""
    beta = 0.3
    ref, score = LOG_REF.exp(), _score(LOG_REF)
    pairs = toys.draw(ref, 400_000, 134).reshape(-1, 2)
    squared = (0.5 * beta * (score[pairs[:, 0]] - score[pairs[:, 1]])).pow(2).sum(-1)
    fisher = float(ref @ score.pow(2).sum(-1))
    error = toys.z_score(squared, factor * beta**2 / 2 * fisher)
    values: dict[str, float] = {"fisher": fisher}
    for name, gap in (("one", 1.0), ("tenth", 0.1)):
        reward = gap * toys.vector(1.5, 0.5, -0.5, -1.5)
        values[f"dpo_{name}"], values[f"rl_{name}"] = _relative_noise(reward)
    return Measurement(error, values)


def _relative_noise(reward: Tensor) -> tuple[float, float]:
    """Trace of covariance over squared mean, per pair, of the DPO and the REINFORCE gradient."""
    ref, score = LOG_REF.exp(), _score(LOG_REF)
    weights = torch.outer(ref, ref)
    difference = score.unsqueeze(1) - score.unsqueeze(0)
    gap = reward.unsqueeze(1) - reward.unsqueeze(0)
    sign = 2 * torch.sigmoid(gap) - 1
    found: list[float] = []
    for mean_weight, square_weight in ((sign, torch.ones_like(sign)), (gap, gap**2)):
        mean = torch.einsum("ij,ijk->k", weights * mean_weight, difference)
        second = (weights * square_weight * difference.pow(2).sum(-1)).sum()
        found.append(float((second - mean @ mean) / (mean @ mean)))
    return found[0], found[1]


@check(
    "C06-regret-identity",
    "J(π_r) − J(π̂) = β KL(π̂‖π_r) = E_π̂ δ + β log E_π̂ e^{−δ/β} for π̂ = π_{r+δ}.",
    tolerance=1e-12,
)
def regret_identity(*, factor: float = 1.0) -> Measurement:
    """Objective values by their definition against both closed forms, for random reward errors."""
    error = 0.0
    for beta in (0.3, 1.0):
        best = exact.optimal_log_policy(REWARD, LOG_REF, beta=beta)
        for seed in range(20):
            delta = toys.normal(140 + seed, 4)
            fitted = exact.optimal_log_policy(REWARD + delta, LOG_REF, beta=beta)
            at_best = exact.objective(best, REWARD, LOG_REF, beta=beta)
            regret = at_best - exact.objective(fitted, REWARD, LOG_REF, beta=beta)
            mean = exact.expectation(delta, fitted)
            tilt = beta * exact.expectation(torch.exp(-delta / beta), fitted).log()
            error = max(error, abs(float(regret - factor * (mean + tilt))))
            error = max(error, abs(float(regret - factor * beta * exact.kl(fitted, best))))
    return Measurement(error, _regret_example())


def _regret_example() -> dict[str, float]:
    """Regret and both bounds for one reward error, pairs drawn from the reference; the bounds at a
    smaller beta as well.
    """
    found, small = _bounds(2.0), _bounds(0.5)
    return found | {
        "cover_small": small["cover"],
        "oscillation_small": small["oscillation_bound"],
        "coverage_small": small["coverage_bound"],
    }


def _bounds(beta: float) -> dict[str, float]:
    """Regret and both bounds when the last response is overrated by 1."""
    delta = toys.vector(0.0, 0.0, 0.0, 1.0)
    best = exact.optimal_log_policy(REWARD, LOG_REF, beta=beta)
    fitted = exact.optimal_log_policy(REWARD + delta, LOG_REF, beta=beta)
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    path = torch.log_softmax(fitted - grid.unsqueeze(1) * delta / beta, dim=-1)
    cover = float((path - LOG_REF).exp().max())
    pairwise = 2 * exact.expectation((delta - exact.expectation(delta, LOG_REF)) ** 2, LOG_REF)
    return {
        "regret": beta * float(exact.kl(fitted, best)),
        "oscillation_bound": float(delta.max() - delta.min()) ** 2 / (8 * beta),
        "cover": cover,
        "epsilon2": float(pairwise),
        "coverage_bound": cover * float(pairwise) / (4 * beta),
    }


@check(
    "C07-regret-integral",
    "The regret is (1/β)∫₀¹(1−s) Var_{π_s}(δ) ds along the geometric path from π̂ to π_r.",
    tolerance=1e-7,
)
def regret_integral(*, factor: float = 1.0) -> Measurement:
    """Trapezoidal quadrature of reward-error variances along the path."""
    beta, delta = 0.5, toys.normal(160, 4)
    best = exact.optimal_log_policy(REWARD, LOG_REF, beta=beta)
    fitted = exact.optimal_log_policy(REWARD + delta, LOG_REF, beta=beta)
    grid = torch.linspace(0, 1, 4001, dtype=torch.float64)
    path = torch.log_softmax(fitted - grid.unsqueeze(1) * delta / beta, dim=-1)
    mean = exact.expectation(delta.expand_as(path), path)
    variance = exact.expectation((delta - mean.unsqueeze(1)) ** 2, path)
    integral = torch.trapezoid((1 - grid) * variance, grid) / beta
    regret = exact.objective(best, REWARD, LOG_REF, beta=beta) - exact.objective(
        fitted, REWARD, LOG_REF, beta=beta
    )
    return Measurement(abs(float(regret - factor * integral)))


def _worst_ratio(beta: float, seeds: range, scale: float) -> tuple[float, float]:
    """Largest regret over the two bounds osc²/(8 beta) and C eps²/(4 beta), over random errors."""
    worst_osc, worst_cover = 0.0, 0.0
    two, fair = toys.vector(0.5, 0.5).log(), toys.vector(0.0, 0.0)
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    for seed in seeds:
        delta = scale * (toys.vector(1.0, -1.0) if seed == 0 else toys.normal(seed, 2))
        fitted = exact.optimal_log_policy(fair + delta, two, beta=beta)
        best = exact.optimal_log_policy(fair, two, beta=beta)
        regret = beta * float(exact.kl(fitted, best))
        sampler = best
        path = torch.log_softmax(fitted - grid.unsqueeze(1) * delta / beta, dim=-1)
        cover = float((path - sampler).exp().max())
        pairwise = 2 * exact.expectation((delta - exact.expectation(delta, sampler)) ** 2, sampler)
        worst_osc = max(worst_osc, regret * 8 * beta / float(delta.max() - delta.min()) ** 2)
        worst_cover = max(worst_cover, regret * 4 * beta / (cover * float(pairwise)))
    return worst_osc, worst_cover


@check(
    "C08-regret-bounds",
    "Regret ≤ osc(δ)²/(8β) and ≤ C ε²/(4β) with ε² = E_{μ⊗μ}(δ−δ')², C ≥ sup_s‖π_s/μ‖∞; both "
    "constants are "
    "sharp.",
    tolerance=1e-2,
)
def regret_bounds(*, factor: float = 1.0) -> Measurement:
    """The bounds hold for large errors, and the ratio to each tends to 1 for small
    balanced ones.
    """
    large = _worst_ratio(0.5, range(1, 200), 1.0)
    small = _worst_ratio(0.5, range(1), 1e-3)
    error = max(abs(ratio - factor) for ratio in small)
    return Measurement(error if max(large) <= factor else math.inf)


@check(
    "C09-kl-projection",
    "L_DPO(θ) = H(labels) + E_pairs KL(p* ‖ σ(βΔ_θ)): DPO projects the truth onto its class, "
    "weighted by the "
    "sampler.",
    tolerance=1e-12,
)
def kl_projection(*, factor: float = 1.0) -> Measurement:
    """Cross-entropy of pairs against entropy plus divergence, written out, at random policies."""
    beta = 0.4
    preference = rewards.preference_table(REWARD)
    weights = torch.softmax(toys.normal(161, 16), -1).reshape(4, 4)
    error = 0.0
    for seed in range(20):
        h = toys.log_policy(162 + seed, 4) - LOG_REF
        model = rewards.preference_table(beta * h)
        cross = weights * (preference * -model.log() - (1 - preference) * torch.log(1 - model))
        entropy = -weights * (preference * preference.log() + preference.T * preference.T.log())
        gap = (
            preference * (preference / model).log() + preference.T * (preference.T / model.T).log()
        )
        error = max(error, abs(float((cross - entropy - factor * weights * gap).sum())))
    return Measurement(error)


@check(
    "C10-misspecification",
    "In a one-parameter class infinite clean data can leave DPO below π_ref in reward; maximising "
    "J within the class cannot.",
    tolerance=1e-6,
)
def misspecification(*, factor: float = 1.0) -> Measurement:
    """DPO fits the frequent pair, theta = gap / (beta feature gap), and feeds a bad response.

    It does so, too, when one pair in a hundred shows the third response losing, so that a free
    reward model would learn the rewards exactly.
    """
    beta, features = 0.5, toys.vector(1.0, 0.0, 2.0)
    log_ref, reward = toys.vector(0.4, 0.4, 0.2).log(), toys.vector(1.0, 0.0, -2.0)
    preference = rewards.preference_table(reward)

    def policy(theta: float) -> Tensor:
        return torch.log_softmax(log_ref + theta * features, dim=-1)

    def fit(rare: float) -> float:
        weights = torch.tensor([[0, 1 - rare, rare / 2], [0, 0, rare / 2], [0, 0, 0]])
        wins = weights * preference + (weights * (1 - preference)).T
        return toys.minimise_scalar(
            lambda theta: float(_loss(theta * features, wins, beta=beta)), -20, 20
        )

    def mean(theta: float) -> float:
        return float(exact.expectation(reward, policy(theta)))

    theta, mixed = fit(0.0), fit(0.01)
    best = toys.minimise_scalar(
        lambda t: -float(exact.objective(policy(t), reward, log_ref, beta=beta)), -20, 20
    )
    values = {
        "theta": theta,
        "mixed_theta": mixed,
        "ref": mean(0.0),
        "dpo": mean(theta),
        "mixed": mean(mixed),
        "rlhf": mean(best),
        "bad": float(policy(theta).exp()[2]),
    }
    error = abs(theta - factor * float(reward[0] - reward[1]) / beta)
    ordered = max(values["dpo"], values["mixed"]) < values["ref"] < values["rlhf"]
    return Measurement(error if ordered else math.inf, values)


@check(
    "C11-unseen-mass",
    "L_DPO is unchanged when mass m moves to responses in no pair; adding α·NLL charges −α "
    "log(1−m).",
    tolerance=1e-12,
)
def unseen_mass(*, factor: float = 1.0) -> Measurement:
    """Scale the seen responses by 1-m and evaluate both losses before and after."""
    beta, alpha, error = 0.3, 0.7, 0.0
    seen = toys.log_policy(190, 3)

    def losses(log_pi: Tensor) -> tuple[float, float]:
        u = beta * (log_pi[0] - log_pi[1] - LOG_REF[0] + LOG_REF[1])
        plain = float(softplus(-u))
        return plain, plain - alpha * float(log_pi[0])

    before = losses(seen)
    for m in (0.01, 0.5, 0.99):
        after = losses(seen + math.log(1 - m))
        error = max(error, abs(after[0] - before[0]))
        error = max(error, abs(after[1] - before[1] + factor * alpha * math.log(1 - m)))
    return Measurement(error)


@check(
    "C12-displacement",
    "Along the gradient flow d log π_w/dt = βσ(−u)⟨φ_w−E_πφ, φ_w−φ_l⟩: it can fall; "
    "du/dt = β²σ(−u)‖φ_w−φ_l‖² cannot.",
    tolerance=1e-6,
)
def displacement(*, factor: float = 1.0) -> Measurement:
    """One small step of gradient descent on one pair, for shared features and for a table."""
    beta, step = 0.5, 1e-6
    shared = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    log_ref = toys.vector(0.3, 0.3, 0.4).log()
    error, values = 0.0, dict[str, float]()
    for name, features in (("shared", shared), ("table", torch.eye(3, dtype=torch.float64))):

        def log_pi(theta: Tensor, features: Tensor = features) -> Tensor:
            return torch.log_softmax(log_ref + features @ theta, dim=-1)

        def loss(theta: Tensor, features: Tensor = features) -> Tensor:
            return softplus(-beta * (features[0] - features[1]) @ theta)

        theta = torch.zeros(features.shape[1], dtype=torch.float64)
        moved = theta - step * toys.gradient(loss, theta)
        rate = float(log_pi(moved)[0] - log_pi(theta)[0]) / step
        mean = log_ref.exp() @ features
        claimed = beta * 0.5 * float((features[0] - mean) @ (features[0] - features[1]))
        error = max(error, abs(rate - factor * claimed))
        gap = features[0] - features[1]
        rise = beta * float(gap @ moved) / step
        error = max(error, abs(rise - factor * beta**2 * 0.5 * float(gap @ gap)))
        values[f"rate_{name}"] = rate
        for time in range(100):
            if time % 4 == 0:
                for place, response in enumerate(("chosen", "rejected", "other")):
                    now = float(log_pi(theta).exp()[place])
                    values[f"path_{name}_{response}_{time // 4:02d}"] = now
            theta = theta - 0.1 * toys.gradient(loss, theta)
        values[f"chosen_{name}"] = float(log_pi(theta).exp()[0])
        values[f"other_{name}"] = float(log_pi(theta).exp()[2])
        values[f"margin_{name}"] = float((features[0] - features[1]) @ theta)
    if not values["rate_shared"] < 0 < values["rate_table"]:
        error = math.inf
    return Measurement(error, values)


@check(
    "C13-pair-minimisers",
    "For a pair won with probability p: DPO Δ=logit(p)/β, IPO Δ=(p−½)/τ, cDPO at p=1 "
    "Δ=logit(1−ε)/β; "
    "DPO at p=1 has none.",
    tolerance=1e-6,
)
def pair_minimisers(*, factor: float = 1.0) -> Measurement:
    """Golden-section minimisation of each expected loss over the log-ratio margin."""
    beta, tau, epsilon, error = 0.3, 0.2, 0.1, 0.0

    def sp(u: float) -> float:
        return math.log1p(math.exp(-abs(u))) + max(u, 0.0)

    def dpo_risk(p: float, d: float) -> float:
        return p * sp(-beta * d) + (1 - p) * sp(beta * d)

    def ipo_risk(p: float, d: float) -> float:
        return p * (d - 0.5 / tau) ** 2 + (1 - p) * (d + 0.5 / tau) ** 2

    for p in (0.55, 0.7, 0.9):
        logit = math.log(p / (1 - p))
        dpo = toys.minimise_scalar(partial(dpo_risk, p), -60, 60)
        ipo = toys.minimise_scalar(partial(ipo_risk, p), -60, 60)
        error = max(error, abs(dpo - factor * logit / beta), abs(ipo - factor * (p - 0.5) / tau))
    smooth = toys.minimise_scalar(
        lambda d: (1 - epsilon) * sp(-beta * d) + epsilon * sp(beta * d), -60, 60
    )
    certain = toys.minimise_scalar(lambda d: sp(-beta * d), -60, 60)
    error = max(error, abs(smooth - math.log((1 - epsilon) / epsilon) / beta))
    return Measurement(error if certain > 59.9 else math.inf, {"ipo_certain": 0.5 / tau})


@check(
    "C14-ipo-identity",
    "With y,y'~μ i.i.d. the IPO minimiser has h(y)−h(y') = [p(y≻μ)−p(y'≻μ)]/τ: the tilt by "
    "p(·≻μ)/τ.",
)
def ipo_identity(*, factor: float = 1.0) -> Measurement:
    """At the claimed log-ratios the sampled slopes of (h_w-h_l-1/(2 tau))² average to zero."""
    tau, num_pairs = 0.4, 400_000
    table = torch.sigmoid(toys.normal(191, 4, 4))
    preference = torch.triu(table, 1) + torch.tril(1 - table.T, -1) + 0.5 * torch.eye(4)
    mu = toys.vector(0.4, 0.3, 0.2, 0.1)
    h = factor * (preference @ mu) / tau
    pairs = toys.draw(mu, 2 * num_pairs, 192).reshape(-1, 2)
    wins = toys.coin(preference[pairs[:, 0], pairs[:, 1]], 193) > 0
    chosen = torch.where(wins, pairs[:, 0], pairs[:, 1])
    rejected = torch.where(wins, pairs[:, 1], pairs[:, 0])
    residual = 2 * (h[chosen] - h[rejected] - 0.5 / tau)
    eye = torch.eye(4, dtype=torch.float64)
    return Measurement(toys.z_score(residual.unsqueeze(1) * (eye[chosen] - eye[rejected]), 0.0))


@check(
    "C15-one-pair-variance",
    "From n labels of one pair Var(log π̂_w/π̂_l) ≈ 1/(nβ²p(1−p)): a small β amplifies label noise.",
)
def one_pair_variance(*, factor: float = 1.0) -> Measurement:
    """Refit the pair on 20,000 simulated data sets of 4,000 labels."""
    n, p, beta, repeats = 4000, 0.7, 0.1, 20_000
    source = toys.generator(194)
    wins = torch.binomial(
        torch.full((repeats,), float(n), dtype=torch.float64),
        torch.full((repeats,), p, dtype=torch.float64),
        generator=source,
    )
    margin = torch.logit(wins / n) / beta
    claimed = 1 / (n * beta**2 * p * (1 - p))
    centred = (margin - math.log(p / (1 - p)) / beta) ** 2
    return Measurement(toys.z_score(centred, factor * claimed), {"std": math.sqrt(claimed)})


_FEATURES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5], [0.3, -1.0]], dtype=torch.float64)
_PAIRS = torch.tensor([[0, 1], [0, 2], [1, 2], [1, 3], [2, 3], [3, 0]])


def _refit(p: Tensor, beta: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Simulated sqrt(n)(theta_hat - theta_star), the Hessian, and the label covariance of the
    score.
    """
    n, repeats = 2000, 4000
    difference = beta * (_FEATURES[_PAIRS[:, 0]] - _FEATURES[_PAIRS[:, 1]])
    source = toys.generator(seed)
    which = torch.randint(6, (repeats, n), generator=source)
    wins = torch.bernoulli(p[which], generator=source)
    counts = torch.zeros(repeats, 6, dtype=torch.float64)
    counts.scatter_add_(1, which, torch.ones_like(wins))
    won = torch.zeros(repeats, 6, dtype=torch.float64).scatter_add_(1, which, wins)

    def newton(total: Tensor, won: Tensor) -> Tensor:
        theta = torch.zeros(total.shape[0], 2, dtype=torch.float64)
        for _ in range(12):
            model = torch.sigmoid(theta @ difference.T)
            slope = (total * model - won) @ difference
            curvature = torch.einsum(
                "rn,ni,nj->rij", total * model * (1 - model), difference, difference
            )
            theta = theta - torch.linalg.solve(curvature, slope)
        return theta

    star = newton(torch.full((1, 6), 1 / 6, dtype=torch.float64), p.unsqueeze(0) / 6)
    model = torch.sigmoid(star @ difference.T).squeeze(0)
    curvature = torch.einsum("n,ni,nj->ij", model * (1 - model), difference, difference) / 6
    noise = p * (1 - model) ** 2 + (1 - p) * model**2
    covariance = torch.einsum("n,ni,nj->ij", noise, difference, difference) / 6
    return math.sqrt(n) * (newton(counts, won) - star), curvature, covariance


@check(
    "C16-asymptotic-normality",
    "Well specified log-linear DPO: √n(θ̂−θ*) has covariance H⁻¹, H = β²E[p(1−p)ΔφΔφᵀ].",
)
def asymptotic_normality(*, factor: float = 1.0) -> Measurement:
    """Covariance of 4,000 refits against the inverse Hessian."""
    beta, theta = 0.5, toys.vector(1.0, -0.6)
    p = torch.sigmoid(beta * (_FEATURES[_PAIRS[:, 0]] - _FEATURES[_PAIRS[:, 1]]) @ theta)
    deviations, curvature, _ = _refit(p, beta, 195)
    outer = torch.einsum("ri,rj->rij", deviations, deviations)
    return Measurement(toys.z_score(outer, factor * torch.linalg.inv(curvature)))


@check(
    "C17-sandwich",
    "Misspecified: the covariance is H⁻¹GH⁻¹ with G the covariance of the score, not H⁻¹.",
)
def sandwich(*, factor: float = 1.0) -> Measurement:
    """Covariance of 4,000 refits to preferences outside the class against the sandwich; the
    inverse Hessian is far from it.
    """
    p = toys.vector(0.5, 0.98, 0.98, 0.5, 0.5, 0.02)
    deviations, curvature, covariance = _refit(p, 0.5, 196)
    inverse = torch.linalg.inv(curvature)
    outer = torch.einsum("ri,rj->rij", deviations, deviations)
    error = toys.z_score(outer, factor * inverse @ covariance @ inverse)
    return Measurement(error if toys.z_score(outer, inverse) > Z_LIMIT else math.inf)


@check(
    "C18-length-of-score",
    "On policy E‖Σ_t s_t‖² = Σ_t E‖s_t‖²: the score's size grows with the number of tokens.",
    tolerance=1e-10,
)
def length_of_score(*, factor: float = 1.0) -> Measurement:
    """Enumerate the 27 strings of a model with shared parameters; scores by automatic
    derivatives.
    """
    embed = toys.normal(197, 4, 3)

    def token_logps(theta: Tensor) -> Tensor:
        table = torch.log_softmax(embed @ theta.reshape(3, 3), dim=-1)
        first = table[3].reshape(3, 1, 1).expand(3, 3, 3)
        second = table[:3].reshape(3, 3, 1).expand(3, 3, 3)
        third = (table[:3] + 0.0).reshape(1, 3, 3).expand(3, 3, 3)
        return torch.stack([first, second, third])

    theta = toys.normal(198, 9)
    scores = toys.jacobian(token_logps, theta)
    probs = token_logps(theta).sum(0).exp()
    whole = (probs * scores.sum(0).pow(2).sum(-1)).sum()
    parts = (probs * scores.pow(2).sum(-1)).sum(dim=(1, 2, 3))
    values = {f"part{i}": float(parts[i]) for i in range(3)} | {"whole": float(whole)}
    return Measurement(abs(float(whole - factor * parts.sum())), values)


@check(
    "C19-intransitivity",
    "On a Condorcet cycle with uniform pairs DPO returns π_ref; the Nash policy is uniform.",
    tolerance=1e-8,
)
def intransitivity(*, factor: float = 1.0) -> Measurement:
    """Minimise DPO on rock-paper-scissors preferences; check that uniform cannot be exploited."""
    cycle = torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]], dtype=torch.float64)
    log_ref = toys.vector(0.6, 0.3, 0.1).log()
    found = toys.minimise(
        lambda z: _loss(torch.log_softmax(z, -1) - log_ref, cycle, beta=0.3), toys.normal(199, 3)
    )
    claimed = torch.softmax(factor * log_ref, dim=-1)
    exploit = float((cycle @ torch.full((3,), 1 / 3, dtype=torch.float64) - 0.5).max())
    against_ref = cycle @ log_ref.exp()
    return Measurement(
        max(toys.deviation(torch.softmax(found, -1), claimed), abs(exploit)),
        {"exploit_ref": float(against_ref.max()), "q": float(cycle[0, 1])},
    )


@check(
    "C20-win-rate-objective",
    "p(π≻π_ref) − β KL is maximised by the tilt with p(·≻π_ref), which beats the reward tilt at "
    "equal KL.",
    tolerance=1e-8,
)
def win_rate_objective(*, factor: float = 1.0) -> Measurement:
    """Climb the win rate numerically; then match KLs by bisection and compare win rates."""
    beta, reward = 0.2, toys.vector(4.0, 0.4, -0.3, -1.0)
    preference = rewards.preference_table(reward)
    against_ref = preference @ LOG_REF.exp()

    def loss(z: Tensor) -> Tensor:
        log_pi = torch.log_softmax(z, dim=-1)
        return beta * exact.kl(log_pi, LOG_REF) - exact.win_rate(log_pi, LOG_REF, preference)

    found = torch.log_softmax(toys.minimise(loss, LOG_REF.clone()), dim=-1)
    claimed = exact.optimal_log_policy(against_ref, LOG_REF, beta=factor * beta)
    target = float(exact.kl(found, LOG_REF))

    def deficit(scale: float) -> float:
        return (
            float(exact.kl(exact.optimal_log_policy(scale * reward, LOG_REF, beta=1.0), LOG_REF))
            - target
        )

    tilted = exact.optimal_log_policy(toys.root(deficit, 1e-6, 50.0) * reward, LOG_REF, beta=1.0)
    wins = [float(exact.win_rate(p, LOG_REF, preference)) for p in (found, tilted)]
    error = toys.deviation(found, claimed)
    return Measurement(
        error if wins[0] > wins[1] else math.inf,
        {"win_tilt": wins[0], "reward_tilt": wins[1], "kl": target},
    )


@check(
    "C21-iteration",
    "k exact rounds with π_ref ← π_k and the same β end at π_{β/k}: iterating divides β.",
    tolerance=1e-7,
)
def iteration(*, factor: float = 1.0) -> Measurement:
    """Three rounds of numerical DPO on exact preferences, each with the last policy as
    reference.
    """
    beta, rounds = 1.5, 3
    preference = rewards.preference_table(REWARD)
    log_ref = LOG_REF
    for _ in range(rounds):

        def loss(z: Tensor, log_ref: Tensor = log_ref) -> Tensor:
            return _loss(torch.log_softmax(z, -1) - log_ref, preference, beta=beta)

        log_ref = torch.log_softmax(toys.minimise(loss, log_ref.clone()), dim=-1)
    claimed = exact.optimal_log_policy(REWARD, LOG_REF, beta=beta / (rounds * factor))
    return Measurement(toys.deviation(log_ref, claimed))


@check(
    "C22-label-noise",
    "Labels flipped with probability ε teach DPO the margin logit(p(1−ε)+(1−p)ε) instead of logit "
    "p.",
)
def label_noise(*, factor: float = 1.0) -> Measurement:
    """Flip simulated labels; at the claimed margin the sampled slope of the loss averages
    to zero.
    """
    p, epsilon, n = 0.85, 0.2, 400_000
    wins = toys.coin(torch.full((n,), p, dtype=torch.float64), 200)
    flips = toys.coin(torch.full((n,), epsilon, dtype=torch.float64), 201)
    observed = wins * (1 - flips) + (1 - wins) * flips
    q = p * (1 - epsilon) + (1 - p) * epsilon
    margin = factor * math.log(q / (1 - q))
    slope = 1 / (1 + math.exp(-margin)) - observed
    values = {
        "clean": math.log(p / (1 - p)),
        "noisy": math.log(q / (1 - q)),
        "p": p,
        "eps": epsilon,
    }
    return Measurement(toys.z_score(slope, 0.0), values)


@check(
    "C23-excess-loss",
    "With margins in [−B,B] and pairs from μ⊗μ, regret ≤ C·(L_DPO − min)/(8βσ'(B)²), sharp as B→0.",
    tolerance=1e-2,
)
def excess_loss(*, factor: float = 1.0) -> Measurement:
    """The ratio of regret to bound is below 1 for random policies and tends to 1 for small gaps."""
    beta, log_mu = 0.5, toys.vector(0.5, 0.5).log()
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)

    def ratio(reward: Tensor, delta: Tensor) -> float:
        best = exact.optimal_log_policy(reward, log_mu, beta=beta)
        fitted = exact.optimal_log_policy(reward + delta, log_mu, beta=beta)
        p, m = rewards.preference_table(reward), rewards.preference_table(reward + delta)
        divergence = p * (p / m).log() + (1 - p) * ((1 - p) / (1 - m)).log()
        excess = float(torch.einsum("i,j,ij->", log_mu.exp(), log_mu.exp(), divergence))
        path = torch.log_softmax(fitted - grid.unsqueeze(1) * delta / beta, dim=-1)
        cover = float((path - log_mu).exp().max())
        edge = max(float((r[0] - r[1]).abs()) for r in (reward, reward + delta))
        slope = 1 / (1 + math.exp(-edge)) / (1 + math.exp(edge))
        return beta * float(exact.kl(fitted, best)) * 8 * beta * slope**2 / (cover * excess)

    large = max(ratio(toys.normal(s, 2), toys.normal(s + 1, 2)) for s in range(300, 400, 2))
    small = ratio(toys.vector(0.0, 0.0), toys.vector(1e-3, -1e-3))
    return Measurement(abs(small - factor) if large <= factor else math.inf)


@check(
    "C24-relative-noise",
    "For r* = c r₁, c→0: c² times DPO's relative variance at π_ref tends to 2 tr F/‖Cov(r₁,s)‖²; "
    "with the true reward it stays.",
    tolerance=1e-4,
)
def relative_noise(*, factor: float = 1.0) -> Measurement:
    """Enumerated variances at three sizes of the reward; the pairwise estimator's mean against
    differences of the expected reward.
    """
    ref, score = LOG_REF.exp(), _score(LOG_REF)
    fisher = float(ref @ score.pow(2).sum(-1))
    covariance = (ref * REWARD) @ score
    c = 1e-3
    small, tenth, whole = (_relative_noise(size * REWARD) for size in (c, 0.1, 1.0))
    limit = factor * 2 * fisher / float(covariance @ covariance)
    error = max(abs(c**2 * small[0] / limit - 1), abs(tenth[1] / whole[1] - 1))

    def expected(z: Tensor) -> Tensor:
        return torch.softmax(z, dim=-1) @ REWARD

    gap = REWARD.unsqueeze(1) - REWARD.unsqueeze(0)
    difference = score.unsqueeze(1) - score.unsqueeze(0)
    mean = 0.5 * torch.einsum("ij,ijk->k", torch.outer(ref, ref) * gap, difference)
    return Measurement(max(error, toys.deviation(mean, toys.gradient(expected, LOG_REF.clone()))))


@check(
    "C25-regret-sampling",
    "J(π_r) − J(π_{r+δ}) = E_π̂ δ + β log E_π̂ e^{−δ/β}, by sampling penalised rewards of both "
    "policies.",
)
def regret_sampling(*, factor: float = 1.0) -> Measurement:
    """Mean of r - beta log(pi/pi_ref) over responses of the best and of the fitted policy."""
    beta, num_samples = 0.5, 400_000
    delta = toys.vector(-0.5, 0.3, 0.8, 1.2)
    best = exact.optimal_log_policy(REWARD, LOG_REF, beta=beta)
    fitted = exact.optimal_log_policy(REWARD + delta, LOG_REF, beta=beta)
    sampled: list[Tensor] = []
    for policy, seed in ((best, 210), (fitted, 211)):
        drawn = toys.draw(policy.exp(), num_samples, seed)
        sampled.append((REWARD - beta * (policy - LOG_REF))[drawn])
    tilt = beta * exact.expectation(torch.exp(-delta / beta), fitted).log()
    claimed = factor * (exact.expectation(delta, fitted) + tilt)
    return Measurement(toys.z_score(sampled[0] - sampled[1], claimed))


@check(
    "C26-projection-sampling",
    "The mean DPO loss of sampled Bradley-Terry pairs is H(labels) + E_pairs KL(p* ‖ σ(βΔ_θ)).",
)
def projection_sampling(*, factor: float = 1.0) -> Measurement:
    """Draw pairs and labels, average the loss of a random policy; compare with entropy plus
    divergence.
    """
    beta, num_pairs, ref = 0.4, 400_000, LOG_REF.exp()
    preference = rewards.preference_table(REWARD)
    h = 3 * toys.normal(212, 4)
    pairs = toys.draw(ref, 2 * num_pairs, 213).reshape(-1, 2)
    wins = toys.coin(preference[pairs[:, 0], pairs[:, 1]], 214)
    margin = (2 * wins - 1) * beta * (h[pairs[:, 0]] - h[pairs[:, 1]])
    model = rewards.preference_table(beta * h)
    two_points = torch.stack([preference, preference.T], dim=-1).log()
    fitted = torch.stack([model, model.T], dim=-1).log()
    weights = torch.outer(ref, ref)
    entropy = (weights * -exact.expectation(two_points, two_points)).sum()
    gap = (weights * exact.kl(two_points, fitted)).sum()
    return Measurement(toys.z_score(softplus(-margin), entropy + factor * gap))
