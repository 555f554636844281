"""Chapter 5: the family of losses, what each of them changes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from dpo.core import exact, rewards
from dpo.theory import toys
from dpo.theory.registry import Measurement, check

LOG_REF = toys.vector(0.35, 0.3, 0.2, 0.15).log()
REWARD = toys.vector(1.2, 0.4, -0.3, -1.0)


def _sp(u: float) -> float:
    """Softplus of a number."""
    return math.log1p(math.exp(-abs(u))) + max(u, 0.0)


def _sigmoid(u: float) -> float:
    return 1 / (1 + math.exp(-u))


@check(
    "V01-convex-losses",
    "Minimisers of pℓ(u)+(1−p)ℓ(−u): logistic logit p, square 2p−1, exponential ½logit p, hinge "
    "sign(2p−1).",
    tolerance=1e-6,
)
def convex_losses(*, factor: float = 1.0) -> Measurement:
    """Golden-section minimisation for four losses and three probabilities."""
    losses: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
        "logistic": (lambda u: _sp(-u), lambda p: math.log(p / (1 - p))),
        "square": (lambda u: (1 - u) ** 2, lambda p: 2 * p - 1),
        "exponential": (lambda u: math.exp(-u), lambda p: 0.5 * math.log(p / (1 - p))),
        "hinge": (lambda u: max(0.0, 1 - u), lambda p: math.copysign(1.0, 2 * p - 1)),
    }
    error = 0.0
    for p, (loss, claimed) in itertools.product((0.2, 0.6, 0.9), losses.values()):

        def risk(u: float, p: float = p, loss: Callable[[float], float] = loss) -> float:
            return p * loss(u) + (1 - p) * loss(-u)

        found = toys.minimise_scalar(risk, -8.0, 8.0)
        error = max(error, abs(found - factor * claimed(p)))
    return Measurement(error)


@check(
    "V02-divergence-direction",
    "With soft label q: cDPO is KL(q‖σ(u)) + H(q), EXO is KL(σ(u)‖q); each is least only at "
    "u = logit q.",
    tolerance=1e-6,
)
def divergence_direction(*, factor: float = 1.0) -> Measurement:
    """The two losses as written in their papers against divergences of two-point distributions,
    and where a search finds each of them least.
    """
    epsilon = 0.1

    def smoothed(u: float) -> float:
        return (1 - epsilon) * _sp(-u) + epsilon * _sp(u)

    def reverse(u: float) -> float:
        right, wrong = _sigmoid(u), _sigmoid(-u)
        return right * math.log(right / (1 - epsilon)) + wrong * math.log(wrong / epsilon)

    label = toys.vector(1 - epsilon, epsilon).log()
    entropy = -exact.expectation(label, label)
    error = 0.0
    for u in torch.linspace(-6, 6, 49, dtype=torch.float64):
        model = torch.stack([logsigmoid(u), logsigmoid(-u)])
        cdpo = (1 - epsilon) * softplus(-u) + epsilon * softplus(u)
        right, wrong = torch.sigmoid(u), torch.sigmoid(-u)
        exo = right * torch.log(right / (1 - epsilon)) + wrong * torch.log(wrong / epsilon)
        error = max(error, abs(float(cdpo - factor * exact.kl(label, model) - entropy)))
        error = max(error, abs(float(exo - factor * exact.kl(model, label))))
    least = factor * math.log((1 - epsilon) / epsilon)
    for loss in (smoothed, reverse):
        error = max(error, abs(toys.minimise_scalar(loss, -8.0, 8.0) - least))
    return Measurement(error)


@check(
    "V03-robust-unbiased",
    "[(1−ε)sp(−u)−ε sp(u)]/(1−2ε) averages over flipped labels to sp(−u) of the clean label.",
)
def robust_unbiased(*, factor: float = 1.0) -> Measurement:
    """Flip labels of pairs with a fixed margin; the mean robust loss is the clean loss."""
    epsilon, u, n = 0.2, 1.3, 400_000
    flips = toys.coin(torch.full((n,), epsilon, dtype=torch.float64), 210)
    observed = u * (1 - 2 * flips)
    robust = ((1 - epsilon) * softplus(-observed) - epsilon * softplus(observed)) / (
        1 - 2 * epsilon
    )
    return Measurement(toys.z_score(robust, factor * _sp(-u)))


@check(
    "V04-robust-unbounded",
    "Its slope tends to −ε/(1−2ε) as u→∞: on separable data the robust loss has no minimiser.",
    tolerance=1e-6,
)
def robust_unbounded(*, factor: float = 1.0) -> Measurement:
    """Difference quotient of the loss far to the right, and its sign of divergence."""
    epsilon = 0.2

    def robust(u: float) -> float:
        return ((1 - epsilon) * _sp(-u) - epsilon * _sp(u)) / (1 - 2 * epsilon)

    slope = (robust(60.0) - robust(40.0)) / 20.0
    return Measurement(abs(slope + factor * epsilon / (1 - 2 * epsilon)), {"at_60": robust(60.0)})


@check(
    "V05-bco-bound",
    "sp(−(a−δ))+sp(b−δ) > sp(−(a−b)) for every δ; its minimum over δ is 2 sp(−(a−b)/2), at "
    "δ = (a+b)/2.",
    tolerance=1e-6,
)
def bco_bound(*, factor: float = 1.0) -> Measurement:
    """Minimise binary classifier optimisation over its shift; check the order everywhere."""
    error = 0.0
    for a, b in itertools.product((-3.0, -0.5, 1.0, 4.0), (-2.0, 0.0, 2.5)):

        def bco(delta: float, a: float = a, b: float = b) -> float:
            return _sp(-(a - delta)) + _sp(b - delta)

        shift = toys.minimise_scalar(bco, -20.0, 20.0)
        error = max(error, abs(shift - factor * (a + b) / 2))
        best = bco(shift)
        error = max(error, abs(best - 2 * _sp(-factor * (a - b) / 2)))
        if best <= _sp(-(a - b)):
            error = math.inf
    return Measurement(error)


@check(
    "V06-kto-threshold",
    "At fixed z₀ KTO's risk is monotone in h: it decides by p ≷ λ_U/(λ_D+λ_U) and has no finite "
    "minimiser.",
    tolerance=1e-9,
)
def kto_threshold(*, factor: float = 1.0) -> Measurement:
    """Find the desirability at which the expected loss stops depending on h, by bisection."""
    desirable, undesirable, beta, z0 = 1.0, 1.4, 0.3, 0.5

    def risk(h: float, p: float) -> float:
        gain = 1 - _sigmoid(beta * (h - z0))
        loss = 1 - _sigmoid(beta * (z0 - h))
        return p * desirable * gain + (1 - p) * undesirable * loss

    def excess(low: float, high: float, p: float) -> float:
        return risk(low, p) - risk(high, p)

    error, threshold = 0.0, factor * undesirable / (desirable + undesirable)
    for low, high in ((-2.0, 1.0), (0.0, 5.0), (-9.0, 9.0)):
        found = toys.root(partial(excess, low, high), 0.0, 1.0)
        error = max(error, abs(found - threshold))
    return Measurement(error, {"threshold": undesirable / (desirable + undesirable)})


@check(
    "V07-nca-target",
    "NCA (β=1, pairs i.i.d. from π_ref) is minimised by π = 2 p(y≻π_ref) π_ref, which is "
    "normalised.",
    tolerance=1e-8,
)
def nca_target(*, factor: float = 1.0) -> Measurement:
    """Minimise the population loss over policies numerically."""
    table = torch.sigmoid(toys.normal(211, 4, 4))
    preference = torch.triu(table, 1) + torch.tril(1 - table.T, -1)
    preference = preference + 0.5 * torch.eye(4, dtype=torch.float64)
    ref = LOG_REF.exp()
    weights = 2 * torch.outer(ref, ref) * preference

    def loss(z: Tensor) -> Tensor:
        h = torch.log_softmax(z, dim=-1) - LOG_REF
        chosen = softplus(-h) + 0.5 * softplus(h)
        return (weights * (chosen.unsqueeze(1) + 0.5 * softplus(h).unsqueeze(0))).sum()

    found = torch.softmax(toys.minimise(loss, LOG_REF.clone()), dim=-1)
    claimed = 2 * factor * (preference @ ref) * ref
    return Measurement(toys.deviation(found, claimed), {"total": float(claimed.sum())})


@check(
    "V08-sppo-remainder",
    "SPPO replaces log E_{π_t} e^{ηP} by η/2; the exact value exceeds it by η² Var(P)/2 + O(η³).",
    tolerance=1e-4,
)
def sppo_remainder(*, factor: float = 1.0) -> Measurement:
    """Extrapolate the difference, over eta², to eta = 0."""
    preference = rewards.preference_table(2 * REWARD)
    win = preference @ LOG_REF.exp()

    def remainder(eta: float) -> float:
        return (float(torch.logsumexp(LOG_REF + eta * win, -1)) - eta / 2) / eta**2

    variance = float(exact.expectation((win - 0.5) ** 2, LOG_REF))
    return Measurement(abs(2 * remainder(5e-4) - remainder(1e-3) - factor * variance / 2))


@check(
    "V09-length-margin",
    "sp(−[βΔ+α(|w|−|l|)]) is minimised by the tilt of r − α|y|: the sign that penalises length.",
    tolerance=1e-8,
)
def length_margin(*, factor: float = 1.0) -> Measurement:
    """Minimise the population loss with Bradley-Terry labels of r and four lengths."""
    beta, alpha = 0.5, 0.3
    lengths = toys.vector(1, 3, 4, 7)
    preference = rewards.preference_table(REWARD)

    def loss(z: Tensor) -> Tensor:
        total = beta * (torch.log_softmax(z, dim=-1) - LOG_REF) + alpha * lengths
        return (preference * softplus(total.unsqueeze(0) - total.unsqueeze(1))).sum()

    found = torch.log_softmax(toys.minimise(loss, LOG_REF.clone()), dim=-1)
    claimed = exact.optimal_log_policy(REWARD - factor * alpha * lengths, LOG_REF, beta=beta)
    return Measurement(toys.deviation(found, claimed))


@check(
    "V10-average-not-normalised",
    "For tokens drawn i.i.d. from p, Σ_{|y|=n} exp(mean log-prob) = (Σ_v p_v^{1/n})^n, not 1.",
    tolerance=1e-12,
)
def average_not_normalised(*, factor: float = 1.0) -> Measurement:
    """Enumerate all strings of up to five tokens over three letters."""
    token = toys.vector(0.6, 0.3, 0.1).log()
    error, values = 0.0, dict[str, float]()
    for n in range(1, 6):
        strings = torch.tensor(list(itertools.product(range(3), repeat=n)))
        total = token[strings].mean(dim=-1).exp().sum()
        claimed = (token.exp() ** (1 / n)).sum() ** n
        error = max(error, abs(float(total - factor * claimed)))
        values[f"n{n}"] = float(total)
    return Measurement(error, values)


@check(
    "V11-simpo-target",
    "SimPO without margin is minimised by π(y) = exp(|y|(r(y)/β − c)), c fixed by normalisation.",
    tolerance=1e-8,
)
def simpo_target(*, factor: float = 1.0) -> Measurement:
    """Minimise the population loss over policies; find c by bisection."""
    beta, lengths = 2.0, toys.vector(1, 2, 2, 5)
    preference = rewards.preference_table(REWARD)

    def loss(z: Tensor) -> Tensor:
        average = torch.log_softmax(z, dim=-1) / lengths
        return (preference * softplus(-beta * (average.unsqueeze(1) - average.unsqueeze(0)))).sum()

    found = torch.log_softmax(toys.minimise(loss, torch.zeros(4, dtype=torch.float64)), dim=-1)

    def surplus(c: float) -> float:
        return 1 - float(torch.exp(lengths * (factor * REWARD / beta - c)).sum())

    claimed = lengths * (factor * REWARD / beta - toys.root(surplus, -20.0, 20.0))
    return Measurement(toys.deviation(found, claimed))


ALPHA = 0.5
DIVERGENCES: dict[str, tuple[toys.Function, toys.Function]] = {
    "reverse KL": (lambda z: z * z.log(), lambda z: z.log()),
    "forward KL": (lambda z: -z.log(), lambda z: -1 / z),
    "Jensen-Shannon": (
        lambda z: z * z.log() - (z + 1) * ((z + 1) / 2).log(),
        lambda z: (2 * z / (1 + z)).log(),
    ),
    "alpha": (
        lambda z: (z ** (1 - ALPHA) - (1 - ALPHA) * z - ALPHA) / (ALPHA * (ALPHA - 1)),
        lambda z: -(z**-ALPHA) / ALPHA,
    ),
}
"""Generators f of f-divergences and their derivatives, each up to a constant."""


def _f_optimum(f: toys.Function, beta: float) -> Tensor:
    """Numerical maximiser of E_pi r - beta D_f(pi || pi_ref)."""

    def loss(z: Tensor) -> Tensor:
        pi = torch.softmax(z, dim=-1)
        return -(pi @ REWARD - beta * (LOG_REF.exp() * f(pi / LOG_REF.exp())).sum())

    return torch.softmax(toys.minimise(loss, LOG_REF.clone()), dim=-1)


@check(
    "V12-f-dpo-link",
    "If f'(0+) = −∞, the maximiser of E_π r − βD_f has r(y)−r(y') = β[f'(π/π_ref)(y) − "
    "f'(π/π_ref)(y')].",
    tolerance=1e-7,
)
def f_dpo_link(*, factor: float = 1.0) -> Measurement:
    """Climb the objective numerically for four divergences; read reward differences off
    the ratios.
    """
    beta, error = 0.8, 0.0
    for f, slope in DIVERGENCES.values():
        ratio = _f_optimum(f, beta) / LOG_REF.exp()
        read = factor * beta * slope(ratio)
        error = max(error, toys.deviation(read - read[0], REWARD - REWARD[0]))
    return Measurement(error)


def _lambert_w(x: Tensor) -> Tensor:
    """Principal branch of W(x) e^{W(x)} = x for x > 0, by Newton's method on w + log w = log x."""
    w = torch.log1p(x)
    for _ in range(60):
        w = w * (1 + x.log() - w.log()) / (1 + w)
    return w


@check(
    "V13-chi-po",
    "f'(z)=z+log z gives π = π_ref W₀(e^{(r−λ)/β}) with π/π_ref ≤ 1+osc(r)/β, where KL allows "
    "e^{osc/β}.",
    tolerance=1e-8,
)
def chi_po(*, factor: float = 1.0) -> Measurement:
    """Climb the objective with f = z²/2 + z log z - z; compare with Lambert's function, lambda by
    bisection.
    """
    beta = 0.2
    found = _f_optimum(lambda z: z**2 / 2 + z * z.log() - z, beta)

    def policy(level: float) -> Tensor:
        return LOG_REF.exp() * _lambert_w(torch.exp((factor * REWARD - level) / beta))

    claimed = policy(toys.root(lambda level: 1 - float(policy(level).sum()), -5.0, 5.0))
    oscillation = float(REWARD.max() - REWARD.min())
    largest = float((found / LOG_REF.exp()).max())
    kl_policy = exact.optimal_log_policy(REWARD, LOG_REF, beta=beta)
    error = toys.deviation(found, claimed)
    values = {
        "largest": largest,
        "bound": 1 + oscillation / beta,
        "kl_largest": float((kl_policy - LOG_REF).exp().max()),
        "kl_bound": math.exp(oscillation / beta),
    }
    return Measurement(error if largest <= values["bound"] else math.inf, values)


def _project_to_simplex(point: Tensor) -> Tensor:
    """Euclidean projection onto the probability simplex."""
    ordered = point.sort(descending=True).values
    excess = ordered.cumsum(0) - 1
    count = torch.arange(1, len(point) + 1, dtype=torch.float64)
    active = int((ordered - excess / count > 0).sum())
    return (point - excess[active - 1] / active).clamp_min(0)


@check(
    "V14-chi-square-zeros",
    "With f=(z−1)²/2 there is no barrier: π = π_ref max(0, 1+(r−λ)/β) has zeros and the link of "
    "V12 fails.",
    tolerance=1e-8,
)
def chi_square_zeros(*, factor: float = 1.0) -> Measurement:
    """Projected gradient ascent on the simplex against the formula, lambda by bisection."""
    beta, ref = 0.3, LOG_REF.exp()
    pi = ref.clone()
    for _ in range(4000):
        pi = _project_to_simplex(pi + 0.1 * (REWARD - beta * (pi / ref - 1)))

    def policy(level: float) -> Tensor:
        return ref * (1 + factor * (REWARD - level) / beta).clamp_min(0)

    claimed = policy(toys.root(lambda level: 1 - float(policy(level).sum()), -5.0, 5.0))
    link = beta * (pi / ref)
    broken = toys.deviation(link - link[0], REWARD - REWARD[0])
    error = toys.deviation(pi, claimed)
    zeros = float((pi == 0).sum())
    return Measurement(error if zeros >= 1 and broken > 0.1 else math.inf, {"zeros": zeros})


def _ranking_information(reward: Tensor, top_k: int) -> Tensor:
    """Fisher information of the first top_k places of a ranking: E of squared scores,
    enumerated.
    """
    rankings = toys.all_rankings(len(reward))

    def log_prob(r: Tensor) -> Tensor:
        return rewards.plackett_luce_log_prob(r[rankings], top_k=top_k)

    scores = toys.jacobian(log_prob, reward)
    law = rewards.plackett_luce_log_prob(reward[rankings]).exp()
    return torch.einsum("n,ni,nj->ij", law, scores, scores)


@check(
    "V15-list-information",
    "Fisher information of a ranking's first k places is Σ_stages E[diag(w)−wwᵀ], and grows with "
    "k.",
    tolerance=1e-10,
)
def list_information(*, factor: float = 1.0) -> Measurement:
    """Outer products of scores over all rankings against the sum over choice stages."""
    reward = REWARD
    rankings = toys.all_rankings(4)
    law = rewards.plackett_luce_log_prob(reward[rankings]).exp()
    total, error = torch.zeros(4, 4, dtype=torch.float64), 0.0
    traces: list[float] = []
    for stage in range(3):
        for ranking, probability in zip(rankings, law, strict=True):
            w = torch.zeros(4, dtype=torch.float64)
            w[ranking[stage:]] = torch.softmax(reward[ranking[stage:]], dim=-1)
            total = total + probability * (torch.diag(w) - torch.outer(w, w))
        found = _ranking_information(reward, stage + 1)
        error = max(error, toys.deviation(factor * total, found))
        traces.append(float(found.trace()))
        if stage > 0:
            growth = found - _ranking_information(reward, stage)
            error = max(error, -float(torch.linalg.eigvalsh(growth).min()))
    return Measurement(error, {f"trace{k + 1}": value for k, value in enumerate(traces)})


@check(
    "V16-pairs-of-a-ranking",
    "Treating all pairs of one ranking as independent: covariance H⁺GH⁺ ⪰ I⁺, while the naive H⁺ "
    "is too small.",
)
def pairs_of_a_ranking(*, factor: float = 1.0) -> Measurement:
    """Refit 3,000 simulated data sets of 400 rankings by all-pairs Bradley-Terry; compare
    covariances.
    """
    reward, n, repeats = toys.vector(0.6, 0.0, -0.6), 400, 3000
    rankings = toys.all_rankings(3)
    law = rewards.plackett_luce_log_prob(reward[rankings]).exp()
    place = rankings.argsort(dim=-1)
    before = (place.unsqueeze(2) < place.unsqueeze(1)).double()
    p = rewards.preference_table(reward)
    slopes = (before * (1 - p) - before.transpose(1, 2) * p).sum(-1)
    noise = torch.einsum("n,ni,nj->ij", law, slopes, slopes)
    curvature = torch.diag((p * (1 - p)).sum(-1) - 0.25) - p * (1 - p) + 0.25 * torch.eye(3)
    inverse = torch.linalg.pinv(curvature, rtol=1e-9)
    claimed = inverse @ noise @ inverse
    fisher = torch.linalg.pinv(_ranking_information(reward, 3), rtol=1e-9)
    drawn = torch.multinomial(
        law.expand(repeats, -1), n, replacement=True, generator=toys.generator(212)
    )
    wins = torch.zeros(repeats, 6, dtype=torch.float64)
    wins.scatter_add_(1, drawn, torch.ones(repeats, n, dtype=torch.float64))
    wins = torch.einsum("rn,nij->rij", wins, before)
    fitted = torch.zeros(repeats, 3, dtype=torch.float64)
    for _ in range(12):
        q = rewards.preference_table(fitted)
        slope = (wins - n * q * (1 - torch.eye(3))).sum(-1)
        information = n * (torch.diag_embed((q * (1 - q)).sum(-1)) - q * (1 - q))
        fitted = fitted + (torch.linalg.pinv(information, rtol=1e-9) @ slope.unsqueeze(-1)).squeeze(
            -1
        )
    deviations = math.sqrt(n) * (fitted - reward)
    outer = torch.einsum("ri,rj->rij", deviations, deviations)
    error = toys.z_score(outer, factor * claimed)
    smallest = float(torch.linalg.eigvalsh(claimed - fisher).min())
    naive = float(inverse.trace() / claimed.trace())
    values = {
        "naive": naive,
        "efficiency": float(fisher.trace() / claimed.trace()),
    }
    return Measurement(error if smallest > -1e-9 and naive < 1 else math.inf, values)


@check(
    "V17-sppo-minimiser",
    "Over policies SPPO's minimiser is the exact update up to −(η³/2) Var(P)(P−½) + const + O(η⁴).",
    tolerance=2e-2,
)
def sppo_minimiser(*, factor: float = 1.0) -> Measurement:
    """Minimise the population loss over policies; scale the distance to the exact update."""
    eta = 0.02
    win = rewards.preference_table(2 * REWARD) @ LOG_REF.exp()
    target = eta * (win - 0.5)

    def loss(z: Tensor) -> Tensor:
        h = torch.log_softmax(z, dim=-1) - LOG_REF
        return (LOG_REF.exp() * (h - target) ** 2).sum() / eta**2

    found = torch.log_softmax(toys.minimise(loss, LOG_REF + target), dim=-1)
    exact_update = torch.log_softmax(LOG_REF + eta * win, dim=-1)
    variance = exact.expectation((win - 0.5) ** 2, LOG_REF)
    claimed = -factor * variance / 2 * (win - 0.5)
    scaled = (found - exact_update) / eta**3
    gap = scaled - claimed
    error = toys.deviation(gap, gap.mean()) / float((win - 0.5).abs().max() * variance / 2)
    return Measurement(error)


@check(
    "V18-nca-sampling",
    "At π = 2 p(y≻π_ref) π_ref the slopes of NCA over sampled pairs average to zero.",
)
def nca_sampling(*, factor: float = 1.0) -> Measurement:
    """Draw pairs from the reference and labels of a preference without Bradley-Terry."""
    num_pairs, ref = 400_000, LOG_REF.exp()
    table = torch.sigmoid(toys.normal(211, 4, 4))
    preference = torch.triu(table, 1) + torch.tril(1 - table.T, -1)
    preference = preference + 0.5 * torch.eye(4, dtype=torch.float64)
    h = (2 * factor * (preference @ ref)).log()
    pairs = toys.draw(ref, 2 * num_pairs, 220).reshape(-1, 2)
    wins = toys.coin(preference[pairs[:, 0], pairs[:, 1]], 221) > 0
    chosen = torch.where(wins, pairs[:, 0], pairs[:, 1])
    rejected = torch.where(wins, pairs[:, 1], pairs[:, 0])
    eye = torch.eye(4, dtype=torch.float64)
    of_chosen = -torch.sigmoid(-h[chosen]) + 0.5 * torch.sigmoid(h[chosen])
    of_rejected = 0.5 * torch.sigmoid(h[rejected])
    slopes = of_chosen.unsqueeze(1) * eye[chosen] + of_rejected.unsqueeze(1) * eye[rejected]
    return Measurement(toys.z_score(slopes, 0.0))


@check(
    "V19-convex-losses-sampling",
    "At u*(p) the slopes of the logistic, square and exponential losses over sampled labels "
    "average to zero.",
)
def convex_losses_sampling(*, factor: float = 1.0) -> Measurement:
    """Labels of a pair won with probability 0.8; slopes s l'(s u), s = 1 if won and -1 if lost."""
    p, error = 0.8, 0.0
    logit = math.log(p / (1 - p))
    sign = 2 * toys.coin(torch.full((400_000,), p, dtype=torch.float64), 230) - 1
    slopes: list[tuple[toys.Function, float]] = [
        (lambda u: -torch.sigmoid(-u), logit),
        (lambda u: -2 * (1 - u), 2 * p - 1),
        (lambda u: -torch.exp(-u), 0.5 * logit),
    ]
    for slope, claimed in slopes:
        error = max(error, toys.z_score(sign * slope(sign * factor * claimed), 0.0))
    return Measurement(error)


def _sampled_slopes(value: Tensor, seed: int) -> float:
    """z-score of the mean slope of `sp(-(value_w - value_l))` over pairs drawn uniformly and
    labelled by Bradley-Terry with REWARD: zero where differences of value are those of the reward.
    """
    pairs = toys.draw(torch.ones(4, dtype=torch.float64), 800_000, seed).reshape(-1, 2)
    first, second = pairs[:, 0], pairs[:, 1]
    wins = toys.coin(torch.sigmoid(REWARD[first] - REWARD[second]), seed + 1)
    residual = torch.sigmoid(value[first] - value[second]) - wins
    eye = torch.eye(4, dtype=torch.float64)
    return toys.z_score(residual.unsqueeze(1) * (eye[first] - eye[second]), 0.0)


@check(
    "V20-length-margin-sampling",
    "At the tilt of r − α|y| the slopes of sp(−[βΔ+α(|w|−|l|)]) over sampled pairs average to "
    "zero.",
)
def length_margin_sampling(*, factor: float = 1.0) -> Measurement:
    """Bradley-Terry labels of r; the margin of the claimed policy plus its length term."""
    beta, alpha, lengths = 0.5, 0.3, toys.vector(1, 3, 4, 7)
    claimed = exact.optimal_log_policy(REWARD - factor * alpha * lengths, LOG_REF, beta=beta)
    return Measurement(_sampled_slopes(beta * (claimed - LOG_REF) + alpha * lengths, 222))


@check(
    "V21-simpo-sampling",
    "At π(y) = exp(|y|(r(y)/β − c)) the slopes of SimPO's loss over sampled pairs average to zero.",
)
def simpo_sampling(*, factor: float = 1.0) -> Measurement:
    """Bradley-Terry labels of r; mean log-probabilities of the claimed, normalised policy."""
    beta, lengths = 2.0, toys.vector(1, 2, 2, 5)

    def log_policy(c: float) -> Tensor:
        return lengths * (factor * REWARD / beta - c)

    c = toys.root(lambda c: 1 - float(log_policy(c).exp().sum()), -20.0, 20.0)
    return Measurement(_sampled_slopes(beta * log_policy(c) / lengths, 224))


@check(
    "V22-f-dpo-sampling",
    "At the maximiser of E_π r − βD_f the slopes of f-DPO's loss over sampled pairs average to "
    "zero.",
)
def f_dpo_sampling(*, factor: float = 1.0) -> Measurement:
    """Bradley-Terry labels of r; f'(pi/pi_ref) of the numerical maximiser, for four divergences."""
    beta, error = 0.8, 0.0
    for f, slope in DIVERGENCES.values():
        ratio = _f_optimum(f, beta) / LOG_REF.exp()
        error = max(error, _sampled_slopes(factor * beta * slope(ratio), 226))
    return Measurement(error)
