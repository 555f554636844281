"""Where each loss is least when the data are the whole population: found by optimisation over all
policies of an enumerable world, with the functions that training calls, and compared with theory.

The world has one prompt and five responses, a reference LOG_REF and a true reward REWARD. Labels
follow Bradley-Terry or Plackett-Luce with that reward, and a risk is the sum over every possible
observation of its probability times its loss. Where theory gives no minimiser, that is the test.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo.core import exact, listwise, losses, rewards, unpaired
from dpo.theory.toys import all_rankings, minimise, root, vector

LOG_REF = vector(0.3, 0.25, 0.2, 0.15, 0.1).log()
REWARD = vector(0.4, 1.2, -0.3, 0.9, -1.0)
PREFERENCE = rewards.preference_table(REWARD)  # P(i > j), with 1/2 on the diagonal
UNIFORM = torch.full((5, 5), 1 / 25, dtype=torch.float64)
FROM_REFERENCE = torch.outer(LOG_REF.exp(), LOG_REF.exp())
BETA = 0.6
PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def least_policy(risk: Callable[[Tensor], Tensor], start: Tensor = LOG_REF) -> Tensor:
    """Log-probabilities of the policy that minimises a risk."""
    found = minimise(lambda logits: risk(logits.log_softmax(-1)), start)
    return found.log_softmax(-1)


def pair_risk(
    loss: PairLoss, log_policy: Tensor, *, labels: Tensor = PREFERENCE, weights: Tensor = UNIFORM
) -> Tensor:
    """Expected loss of a pair drawn with `weights`, (Y, Y), and labelled with P(i > j)."""
    chosen, rejected = (labels * weights > 0).nonzero(as_tuple=True)
    values = loss(log_policy[chosen], log_policy[rejected], LOG_REF[chosen], LOG_REF[rejected])
    probability = (labels * weights)[chosen, rejected]
    return (probability * values).sum() / probability.sum()


def ranking_risk(
    loss: Callable[..., Tensor], log_policy: Tensor, orders: Tensor, ranks: Tensor, law: Tensor
) -> Tensor:
    """Expected loss of a ranked list: order n of the responses, tied by `ranks`, has law[n]."""
    mask = torch.ones_like(orders, dtype=torch.bool)
    values = loss(log_policy[orders], LOG_REF[orders], mask, ranks.expand_as(orders))
    return (law * values).sum()


def judged_risk(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], log_policy: Tensor, desirability: Tensor
) -> Tensor:
    """Expected loss of a response drawn from the reference, desirable with its `desirability`."""
    labels = torch.ones(5, dtype=torch.bool)
    good, bad = loss(log_policy, LOG_REF, labels), loss(log_policy, LOG_REF, ~labels)
    return (LOG_REF.exp() * (desirability * good + (1 - desirability) * bad)).sum()


def tilt(reward: Tensor = REWARD, beta: float = BETA) -> Tensor:
    return exact.optimal_log_policy(reward, LOG_REF, beta=beta)


def gaps(values: Tensor) -> Tensor:
    """Differences to the first entry: what is left of a reward without its constant."""
    return values - values[0]


def equal(found: Tensor, expected: Tensor, *, atol: float = 1e-8) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# --- the tilt of r*: DPO and what keeps its minimiser ---


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_dpo_finds_the_optimal_policy(beta: float) -> None:
    loss = partial(losses.dpo, beta=beta, label_smoothing=0.0)
    equal(least_policy(partial(pair_risk, loss)), tilt(beta=beta))


def test_dpo_finds_it_from_any_start_and_with_any_connected_pairs() -> None:
    loss = partial(losses.dpo, beta=BETA, label_smoothing=0.0)
    chain = torch.zeros(5, 5, dtype=torch.float64)
    for i in range(4):
        chain[i, i + 1] = chain[i + 1, i] = 0.1 + i
    for weights in (UNIFORM, FROM_REFERENCE, chain):
        start = vector(1.0, -2.0, 0.5, 2.0, 0.0)
        equal(least_policy(partial(pair_risk, loss, weights=weights), start), tilt())


@pytest.mark.parametrize("flips", [0.05, 0.3])
def test_robust_dpo_undoes_flipped_labels_where_dpo_learns_them(flips: float) -> None:
    flipped = (1 - flips) * PREFERENCE + flips * PREFERENCE.T
    robust = partial(losses.robust, beta=BETA, label_smoothing=flips)
    equal(least_policy(partial(pair_risk, robust, labels=flipped)), tilt())

    dpo = partial(losses.dpo, beta=BETA, label_smoothing=0.0)
    fooled = least_policy(partial(pair_risk, dpo, labels=flipped))
    assert exact.total_variation(fooled, tilt()) > 1e-2


def test_robust_dpo_has_no_minimum_when_every_pair_has_a_sure_winner() -> None:
    zero = vector(0.0)
    margins = [10.0**k for k in range(1, 5)]
    options = {"beta": 1.0, "label_smoothing": 0.2}
    found = [losses.robust(vector(u), zero, zero, zero, **options).item() for u in margins]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(-0.2 / 0.6 * 1e4, rel=1e-6)


@pytest.mark.parametrize("divergence", ["backward_kl", "forward_kl", "squared"])
def test_reward_aware_losses_find_the_tilt_of_the_scaled_scores(divergence: str) -> None:
    """Whatever the labels: the scores say all."""

    def loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        i, j = (PREFERENCE * UNIFORM > 0).nonzero(as_tuple=True)
        options: dict[str, Any] = {"beta": BETA, "reward_scale": 1.7, "divergence": divergence}
        tensors = chosen, rejected, ref_chosen, ref_rejected, REWARD[i], REWARD[j]
        return losses.rpo(*tensors, **options)

    equal(least_policy(partial(pair_risk, loss)), tilt(1.7 * REWARD))


def test_length_regularised_dpo_finds_the_tilt_of_the_reward_less_length() -> None:
    lengths = torch.tensor([3, 8, 1, 20, 5])

    def loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        i, j = (PREFERENCE * UNIFORM > 0).nonzero(as_tuple=True)
        tensors = chosen, rejected, ref_chosen, ref_rejected, lengths[i], lengths[j]
        return losses.r_dpo(*tensors, beta=BETA, alpha=0.1)

    equal(least_policy(partial(pair_risk, loss)), tilt(REWARD - 0.1 * lengths), atol=1e-7)


# --- other divergences from the reference ---

LINKS: dict[str, tuple[PairLoss, Callable[[Tensor], Tensor]]] = {
    "reverse_kl": (
        partial(losses.f_dpo, beta=BETA, divergence="reverse_kl", alpha=None),
        lambda ratio: ratio.log(),
    ),
    "forward_kl": (
        partial(losses.f_dpo, beta=BETA, divergence="forward_kl", alpha=None),
        lambda ratio: -1 / ratio,
    ),
    "js": (
        partial(losses.f_dpo, beta=BETA, divergence="js", alpha=None),
        lambda ratio: (2 * ratio / (1 + ratio)).log(),
    ),
    "alpha": (
        partial(losses.f_dpo, beta=BETA, divergence="alpha", alpha=0.4),
        lambda ratio: -(ratio**-0.4) / 0.4,
    ),
    "chi_po": (
        partial(losses.chi_po, beta=BETA, max_reward=math.inf),
        lambda ratio: ratio + ratio.log(),
    ),
}


@pytest.mark.parametrize("name", LINKS)
def test_f_dpo_minimiser_solves_the_optimality_condition(name: str) -> None:
    """`beta f'(pi/pi_ref) = r* - const`, which for a normalised policy has one solution."""
    loss, slope = LINKS[name]
    found = least_policy(partial(pair_risk, loss))
    equal(gaps(BETA * slope((found - LOG_REF).exp())), gaps(REWARD))


@pytest.mark.parametrize(
    ("name", "generator"),
    [
        ("reverse_kl", lambda z: z * z.log()),
        ("forward_kl", lambda z: -z.log()),
        ("js", lambda z: z * z.log() - (z + 1) * ((z + 1) / 2).log()),
        ("alpha", lambda z: (z**0.6 - 0.6 * z - 0.4) / (0.4 * -0.6)),
        ("chi_po", lambda z: z**2 / 2 + z * z.log()),
    ],
)
def test_f_dpo_minimiser_maximises_reward_less_divergence(
    name: str, generator: Callable[[Tensor], Tensor]
) -> None:
    """The same policy, from the problem that f-DPO is derived from."""
    loss, _ = LINKS[name]

    def cost(log_policy: Tensor) -> Tensor:
        divergence = (LOG_REF.exp() * generator((log_policy - LOG_REF).exp())).sum()
        return BETA * divergence - log_policy.exp() @ REWARD

    equal(least_policy(partial(pair_risk, loss)), least_policy(cost), atol=1e-7)


# --- sure winners: bounded and unbounded margins ---


def margin_of_a_sure_winner(loss: PairLoss) -> float:
    """Log-ratio margin between responses 0 and 1 if 0 always wins, and there are no others."""
    labels = torch.zeros(5, 5, dtype=torch.float64)
    labels[0, 1] = 1.0

    def risk(margin: Tensor) -> Tensor:
        log_policy = LOG_REF + torch.cat([margin, torch.zeros(4, dtype=torch.float64)])
        return pair_risk(loss, log_policy, labels=labels)

    return minimise(risk, vector(0.5)).item()


@pytest.mark.parametrize("eps", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("loss", [losses.dpo, losses.exo])
def test_smoothed_labels_stop_the_margin_at_their_logit(
    loss: Callable[..., Tensor], eps: float
) -> None:
    found = margin_of_a_sure_winner(partial(loss, beta=BETA, label_smoothing=eps))
    assert BETA * found == pytest.approx(math.log((1 - eps) / eps), abs=1e-8)


@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_conservative_dpo_on_honest_labels_learns_a_flatter_reward(eps: float) -> None:
    """Two responses of the world: the margin is the logit of the smoothed preference."""
    loss = partial(losses.dpo, beta=BETA, label_smoothing=eps)
    weights = torch.zeros(5, 5, dtype=torch.float64)
    weights[1, 2] = weights[2, 1] = 1.0
    found = least_policy(partial(pair_risk, loss, weights=weights)) - LOG_REF
    smoothed = (1 - eps) * PREFERENCE[1, 2] + eps * PREFERENCE[2, 1]
    assert BETA * (found[1] - found[2]).item() == pytest.approx(smoothed.logit().item(), abs=1e-8)


@pytest.mark.parametrize("tau", [0.1, 2.0])
def test_ipo_stops_at_half_over_tau(tau: float) -> None:
    found = margin_of_a_sure_winner(partial(losses.ipo, beta=tau))
    assert found == pytest.approx(1 / (2 * tau), abs=1e-8)


def test_ipo_regresses_on_winning_probabilities() -> None:
    """`h_i - h_j = (P(i > mu) - P(j > mu)) / tau` for responses drawn from mu, here uniform."""
    found = least_policy(partial(pair_risk, partial(losses.ipo, beta=0.8)))
    equal(gaps(found - LOG_REF), gaps(PREFERENCE.mean(dim=1)) / 0.8)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_with_a_sure_winner_has_an_infimum_of_zero_and_no_minimum(beta: float) -> None:
    """Descent on the logits of a policy never stops: whatever beta, the margin passes every bound
    and the loser's probability vanishes, while the loss falls and stays positive.
    """
    labels = torch.zeros(5, 5, dtype=torch.float64)
    labels[0, 1] = 1.0
    loss = partial(losses.dpo, beta=beta, label_smoothing=0.0)
    logits = LOG_REF.clone()
    margins, values = [], []
    for _ in range(300):
        leaf = logits.clone().requires_grad_()
        risk = pair_risk(loss, leaf.log_softmax(-1), labels=labels)
        (slope,) = torch.autograd.grad(risk, leaf)
        h = logits.log_softmax(-1) - LOG_REF
        margins.append((h[0] - h[1]).item())
        values.append(risk.item())
        logits = logits - slope / slope.abs().max()  # steps of length 1: the slope itself fades
    assert margins == pytest.approx([2.0 * step for step in range(300)], abs=1e-6)
    assert all(late < early for early, late in itertools.pairwise(values))
    assert 0 < values[-1] < 2 * math.exp(-beta * margins[-1])
    assert logits.log_softmax(-1)[1] < -500


# --- lists ---

ORDERS = all_rankings(5)
LAW = rewards.plackett_luce_log_prob(REWARD[ORDERS]).exp()
IN_ORDER = torch.arange(5)


@pytest.mark.parametrize("top", [None, 1, 2, 4])
def test_plackett_luce_recovers_the_reward_up_to_a_constant(top: int | None) -> None:
    loss = partial(listwise.plackett_luce, beta=BETA, top=top)
    found = least_policy(
        lambda policy: ranking_risk(loss, policy, ORDERS, IN_ORDER, LAW), vector(2, 0, 1, -1, 0)
    )
    equal(found, tilt())
    equal(gaps(BETA * (found - LOG_REF)), gaps(REWARD))
    equal(found, tilt(REWARD + 7.0))


@pytest.mark.parametrize("ranks", [(0, 0, 1, 2, 3), (0, 1, 1, 1, 2), (0, 0, 1, 1, 1)])
def test_plackett_luce_recovers_it_from_rankings_whose_ties_were_not_resolved(
    ranks: tuple[int, ...],
) -> None:
    """The likelihood of ties is that of the model, so hiding orders loses no consistency."""
    loss = partial(listwise.plackett_luce, beta=BETA, top=None)
    tied = torch.tensor(ranks)
    found = least_policy(lambda policy: ranking_risk(loss, policy, ORDERS, tied, LAW))
    equal(found, tilt())


def test_all_pairs_of_plackett_luce_rankings_recover_it_too() -> None:
    loss = partial(listwise.all_pairs, beta=BETA)
    found = least_policy(lambda policy: ranking_risk(loss, policy, ORDERS, IN_ORDER, LAW))
    equal(found, tilt())


def test_pairs_broken_out_of_unresolved_ties_do_not() -> None:
    """Skipping tied pairs selects pairs by their outcome; only the likelihood is consistent."""
    loss = partial(listwise.all_pairs, beta=BETA)
    tied = torch.tensor([0, 0, 0, 1, 1])
    found = least_policy(lambda policy: ranking_risk(loss, policy, ORDERS, tied, LAW))
    assert exact.total_variation(found, tilt()) > 1e-2


def test_lipo_lambda_recovers_it_from_lists_of_two() -> None:
    """Its weight is one constant there; for longer lists theory gives no minimiser."""
    orders = torch.tensor(list(itertools.permutations(range(5), 2)))
    law = PREFERENCE[orders[:, 0], orders[:, 1]]

    def loss(policy: Tensor, reference: Tensor, mask: Tensor, ranks: Tensor) -> Tensor:
        scores = 1 - ranks.double()
        return listwise.lipo_lambda(policy, reference, mask, scores, beta=BETA)

    found = least_policy(lambda policy: ranking_risk(loss, policy, orders, torch.arange(2), law))
    equal(found, tilt())


# --- absolute targets: each response by itself ---


def test_nca_on_pairs_finds_the_policy_of_the_winners() -> None:
    """`pi = 2 P(y > pi_ref) pi_ref` for beta = 1 and pairs from the reference."""
    loss = partial(losses.nca_pair, beta=1.0)
    found = least_policy(partial(pair_risk, loss, weights=FROM_REFERENCE))
    equal(found.exp(), 2 * (PREFERENCE @ LOG_REF.exp()) * LOG_REF.exp())


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_nca_finds_the_reward_tilt_where_desirability_is_exponential_in_it(scale: float) -> None:
    """`pi = pi_ref P(desirable|y) / P(desirable)`: the target is absolute, not a difference."""
    desirability = scale * (REWARD - REWARD.max()).exp()
    share = exact.expectation(desirability, LOG_REF).item()
    loss = partial(unpaired.nca_unpaired, beta=1.0, desirable_fraction=share)
    equal(least_policy(lambda policy: judged_risk(loss, policy, desirability)), tilt(beta=1.0))

    # Without the constraint of normalisation: the log-ratios are what they are by themselves.
    free = minimise(lambda policy: judged_risk(loss, policy, desirability), LOG_REF)
    equal(free, tilt(beta=1.0))


def test_nca_with_a_wrong_share_misses_it() -> None:
    desirability = 0.2 * (REWARD - REWARD.max()).exp()
    loss = partial(unpaired.nca_unpaired, beta=1.0, desirable_fraction=0.5)
    found = least_policy(lambda policy: judged_risk(loss, policy, desirability))
    assert exact.total_variation(found, tilt(beta=1.0)) > 1e-2


SPPO_TARGET = (PREFERENCE @ LOG_REF.exp() - 0.5) / BETA


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_sppo_regresses_log_ratios_on_winning_probabilities(labels: str) -> None:
    """`h = (P(y > pi_ref) - 1/2) / beta` if log-probabilities were free; over policies, the excess
    `h - h*` is in proportion to pi / pi_ref (the multiplier of normalisation).
    """

    def loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        four = chosen, rejected, ref_chosen, ref_rejected
        if labels == "hard":
            return losses.sppo(*four, beta=BETA)
        i, j = (PREFERENCE > 0).nonzero(as_tuple=True)
        wins = PREFERENCE @ LOG_REF.exp()
        return losses.sppo_soft(*four, wins[i], wins[j], beta=BETA)

    risk = partial(pair_risk, loss, weights=FROM_REFERENCE)
    equal(minimise(risk, LOG_REF) - LOG_REF, SPPO_TARGET)
    h = least_policy(risk) - LOG_REF
    excess = (h - SPPO_TARGET) / h.exp()
    equal(excess, excess.mean().expand(5), atol=1e-7)


def bco_policy(shift: float, desirability: Tensor) -> Tensor:
    delta = torch.tensor(shift, dtype=torch.float64)

    def loss(policy: Tensor, reference: Tensor, desirable: Tensor) -> Tensor:
        return unpaired.bco(policy, reference, desirable, delta, beta=BETA)

    return least_policy(lambda policy: judged_risk(loss, policy, desirability))


def test_bco_finds_the_tilt_at_the_one_shift_that_normalises_it() -> None:
    """With `P(desirable|y) = sigmoid(r* - c)` the classifier's logit is `r* - c`, and
    `beta h - delta` can equal it for a policy only if `delta = c - beta log Z`.
    """
    threshold = 0.3
    desirability = torch.sigmoid(REWARD - threshold)
    shift = threshold - BETA * exact.log_partition(REWARD, LOG_REF, beta=BETA).item()
    equal(bco_policy(shift, desirability), tilt())
    for other in (shift - 1.0, shift + 1.0):
        assert exact.total_variation(bco_policy(other, desirability), tilt()) > 1e-2


def test_bco_at_the_right_shift_meets_the_closed_form_by_root_finding() -> None:
    """The same shift without log Z: where the unconstrained minimiser sums to one."""
    desirability = torch.sigmoid(REWARD - 0.3)

    def total(shift: float) -> float:
        return (LOG_REF + (desirability.logit() + shift) / BETA).exp().sum().item()

    shift = root(lambda delta: total(delta) - 1, -5.0, 5.0)
    equal(bco_policy(shift, desirability), tilt())


@pytest.mark.parametrize(("gain", "aversion"), [(1.0, 1.0), (1.0, 1.5), (2.0, 0.7)])
def test_kto_has_no_minimum_and_decides_by_a_threshold(gain: float, aversion: float) -> None:
    """At a fixed reference point the risk falls for ever in the direction that desirability says:
    up if P(desirable|y) > lambda_U / (lambda_D + lambda_U), down if it is smaller.
    """
    desirability = vector(0.2, 0.45, 0.55, 0.65, 0.9)
    kl = torch.tensor(0.3, dtype=torch.float64)
    weights = {"desirable_weight": gain, "undesirable_weight": aversion}
    labels = torch.ones(5, dtype=torch.bool)
    direction = torch.where(desirability > aversion / (gain + aversion), 1.0, -1.0)
    values = []
    for distance in range(0, 120, 10):
        policy = (LOG_REF + distance * direction).requires_grad_()
        good = unpaired.kto(policy, LOG_REF, labels, kl, beta=0.25, **weights)
        bad = unpaired.kto(policy, LOG_REF, ~labels, kl, beta=0.25, **weights)
        risk = desirability * good + (1 - desirability) * bad
        (slope,) = torch.autograd.grad(risk.sum(), policy)
        assert (slope.sign() == -direction).all()
        values.append(risk.detach())
    drops = torch.stack(values).diff(dim=0)
    assert (drops < 0).all()
    limit = torch.where(direction > 0, aversion * (1 - desirability), gain * desirability)
    assert (values[-1] > limit).all()
    equal(values[-1], limit, atol=1e-10)
