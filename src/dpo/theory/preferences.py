"""Chapter 1: from preferences to rewards (Plackett, Luce, Bradley-Terry, Gumbel, comparison
graphs).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dpo.core import rewards
from dpo.theory import toys
from dpo.theory.registry import Measurement, check

REWARD = toys.vector(1.0, 0.2, -0.4, -1.3)
"""The utilities of four responses, used throughout the chapter."""


def _law(reward: Tensor, rankings: Tensor) -> Tensor:
    """Plackett-Luce probabilities of the listed rankings."""
    return rewards.plackett_luce_log_prob(reward[rankings]).exp()


def _position(rankings: Tensor) -> Tensor:
    """Position of every item in every ranking, (rankings, items)."""
    return rankings.argsort(dim=-1)


@check(
    "P01-pl-normalised",
    "The Plackett-Luce probabilities of all K! rankings sum to 1.",
    tolerance=1e-13,
)
def pl_normalised(*, factor: float = 1.0) -> Measurement:
    """Sum of `prod_k v_k / sum_{j>=k} v_j` over all rankings of 6 items, by enumeration."""
    total = _law(toys.normal(1, 6), toys.all_rankings(6)).sum()
    return Measurement(abs(float(total) - factor))


@check(
    "P02-pl-urn",
    "Drawing without replacement with weights v_i ranks with probability ∏_k v_k/Σ_{j≥k} v_j.",
)
def pl_urn(*, factor: float = 1.0) -> Measurement:
    """Simulate the urn stage by stage and compare the frequencies of all 24 rankings."""
    rankings, num_samples = toys.all_rankings(4), 200_000
    source = toys.generator(2)
    weights = REWARD.exp().expand(num_samples, 4).clone()
    code = torch.zeros(num_samples, dtype=torch.long)
    for _ in range(4):
        uniform = torch.rand(num_samples, 1, generator=source, dtype=torch.float64)
        drawn = (weights.cumsum(-1) < uniform * weights.sum(-1, keepdim=True)).sum(-1)
        weights[torch.arange(num_samples), drawn] = 0.0
        code = code * 4 + drawn
    place = (rankings * torch.tensor([64, 16, 4, 1])).sum(-1)
    counts = torch.bincount(code, minlength=256)[place].double()
    probs = rewards.plackett_luce_log_prob(factor * REWARD[rankings]).exp()
    v = REWARD.exp()
    return Measurement(
        toys.frequency_z(counts, probs),
        {
            **{f"r{i}": float(REWARD[i]) for i in range(4)},
            **{f"v{i}": float(v[i]) for i in range(4)},
            "stage1": float(v[0] / v.sum()),
            "stage2": float(v[1] / v[1:].sum()),
            "stage3": float(v[2] / v[2:].sum()),
            "probability": float(_law(REWARD, torch.arange(4))),
            "simulated": float(counts[0] / num_samples),
            "reverse": float(_law(REWARD, torch.arange(3, -1, -1))),
        },
    )


@check(
    "P03-bt-is-k2",
    "For K = 2 the Plackett-Luce law is Bradley-Terry: P(y≻y') = v/(v+v') = σ(r−r').",
    tolerance=1e-14,
)
def bt_is_k2(*, factor: float = 1.0) -> Measurement:
    """Compare `sigmoid(r - r')` with the ratio of weights `v / (v + v')`."""
    first, second = toys.normal(3, 50), toys.normal(4, 50)
    ratio = first.exp() / (first.exp() + second.exp())
    claimed = rewards.plackett_luce_log_prob(factor * torch.stack([first, second], dim=-1)).exp()
    logistic = rewards.bradley_terry_log_prob(factor * first, factor * second).exp()
    return Measurement(max(toys.deviation(claimed, ratio), toys.deviation(logistic, ratio)))


@check(
    "P04-pl-marginals",
    "Under Plackett-Luce P(i before j) = σ(r_i−r_j), and the top k has the law of the first k "
    "factors.",
    tolerance=1e-13,
)
def pl_marginals(*, factor: float = 1.0) -> Measurement:
    """Sum the ranking law over all rankings with i before j, and over all with a given top 2."""
    rankings = toys.all_rankings(5)
    reward = toys.normal(5, 5)
    law, place = _law(reward, rankings), _position(rankings)
    before = (place.unsqueeze(2) < place.unsqueeze(1)).double()
    pairs = torch.einsum("n,nij->ij", law, before).fill_diagonal_(0.5)
    error = toys.deviation(rewards.preference_table(factor * reward), pairs)
    for first, second in itertools.permutations(range(5), 2):
        chosen = (rankings[:, 0] == first) & (rankings[:, 1] == second)
        others = [item for item in range(5) if item not in (first, second)]
        ordered = reward[torch.tensor([first, second, *others])]
        top = rewards.plackett_luce_log_prob(ordered, top_k=2).exp()
        error = max(error, abs(float(law[chosen].sum() - top)))
    return Measurement(error)


@check(
    "P05-luce-axiom",
    "The best of a subset S has probability v_i/Σ_{j∈S} v_j: odds do not depend on the "
    "alternatives.",
    tolerance=1e-13,
)
def luce_axiom(*, factor: float = 1.0) -> Measurement:
    """Sum the ranking law over all rankings in which i is the first member of S, for every S."""
    rankings = toys.all_rankings(5)
    reward = toys.normal(6, 5)
    law, place = _law(reward, rankings), _position(rankings)
    error = 0.0
    for size in range(2, 6):
        for subset in itertools.combinations(range(5), size):
            members = torch.tensor(subset)
            best = place[:, members].argmin(dim=-1)
            found = torch.zeros(size, dtype=torch.float64).index_add_(0, best, law)
            claimed = torch.softmax(factor * reward[members], dim=-1)
            error = max(error, toys.deviation(claimed, found))
    return Measurement(error)


@check(
    "P06-gumbel-choice",
    "If G_i are independent standard Gumbel, P(argmax_j r_j+G_j = i) = softmax(r)_i.",
    tolerance=1e-12,
)
def gumbel_choice(*, factor: float = 1.0) -> Measurement:
    """Integrate density times the other distribution functions by the trapezoidal rule."""
    grid = torch.linspace(-8.0, 60.0, 20_001, dtype=torch.float64)
    centred = grid.unsqueeze(1) - REWARD
    cdf = torch.exp(-torch.exp(-centred))
    density = torch.exp(-centred - torch.exp(-centred))
    for item in range(4):
        others = [j for j in range(4) if j != item]
        density[:, item] = density[:, item] * cdf[:, others].prod(dim=-1)
    probs = torch.trapezoid(density, grid, dim=0)
    return Measurement(toys.deviation(torch.softmax(factor * REWARD, dim=-1), probs))


@check(
    "P07-gumbel-ranking",
    "Sorting r_i + Gumbel noise gives the Plackett-Luce law over complete rankings.",
)
def gumbel_ranking(*, factor: float = 1.0) -> Measurement:
    """Frequencies of all 24 orders of noisy utilities against the formula."""
    rankings = toys.all_rankings(4)
    drawn = rewards.sample_rankings(REWARD, 200_000, generator=toys.generator(7))
    base = torch.tensor([64, 16, 4, 1])
    counts = torch.bincount((drawn * base).sum(-1), minlength=256)[(rankings * base).sum(-1)]
    return Measurement(toys.frequency_z(counts.double(), _law(factor * REWARD, rankings)))


def _num_components(num_items: int, edges: list[tuple[int, int]]) -> int:
    """Number of connected components by merging labels."""
    label = list(range(num_items))
    for first, second in edges:
        old, new = label[first], label[second]
        label = [new if entry == old else entry for entry in label]
    return len(set(label))


@check(
    "P08-identifiability",
    "Pairs identify rewards up to one constant per component of the comparison graph.",
    tolerance=0.5,
)
def identifiability(*, factor: float = 1.0) -> Measurement:
    """Nullity of the pairwise likelihood's Hessian against graph components, for 60 random graphs.

    Also: the law of complete rankings loses exactly one dimension, the constant.
    """
    mismatches = 0
    source = toys.generator(8)
    pairs = list(itertools.combinations(range(6), 2))
    reward = toys.normal(9, 6)
    for _ in range(60):
        keep = torch.rand(len(pairs), generator=source) < 0.25
        edges = [pair for pair, kept in zip(pairs, keep.tolist(), strict=True) if kept]
        information = torch.zeros(6, 6, dtype=torch.float64)
        for i, j in edges:
            direction = torch.zeros(6, dtype=torch.float64)
            direction[i], direction[j] = 1.0, -1.0
            p = torch.sigmoid(reward[i] - reward[j])
            information += p * (1 - p) * torch.outer(direction, direction)
        nullity = 6 - int(torch.linalg.matrix_rank(information, hermitian=True, rtol=1e-9))
        mismatches += nullity != factor * _num_components(6, edges)
    rankings = toys.all_rankings(4)
    rank = torch.linalg.matrix_rank(toys.jacobian(lambda r: _law(r, rankings), REWARD), rtol=1e-9)
    mismatches += int(rank) != 3
    return Measurement(float(mismatches))


def _strongly_connected(wins: Tensor) -> bool:
    """Whether every item reaches every other along wins, within each weakly connected component."""
    size = wins.shape[0]
    eye = torch.eye(size)
    reach = torch.linalg.matrix_power(wins + eye, size) > 0
    joined = torch.linalg.matrix_power(wins + wins.T + eye, size) > 0
    return bool((reach == joined).all())


@check(
    "P09-ford",
    "A finite Bradley-Terry MLE exists iff the win graph is strongly connected in each component.",
    tolerance=0.5,
)
def ford(*, factor: float = 1.0) -> Measurement:
    """Run Newton's method on the likelihood of all 64 win graphs on 3 items; see if it settles.

    Towards a finite minimiser the iterates converge (here below 1 in size); without one they walk
    off by about 1 a step, so after 8 steps a threshold of 3 separates the cases.
    """
    arcs = list(itertools.permutations(range(3), 2))
    mismatches = 0
    finite_count = 0
    for present in itertools.product([0.0, 1.0], repeat=6):
        wins = torch.zeros(3, 3)
        for (i, j), value in zip(arcs, present, strict=True):
            wins[i, j] = value
        counts = wins.double()

        def loss(r: Tensor, counts: Tensor = counts) -> Tensor:
            return (counts * softplus(r.unsqueeze(0) - r.unsqueeze(1))).sum()

        reward = torch.zeros(3, dtype=torch.float64)
        for _ in range(8):
            leaf = reward.clone().requires_grad_()
            slope = torch.autograd.grad(loss(leaf), leaf)[0]
            reward = reward - torch.linalg.pinv(toys.hessian(loss, reward), rtol=1e-12) @ slope
        finite = float(reward.abs().max()) < 3.0
        finite_count += finite
        mismatches += finite != factor * _strongly_connected(wins)
    return Measurement(float(mismatches), {"finite": finite_count, "graphs": 64})


@check(
    "P10-mm",
    "Hunter's MM iteration converges to the Plackett-Luce maximum-likelihood estimate.",
    tolerance=1e-8,
)
def mm_algorithm(*, factor: float = 1.0) -> Measurement:
    """Fit 200 simulated rankings by MM and by Newton; compare the estimates up to a constant."""
    drawn = rewards.sample_rankings(REWARD, 200, generator=toys.generator(10))

    def loss(r: Tensor) -> Tensor:
        return -rewards.plackett_luce_log_prob(r[drawn]).mean()

    newton = toys.minimise(loss, torch.zeros(4, dtype=torch.float64))
    weights = torch.ones(4, dtype=torch.float64)
    won = torch.ones(4, dtype=torch.float64) * drawn.shape[0]
    won -= torch.bincount(drawn[:, -1], minlength=4)
    for _ in range(300):
        ordered = weights[drawn]
        inverse = 1.0 / ordered.flip(-1).cumsum(-1).flip(-1)[:, :-1]
        load = inverse.cumsum(-1)
        load = torch.cat([load, load[:, -1:]], dim=-1)
        weights = won / torch.zeros(4, dtype=torch.float64).index_add_(
            0, drawn.flatten(), load.flatten()
        )
    estimate = factor * weights.log()
    error = toys.deviation(estimate - estimate.mean(), newton - newton.mean())
    centred = newton - newton.mean() + REWARD.mean()
    return Measurement(error, {f"r{i}": float(centred[i]) for i in range(4)})


def _choices(members: list[int], log_cdf: toys.Function, log_density: toys.Function) -> Tensor:
    """Probabilities that each of some items of REWARD is chosen among them, when utilities carry
    independent noise of a distribution; by the trapezoidal rule.
    """
    grid = torch.linspace(-12.0, 60.0, 40_001, dtype=torch.float64)
    centred = grid.unsqueeze(1) - REWARD[members]
    cdf, density = log_cdf(centred), log_density(centred)
    values = (density + cdf.sum(dim=-1, keepdim=True) - cdf).exp()
    return torch.trapezoid(values, grid, dim=0)


@check(
    "P11-other-noise",
    "With Gumbel noise the odds of two responses stay e^{r_i−r_j} when others are added; with "
    "normal noise they are not those of Φ((r_i−r_j)/√2) any more.",
    tolerance=1e-9,
)
def other_noise(*, factor: float = 1.0) -> Measurement:
    """Choice probabilities by quadrature for Gumbel and for standard normal noise, which sum to
    one, against the odds of pairs in closed form.
    """
    gap, error = factor * float(REWARD[0] - REWARD[1]), 0.0
    normal_pair = 0.5 * math.erfc(-gap / 2)
    noises: list[tuple[toys.Function, toys.Function, float]] = [
        (lambda x: -torch.exp(-x), lambda x: -x - torch.exp(-x), math.exp(gap)),
        (
            torch.special.log_ndtr,
            lambda x: -0.5 * x**2 - 0.5 * math.log(2 * math.pi),
            normal_pair / (1 - normal_pair),
        ),
    ]
    odds: list[tuple[float, float]] = []
    for log_cdf, log_density, claimed in noises:
        pair = _choices([0, 1], log_cdf, log_density)
        among = _choices([0, 1, 2, 3], log_cdf, log_density)
        odds.append((float(pair[0] / pair[1]), float(among[0] / among[1])))
        error = max(error, abs(odds[-1][0] - claimed))
        error = max(error, *(abs(float(found.sum()) - 1) for found in (pair, among)))
    error = max(error, abs(odds[0][1] - math.exp(gap)))
    values = {"normal_alone": odds[1][0], "normal_among": odds[1][1]}
    return Measurement(error if abs(odds[1][1] - odds[1][0]) > 0.1 else math.inf, values)
