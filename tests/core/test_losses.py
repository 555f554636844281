"""The DPO loss: values by hand, identities, gradients, extremes, and where its minimum is; then
what is particular to each of its relatives.
"""

import doctest
import importlib
import math
import pkgutil
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dpo
from dpo.core import losses, reference_free, unpaired
from dpo.errors import InputError
from dpo.theory import variants

LOGPS = st.floats(-500, 0)
BETAS = st.floats(0.01, 5)


def vec(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_of_margin(margin: float, *, beta: float = 1.0, label_smoothing: float = 0.0) -> float:
    """The loss of a pair whose log-ratios differ by `margin`."""
    zero = vec(0.0)
    found = losses.dpo(vec(margin), zero, zero, zero, beta=beta, label_smoothing=label_smoothing)
    return found.item()


@pytest.mark.parametrize("beta", [1e-3, 0.1, 0.5, 10.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.49])
def test_policy_equal_to_reference_costs_log_two_whatever_beta(
    beta: float, label_smoothing: float
) -> None:
    chosen, rejected = vec(-3.0, -250.0), vec(-70.0, -0.5)
    found = losses.dpo(
        chosen, rejected, chosen, rejected, beta=beta, label_smoothing=label_smoothing
    )
    torch.testing.assert_close(found, vec(math.log(2), math.log(2)), rtol=0, atol=1e-15)


def test_loss_by_hand() -> None:
    # chosen: log-ratio ln 4; rejected: log-ratio ln 2; so u = beta ln 2 and sigmoid(u) = 2/3, 4/5.
    chosen, rejected = vec(math.log(0.4)), vec(math.log(0.6))
    reference_chosen, reference_rejected = vec(math.log(0.1)), vec(math.log(0.3))
    arguments = (chosen, rejected, reference_chosen, reference_rejected)
    assert losses.dpo(*arguments, beta=1.0).item() == pytest.approx(math.log(3 / 2), abs=1e-14)
    assert losses.dpo(*arguments, beta=2.0).item() == pytest.approx(math.log(5 / 4), abs=1e-14)


def test_smoothed_loss_by_hand() -> None:
    # u = ln 3: sigmoid(u) = 3/4, sigmoid(-u) = 1/4.
    expected = 0.8 * math.log(4 / 3) + 0.2 * math.log(4)
    found = loss_of_margin(math.log(3), label_smoothing=0.2)
    assert found == pytest.approx(expected, abs=1e-14)


def test_loss_keeps_one_value_a_pair() -> None:
    zero = vec(0.0, 0.0, 0.0)
    found = losses.dpo(vec(0.0, 1.0, -1.0), zero, zero, zero, beta=1.0)
    expected = [math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(1))]
    torch.testing.assert_close(found, vec(*expected))


def test_each_argument_has_its_own_role() -> None:
    """Raising a log-probability lowers the loss for chosen and reference-rejected, and raises it
    for the others: no two arguments can be mistaken for each other."""
    base = [vec(-10.0), vec(-11.0), vec(-12.0), vec(-13.5)]
    at_base = losses.dpo(*base, beta=0.5).item()
    for position, sign in enumerate([-1, 1, 1, -1]):
        moved = list(base)
        moved[position] = moved[position] + 1.0
        change = losses.dpo(*moved, beta=0.5).item() - at_base
        assert math.copysign(1, change) == sign, position
    raised_together = losses.dpo(base[0] + 1, base[1] + 1, *base[2:], beta=0.5).item()
    assert raised_together == pytest.approx(at_base, abs=1e-14)


@given(LOGPS, LOGPS, LOGPS, LOGPS, BETAS)
def test_beta_scales_the_log_ratios(w: float, l: float, rw: float, rl: float, beta: float) -> None:  # noqa: E741
    scaled = losses.dpo(vec(w * beta), vec(l * beta), vec(rw * beta), vec(rl * beta), beta=1.0)
    found = losses.dpo(vec(w), vec(l), vec(rw), vec(rl), beta=beta)
    torch.testing.assert_close(found, scaled, rtol=1e-9, atol=1e-9)


@given(LOGPS, LOGPS, LOGPS, LOGPS, BETAS)
def test_swapping_the_pair_costs_the_margin(
    w: float,
    l: float,  # noqa: E741
    rw: float,
    rl: float,
    beta: float,
) -> None:
    """-log sigmoid(-u) = -log sigmoid(u) + u."""
    straight = losses.dpo(vec(w), vec(l), vec(rw), vec(rl), beta=beta).item()
    swapped = losses.dpo(vec(l), vec(w), vec(rl), vec(rw), beta=beta).item()
    margin = beta * ((w - rw) - (l - rl))
    assert swapped - straight == pytest.approx(margin, rel=1e-9, abs=1e-9)


@given(st.floats(-50, 50), st.floats(0, 0.499))
def test_label_smoothing_mixes_the_pair_with_its_swap(margin: float, eps: float) -> None:
    mixed = (1 - eps) * loss_of_margin(margin) + eps * loss_of_margin(-margin)
    found = loss_of_margin(margin, label_smoothing=eps)
    assert found == pytest.approx(mixed, rel=1e-12, abs=1e-12)
    # and (1 - eps) L(u) + eps (L(u) + u) = L(u) + eps u
    assert found == pytest.approx(loss_of_margin(margin) + eps * margin, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("margin", [-20.0, -1.0, 0.0, 0.3, 15.0])
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_gradient_is_minus_beta_sigmoid_of_the_negated_margin(
    beta: float, margin: float, eps: float
) -> None:
    """dL/d log pi(chosen) = -beta ((1 - eps) sigmoid(-u) - eps sigmoid(u)), and the opposite for
    the rejected response, by autograd and by central differences."""
    point = [vec(margin), vec(0.0), vec(0.0), vec(0.0)]
    sigmoid = 1 / (1 + math.exp(beta * margin))
    expected = -beta * ((1 - eps) * sigmoid - eps * (1 - sigmoid))
    for position, sign in [(0, 1), (1, -1)]:
        leaf = point[position].clone().requires_grad_()
        arguments = [leaf if i == position else value for i, value in enumerate(point)]
        losses.dpo(*arguments, beta=beta, label_smoothing=eps).sum().backward()
        assert leaf.grad.item() == pytest.approx(sign * expected, rel=1e-10, abs=1e-15)

        def at(step: float, position: int = position) -> float:
            moved = [value + step * (i == position) for i, value in enumerate(point)]
            return losses.dpo(*moved, beta=beta, label_smoothing=eps).item()

        numeric = (at(1e-5) - at(-1e-5)) / 2e-5
        assert numeric == pytest.approx(sign * expected, rel=1e-6, abs=1e-8)


def test_no_gradient_flows_through_the_reference() -> None:
    policy = [vec(-1.0).requires_grad_(), vec(-2.0).requires_grad_()]
    reference = [vec(-1.5).requires_grad_(), vec(-1.5).requires_grad_()]
    losses.dpo(*policy, *reference, beta=0.1).sum().backward()
    assert all(value.grad is not None for value in policy)
    assert all(value.grad is None for value in reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_huge_margins_stay_finite(dtype: torch.dtype, eps: float) -> None:
    """The loss of a margin of -1e4 is 1e4, not the infinity of log(sigmoid(-1e4))."""
    chosen = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    zero = torch.zeros(2, dtype=dtype)
    found = losses.dpo(chosen, zero, zero, zero, beta=1.0, label_smoothing=eps)
    found.sum().backward()
    expected = torch.tensor([eps * 1e4, (1 - eps) * 1e4], dtype=dtype)
    torch.testing.assert_close(found.detach(), expected)
    torch.testing.assert_close(chosen.grad, torch.tensor([eps, -(1 - eps)], dtype=dtype))


@pytest.mark.parametrize("eps", [0.05, 0.2, 0.4])
def test_conservative_dpo_is_least_where_the_model_believes_the_labels(eps: float) -> None:
    """The margin that minimises the smoothed loss is logit(1 - eps): found by Newton's method
    without the formula; the unsmoothed loss has no minimum at all."""
    margin = vec(0.0).requires_grad_()
    zero = vec(0.0)
    for _ in range(50):
        loss = losses.dpo(margin, zero, zero, zero, beta=1.0, label_smoothing=eps).sum()
        (slope,) = torch.autograd.grad(loss, margin, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), margin)
        margin = (margin - 0.5 * slope / curvature).detach().requires_grad_()
    assert margin.item() == pytest.approx(math.log((1 - eps) / eps), abs=1e-9)
    unsmoothed = [loss_of_margin(u) for u in range(0, 700, 50)]
    assert unsmoothed == sorted(unsmoothed, reverse=True)
    assert unsmoothed[-1] > 0


@pytest.mark.parametrize("package", ["dpo.core", "dpo.data", "dpo.models"])
def test_the_examples_in_docstrings_hold(package: str) -> None:
    folder = importlib.import_module(package)
    for module in pkgutil.iter_modules(folder.__path__, package + "."):
        results = doctest.testmod(importlib.import_module(module.name))
        assert results.failed == 0, module.name


def test_the_loss_and_its_neighbours_have_examples() -> None:
    """The test above would pass on modules without any."""
    tested = ["core.losses", "core.reference_free", "core.token_level", "core.family"]
    tested += ["data.prompts", "data.order", "data.synthetic"]
    for name in tested:
        module = importlib.import_module(f"{dpo.__name__}.{name}")
        examples = [e for t in doctest.DocTestFinder().find(module) for e in t.examples]
        assert examples, name


# The other losses: identities, and what each claims of itself. Values, gradients and extremes of
# all of them are in test_family.py.

FOUR = (vec(-3.0, -9.0, -2.0), vec(-5.0, -4.0, -2.5), vec(-3.5, -6.0, -2.0), vec(-4.0, -5.0, -3.0))
DPO = losses.dpo(*FOUR, beta=0.5)


def at(chosen: float, rejected: float = 0.0) -> tuple[torch.Tensor, ...]:
    """A pair with these log-ratios."""
    return vec(chosen), vec(rejected), vec(0.0), vec(0.0)


def minimiser(loss, low: float, high: float) -> float:
    """Where a function of one number with a single valley is least: golden-section search."""
    shrink = (math.sqrt(5) - 1) / 2
    for _ in range(100):
        left, right = high - shrink * (high - low), low + shrink * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return (low + high) / 2


def test_several_losses_contain_dpo() -> None:
    lengths = torch.tensor([4, 2, 7])
    scores = vec(2.0, 2.0, 2.0), vec(1.0, 1.0, 1.0)  # log(2 - 1) = 0
    state = torch.tensor(0.3, dtype=torch.float64)
    same = {
        "robust": losses.robust(*FOUR, beta=0.5, label_smoothing=0.0),
        "f_dpo": losses.f_dpo(*FOUR, beta=0.5, divergence="reverse_kl", alpha=None),
        "f_dpo, alpha to 0": losses.f_dpo(*FOUR, beta=0.5, divergence="alpha", alpha=1e-9),
        "r_dpo, equal lengths": losses.r_dpo(*FOUR, lengths, lengths, beta=0.5, alpha=0.3),
        "length-normalised": losses.length_normalised_dpo(
            *FOUR, lengths[:1], lengths[:1], beta=0.5 * 4
        ),
        "dpop": losses.dpop(*FOUR, beta=0.5, penalty=0.0),
        "beta_dpo": losses.beta_dpo(*FOUR, state, beta=0.5, margin_scale=0.0),
        "odpo": losses.odpo(*FOUR, *scores, beta=0.5, alpha=0.7),
    }
    for name, found in same.items():
        torch.testing.assert_close(found, DPO, rtol=1e-6, atol=1e-6, msg=name)


def test_alpha_divergence_goes_from_reverse_to_forward_kl() -> None:
    forward = losses.f_dpo(*FOUR, beta=0.5, divergence="forward_kl", alpha=None)
    torch.testing.assert_close(
        losses.f_dpo(*FOUR, beta=0.5, divergence="alpha", alpha=1.0), forward
    )
    assert (forward - DPO).abs().min() > 0.01


def test_f_dpo_has_the_slopes_whose_optimum_the_theory_checks() -> None:
    names = {
        "reverse_kl": "reverse KL",
        "forward_kl": "forward KL",
        "js": "Jensen-Shannon",
        "alpha": "alpha",
    }
    chosen_ratio, rejected_ratio = (FOUR[0] - FOUR[2]).exp(), (FOUR[1] - FOUR[3]).exp()
    for divergence, name in names.items():
        slope = variants.DIVERGENCES[name][1]
        alpha = variants.ALPHA if divergence == "alpha" else None
        found = losses.f_dpo(*FOUR, beta=0.5, divergence=divergence, alpha=alpha)
        expected = losses.softplus(-0.5 * (slope(chosen_ratio) - slope(rejected_ratio)))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "js", "alpha": 0.5}, "alpha belongs to the divergence 'alpha'"),
        ({"divergence": "alpha", "alpha": None}, "alpha belongs to the divergence 'alpha'"),
        ({"divergence": "kl", "alpha": None}, "got 'kl'"),
    ],
)
def test_f_dpo_refuses_options_that_do_not_fit(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        losses.f_dpo(*FOUR, beta=0.5, **options)


def test_rpo_refuses_an_unknown_divergence() -> None:
    with pytest.raises(InputError, match="got 'kl'"):
        losses.rpo(*FOUR, vec(1.0), vec(0.0), beta=0.5, reward_scale=1.0, divergence="kl")


@pytest.mark.parametrize("gap", [0.0, -1.0, math.nan])
def test_odpo_refuses_pairs_whose_scores_are_not_in_order(gap: float) -> None:
    with pytest.raises(InputError, match="must be positive; the smallest here is"):
        losses.odpo(*FOUR, vec(1.0, 1.0, gap), vec(0.0, 0.0, 0.0), beta=0.5, alpha=1.0)


def test_the_larger_the_score_gap_the_larger_odpo_s_margin_must_be() -> None:
    zero, gaps = vec(0.0, 0.0, 0.0), vec(1.0, math.e, math.e**2)
    found = losses.odpo(zero, zero, zero, zero, gaps, zero, beta=0.5, alpha=2.0)
    torch.testing.assert_close(found, losses.softplus(vec(0.0, 2.0, 4.0)))


@pytest.mark.parametrize("p", [0.6, 0.9])
def test_minimisers_of_noisy_preferences(p: float) -> None:
    """With `p` of the labels one way, the least expected loss over one log-ratio difference."""

    def expected_loss(loss, difference: float) -> float:
        # The difference is split evenly: some losses see the two log-ratios apart.
        straight = loss(*at(difference / 2, -difference / 2)).item()
        return p * straight + (1 - p) * loss(*at(-difference / 2, difference / 2)).item()

    claimed = {
        "dpo": (partial(losses.dpo, beta=0.5), math.log(p / (1 - p)) / 0.5),
        "ipo": (partial(losses.ipo, beta=0.5), (2 * p - 1) / (2 * 0.5)),
        "hinge": (partial(losses.hinge, beta=0.5), 1 / 0.5),
        "sppo": (partial(losses.sppo, beta=0.5), (2 * p - 1) / 0.5),
    }
    for name, (loss, difference) in claimed.items():
        found = minimiser(partial(expected_loss, loss), -20, 20)
        assert found == pytest.approx(difference, abs=1e-6), name


def test_robust_dpo_is_unbiased_under_flips() -> None:
    eps, u = 0.2, 1.7
    robust = partial(losses.robust, beta=1.0, label_smoothing=eps)
    average = (1 - eps) * robust(*at(u)) + eps * robust(*at(-u))
    torch.testing.assert_close(average, losses.dpo(*at(u), beta=1.0))


@pytest.mark.parametrize("eps", [0.01, 0.2])
def test_exo_and_smoothed_dpo_are_the_two_divergences_from_the_label(eps: float) -> None:
    """Both are least at logit(1 - eps): EXO 0 there, smoothed DPO the label's entropy."""
    best = math.log((1 - eps) / eps)
    exo = partial(losses.exo, beta=1.0, label_smoothing=eps)
    assert minimiser(lambda u: exo(*at(u)).item(), -9, 9) == pytest.approx(best, abs=1e-6)
    assert exo(*at(best)).item() == pytest.approx(0, abs=1e-15)
    entropy = -(1 - eps) * math.log(1 - eps) - eps * math.log(eps)
    assert losses.dpo(*at(best), beta=1.0, label_smoothing=eps).item() == pytest.approx(entropy)
    # Far on the wrong side the one is flat and the other linear.
    assert exo(*at(-60.0)).item() == pytest.approx(exo(*at(-50.0)).item(), abs=1e-9)
    assert losses.dpo(*at(-60.0), beta=1.0, label_smoothing=eps).item() > 40


@pytest.mark.parametrize("divergence", ["backward_kl", "forward_kl", "squared"])
def test_rpo_is_zero_exactly_where_the_margin_is_the_scores_difference(divergence) -> None:
    def loss(difference: float) -> float:
        scores = vec(0.7), vec(-0.1)
        options = {"beta": 0.5, "reward_scale": 2.0, "divergence": divergence}
        return losses.rpo(*at(difference), *scores, **options).item()

    assert minimiser(loss, -9, 9) == pytest.approx(2 * 0.8 / 0.5, abs=1e-5)
    assert loss(2 * 0.8 / 0.5) == pytest.approx(0, abs=1e-15)
    assert loss(0.0) > 0.01


def test_rpo_s_divergences_are_not_confused() -> None:
    """A label that is sure and a model that is not: the divergence from the label is log 2, the one
    from the model grows with the score gap."""
    zero = vec(0.0)
    scores, options = (vec(50.0), vec(0.0)), {"beta": 1.0, "reward_scale": 1.0}
    backward = losses.rpo(zero, zero, zero, zero, *scores, divergence="backward_kl", **options)
    forward = losses.rpo(zero, zero, zero, zero, *scores, divergence="forward_kl", **options)
    assert backward.item() == pytest.approx(math.log(2))
    assert forward.item() == pytest.approx(25 - math.log(2))


def test_chi_po_stops_where_it_is_cut() -> None:
    chosen = vec(0.1, 8.0).requires_grad_()
    zero = vec(0.0, 0.0)
    found = losses.chi_po(chosen, zero, zero, zero, beta=1.0, max_reward=1.5)
    found.sum().backward()
    assert found[1].item() == pytest.approx(math.log1p(math.exp(-3.0)))
    assert chosen.grad[1] == 0
    assert chosen.grad[0] < 0


def test_chi_po_charges_for_a_rising_ratio_more_than_dpo() -> None:
    """The slope of its reward in h is 1 + rho: 2 at the reference, where DPO has 1."""
    for loss, expected in [
        (partial(losses.dpo, beta=1.0), -0.5),
        (partial(losses.chi_po, beta=1.0, max_reward=math.inf), -1.0),
    ]:
        chosen = vec(0.0).requires_grad_()
        loss(chosen, vec(0.0), vec(0.0), vec(0.0)).sum().backward()
        assert chosen.grad.item() == pytest.approx(expected)


def test_squared_po_has_nothing_to_gain_beyond_e_times_the_reference() -> None:
    loss = partial(losses.squared_po, beta=1.0)
    found = minimiser(lambda h: loss(*at(h)).item(), -3, 3)
    assert found == pytest.approx(1, abs=1e-6)


def test_dpop_charges_only_for_chosen_responses_that_became_less_likely() -> None:
    options = {"beta": 0.5, "penalty": 3.0}
    torch.testing.assert_close(
        losses.dpop(*at(2.0, 1.0), **options), losses.dpo(*at(1.0), beta=0.5)
    )
    # h_w = -2, h_l = -3: margin 1, less 3 x 2.
    found = losses.dpop(*at(-2.0, -3.0), **options)
    torch.testing.assert_close(found, losses.dpo(*at(-5.0), beta=0.5))


@pytest.mark.parametrize(
    ("name", "signs"),
    [("apo_zero", (-1, 1)), ("apo_down", (0, 1)), ("nca_pair", (-1, 1)), ("dpo", (-1, 1))],
)
def test_directions_at_the_reference(name: str, signs: tuple[int, int]) -> None:
    """The gradient's signs for the chosen and the rejected response. APO-down alone does not raise
    the chosen one; at the reference its two terms cancel there."""
    leaves = [vec(0.0).requires_grad_(), vec(0.0).requires_grad_()]
    getattr(losses, name)(*leaves, vec(0.0), vec(0.0), beta=0.5).sum().backward()
    slopes = [leaf.grad.item() for leaf in leaves]
    assert tuple((slope > 0) - (slope < 0) for slope in slopes) == signs


def test_apo_zero_of_a_pair_and_of_its_swap_add_to_two() -> None:
    straight = losses.apo_zero(*FOUR, beta=0.5)
    swapped = losses.apo_zero(FOUR[1], FOUR[0], FOUR[3], FOUR[2], beta=0.5)
    torch.testing.assert_close(straight + swapped, vec(2.0, 2.0, 2.0))


def test_bco_of_a_pair_is_bco_of_its_two_responses() -> None:
    shift = torch.tensor(0.4, dtype=torch.float64)
    policy, reference = torch.cat(FOUR[:2]), torch.cat(FOUR[2:])
    desirable = torch.tensor([True] * 3 + [False] * 3)
    single = unpaired.bco(policy, reference, desirable, shift, beta=0.5)
    found = losses.bco_pair(*FOUR, shift, beta=0.5)
    torch.testing.assert_close(found, single[:3] + single[3:])


def test_sppo_is_its_soft_form_with_sure_labels() -> None:
    ones, zeros = vec(1.0, 1.0, 1.0), vec(0.0, 0.0, 0.0)
    soft = losses.sppo_soft(*FOUR, ones, zeros, beta=0.5)
    torch.testing.assert_close(losses.sppo(*FOUR, beta=0.5), soft)


def test_aot_of_a_single_pair_is_dpo_and_of_a_batch_is_not() -> None:
    alone = [losses.aot(*(value[i : i + 1] for value in FOUR), beta=0.5) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), DPO)
    # Policy margins 2, -5, 0.5 and the reference's 0.5, -1, 1: sorted -5, 0.5, 2 and -1, 0.5, 1.
    expected = losses.softplus(-0.5 * vec(2 - 1, -5 + 1, 0.5 - 0.5))
    torch.testing.assert_close(losses.aot(*FOUR, beta=0.5), expected)


def test_beta_dpo_follows_the_batch_s_mean_margin_and_has_a_floor() -> None:
    zero = vec(0.0, 0.0)
    chosen = vec(1.0, 3.0)  # mean 2, one above M0: beta' = 0.2 (1 + 0.5)
    options = {"beta": 0.2, "margin_scale": 0.5}
    found = losses.beta_dpo(chosen, zero, zero, zero, torch.tensor(1.0), **options)
    torch.testing.assert_close(found, losses.softplus(-0.3 * chosen))
    # 0.2 (1 + 0.5 (2 - 9)) would be negative.
    found = losses.beta_dpo(chosen, zero, zero, zero, torch.tensor(9.0), **options)
    torch.testing.assert_close(found, losses.softplus(-0.001 * chosen))


def test_beta_dpo_s_filter_draws_by_the_gaussian_weights() -> None:
    """Of two pairs, one at the mean and one a standard deviation off, the first is drawn with
    probability 1 / (1 + e^(-1/2)); 20,000 draws, 4 standard errors."""
    draw = torch.Generator().manual_seed(0)
    margins, mean, std = vec(5.0, 7.0), vec(5.0)[0], vec(2.0)[0]
    num_draws = 20_000
    first = sum(
        losses.beta_dpo_selection(margins, mean, std, keep=0.5, generator=draw).item() == 0
        for _ in range(num_draws)
    )
    p = 1 / (1 + math.exp(-0.5))
    assert abs(first / num_draws - p) < 4 * math.sqrt(p * (1 - p) / num_draws)


def test_beta_dpo_s_filter_keeps_the_share_asked_for() -> None:
    draw = torch.Generator().manual_seed(0)
    margins, one = torch.linspace(-1, 1, 10), torch.tensor(1.0)
    for keep, count in [(0.8, 8), (1.0, 10), (0.01, 1)]:
        kept = losses.beta_dpo_selection(margins, 0 * one, one, keep=keep, generator=draw)
        assert len(set(kept.tolist())) == count
        assert kept.tolist() == sorted(kept.tolist())
    # Both underflow as densities; the nearer one is still kept first.
    far = torch.tensor([1e3, 2e3])
    assert losses.beta_dpo_selection(far, 0 * one, one, keep=0.5, generator=draw).item() == 0


def test_alpha_dpo_without_alpha_is_simpo_and_its_target_moves_with_the_margin() -> None:
    lengths = torch.tensor([4, 2, 7]), torch.tensor([3, 3, 3])
    state = vec(0.1)[0], vec(0.8)[0]
    simpo = reference_free.simpo(*FOUR[:2], *lengths, beta=2.0, gamma=0.6)
    tensors = *FOUR, *lengths, *state
    torch.testing.assert_close(losses.alpha_dpo(*tensors, beta=2.0, gamma=0.6, alpha=0.0), simpo)
    higher_target = losses.alpha_dpo(*tensors, beta=2.0, gamma=0.6, alpha=0.2) > simpo
    above_mean = losses.average_margin(*FOUR, *lengths) > state[0]
    assert higher_target.tolist() == above_mean.tolist()
    assert len(set(above_mean.tolist())) == 2


def test_discopop_is_logistic_on_the_left_and_exponential_on_the_right() -> None:
    found = losses.discopop(
        vec(-3.0, 3.0), vec(0.0, 0.0), vec(0.0, 0.0), vec(0.0, 0.0), beta=1.0, tau=0.05
    )
    torch.testing.assert_close(found, vec(math.log1p(math.exp(3)), math.exp(-3)))


def test_r_dpo_penalises_the_longer_response() -> None:
    """Of two winners with the same margin, the longer one has less to learn: length explains it."""
    zero, lengths = vec(0.0, 0.0), (torch.tensor([20, 5]), torch.tensor([10, 10]))
    longer, shorter = losses.r_dpo(zero, zero, zero, zero, *lengths, beta=0.5, alpha=0.1)
    assert longer.item() == pytest.approx(math.log1p(math.exp(-1.0)))
    assert shorter.item() == pytest.approx(math.log1p(math.exp(0.5)))


def test_bounded_exp_is_exp_with_a_tangent() -> None:
    x = vec(-1e4, -2.0, 0.0, 29.9, 30.0, 31.0, 1e4).requires_grad_()
    found = losses.bounded_exp(x)
    found.sum().backward()
    limit = math.exp(30)
    expected = vec(0.0, math.exp(-2), 1.0, math.exp(29.9), limit, 2 * limit, limit * (1e4 - 29))
    torch.testing.assert_close(found.detach(), expected)
    torch.testing.assert_close(
        x.grad, vec(0.0, math.exp(-2), 1.0, math.exp(29.9), limit, limit, limit)
    )


def test_softplus_is_exact_where_torch_s_is_not() -> None:
    found = losses.softplus(vec(20.5)).item()
    assert found == pytest.approx(20.5 + math.log1p(math.exp(-20.5)), abs=1e-14)
    assert torch.nn.functional.softplus(vec(20.5)).item() == 20.5


def test_moving_average_weighs_the_past_and_has_no_gradient() -> None:
    value = vec(7.0)[0].requires_grad_()
    found = losses.moving_average(vec(3.0)[0], value, momentum=0.9)
    assert found.item() == pytest.approx(0.9 * 3 + 0.1 * 7)
    assert not found.requires_grad
