"""PPO's pieces against sums by hand, enumerations and finite facts."""

import math

import pytest
import torch

from dpo.core.ppo import (
    adapted_coefficient,
    approximate_kl,
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    kl_k1,
    kl_k3,
    masked_mean,
    penalised_rewards,
    sampled_entropy,
    whiten,
)

LENGTHS = (5, 1, 3, 7)


def tokens(seed, lengths=LENGTHS, padding=0.0):
    """Random values of the tokens of some responses, and the mask."""
    width = max(lengths) + 2  # two columns are nobody's
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(mask.shape, generator=draw, dtype=torch.float64)
    return values.masked_fill(~mask, padding), mask


def distribution(seed, size=6):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=draw, dtype=torch.float64).log_softmax(0)


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64).unsqueeze(-1)


# -- advantages --------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_advantages_are_the_double_sum_of_one_step_errors(gamma, lam):
    (rewards, mask), (values, _) = tokens(0), tokens(1)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for b, length in enumerate(LENGTHS):
        r, v = rewards[b].tolist(), [*values[b, :length].tolist(), 0.0]
        for t in range(length):
            errors = [r[s] + gamma * v[s + 1] - v[s] for s in range(t, length)]
            expected = sum((gamma * lam) ** i * error for i, error in enumerate(errors))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(expected + v[t], abs=1e-12)


def test_with_lambda_one_an_advantage_is_what_came_less_what_was_expected():
    (rewards, mask), (values, _) = tokens(0), tokens(1)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, torch.where(mask, to_come - values, 0.0))
    torch.testing.assert_close(returns, torch.where(mask, to_come, 0.0))


def test_with_lambda_zero_an_advantage_is_the_one_step_error():
    (rewards, mask), (values, _) = tokens(0), tokens(1)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    following = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], dim=1)
    expected = rewards + 0.9 * following - values
    torch.testing.assert_close(advantages, torch.where(mask, expected, 0.0))


def test_nothing_follows_the_last_token():
    """Its error is what it got less what was expected, whatever value stands in the padding."""
    (rewards, mask), (values, _) = tokens(0), tokens(1, padding=100.0)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    for b, length in enumerate(LENGTHS):
        last = rewards[b, length - 1] - values[b, length - 1]
        torch.testing.assert_close(advantages[b, length - 1], last)
        torch.testing.assert_close(returns[b, length - 1], rewards[b, length - 1])


def test_a_response_has_the_same_advantages_alone_and_beside_longer_ones():
    (rewards, mask), (values, _) = tokens(0), tokens(1)
    together, _ = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    for b, length in enumerate(LENGTHS):
        own = [x[b : b + 1, :length] for x in (rewards, values, mask)]
        alone, _ = gae(*own, gamma=1.0, lam=0.95)
        assert torch.equal(alone[0], together[b, :length])


def test_a_perfect_value_function_leaves_no_advantage():
    rewards, mask = tokens(0)
    values = torch.where(mask, rewards.flip(1).cumsum(1).flip(1), 0.0)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages, torch.zeros_like(values), atol=1e-12, rtol=0)
    torch.testing.assert_close(returns, values)


def test_rewards_add_up_to_the_score_less_the_penalty():
    kl, mask = tokens(2, padding=math.nan)
    scores = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    rewards = penalised_rewards(scores, kl, mask, coefficient=0.3)
    paid = torch.stack([-0.3 * kl[b, :n].sum() for b, n in enumerate(LENGTHS)])
    torch.testing.assert_close(rewards.sum(1), scores + paid)
    bare = penalised_rewards(scores, kl, mask, coefficient=0.0)
    for b, length in enumerate(LENGTHS):
        assert bare[b].nonzero().flatten().tolist() == [length - 1]
        assert bare[b, length - 1] == scores[b]


# -- whitening ---------------------------------------------------------------------------------


def test_whitened_tokens_have_mean_zero_and_variance_one_over_all_responses():
    values, mask = tokens(3, padding=1e6)
    found = whiten(3 * values + 7, mask)
    assert found[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert found[mask].var(unbiased=False).item() == pytest.approx(1, abs=1e-7)
    assert not found[~mask].any()
    torch.testing.assert_close(found, whiten(values, mask), atol=1e-7, rtol=0)


def test_equal_values_whiten_to_zero_and_not_to_nan():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert not whiten(torch.full((2, 3), 4.0), mask).any()


# -- the policy's loss -------------------------------------------------------------------------

CASES = [  # ratio, advantage, loss, and the gradient of the loss with respect to log pi
    (1.0, 2.0, -2.0, -2.0),
    (1.0, -2.0, 2.0, 2.0),
    (1.1, 2.0, -2.2, -2.2),
    (1.5, 2.0, -2.4, 0.0),  # good and already 20% likelier: nothing more to gain
    (0.5, 2.0, -1.0, -1.0),  # good and less likely than it was: still pulled back
    (0.5, -2.0, 1.6, 0.0),  # bad and already 20% less likely
    (1.5, -2.0, 3.0, 3.0),  # bad and likelier: still pushed down, with its whole ratio
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), CASES)
def test_the_clip_takes_the_gradient_on_the_side_of_the_advantage_only(
    ratio, advantage, loss, slope
):
    old = column(-1.5)
    logps = (old + math.log(ratio)).requires_grad_()
    tensors = logps, old, column(advantage), torch.ones(1, 1)
    found = clipped_policy_loss(*tensors, clip=0.2)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert logps.grad.item() == pytest.approx(slope)
    assert clip_fraction(*tensors, clip=0.2).item() == float(slope == 0)


def test_at_the_old_policy_the_gradient_is_the_policy_gradient():
    (old, mask), (advantages, _) = tokens(4), tokens(5)
    logps = old.clone().requires_grad_()
    clipped_policy_loss(logps, old, advantages, mask, clip=0.2).backward()
    torch.testing.assert_close(logps.grad, torch.where(mask, -advantages / mask.sum(), 0.0))


def test_a_loss_is_the_mean_over_tokens_not_over_responses():
    (logps, mask), (old, _), (advantages, _) = tokens(6), tokens(7), tokens(8)
    whole = clipped_policy_loss(logps, old, advantages, mask, clip=0.2)
    rows = [
        clipped_policy_loss(*(x[b : b + 1] for x in (logps, old, advantages, mask)), clip=0.2) * n
        for b, n in enumerate(LENGTHS)
    ]
    torch.testing.assert_close(whole, sum(rows) / sum(LENGTHS))


# -- the values' loss --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "loss", "slope"),
    [  # the old value is 1, the return 2, the clip 0.2
        (1.0, 0.5, -1.0),
        (1.1, 0.405, -0.9),
        (1.5, 0.32, 0.0),  # nearer than 0.2 allows: the clipped 1.2 is worse, and has no gradient
        (0.5, 1.125, -1.5),  # moved away from the return: pulled back with all its error
        (3.5, 1.125, 1.5),
    ],
)
def test_a_value_is_not_paid_for_moving_beyond_its_clip(value, loss, slope):
    values = column(value).requires_grad_()
    found = clipped_value_loss(values, column(1.0), column(2.0), torch.ones(1, 1), clip=0.2)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(slope)


def test_an_infinite_value_clip_is_half_the_squared_error():
    (values, mask), (old, _), (returns, _) = tokens(9), tokens(10), tokens(11)
    found = clipped_value_loss(values, old, returns, mask, clip=math.inf)
    torch.testing.assert_close(found, ((values - returns)[mask] ** 2).mean() / 2)


# -- padding -----------------------------------------------------------------------------------


def test_what_stands_in_the_padding_has_no_effect_and_no_gradient():
    clean = [tokens(seed)[0] for seed in range(12, 16)]
    dirty = [tokens(seed, padding=math.nan)[0] for seed in range(12, 16)]
    mask = tokens(0)[1]

    def everything(x, y, z, w):
        advantages, returns = gae(z, y, mask, gamma=0.9, lam=0.9)
        return [
            clipped_policy_loss(x, y, z, mask, clip=0.2),
            clipped_value_loss(x, y, w, mask, clip=0.2),
            approximate_kl(x, y, mask),
            clip_fraction(x, y, z, mask, clip=0.2),
            sampled_entropy(y, mask),
            explained_variance(x, w, mask),
            advantages,
            returns,
            whiten(x, mask),
            penalised_rewards(x[:, 0], y, mask, coefficient=0.5),
        ]

    for expected, found in zip(everything(*clean), everything(*dirty), strict=True):
        assert torch.equal(found, expected)
    logps = dirty[0].requires_grad_()
    others = dirty[1:]
    loss = clipped_policy_loss(logps, *others[:2], mask, clip=0.2)
    (loss + clipped_value_loss(logps, others[0], others[2], mask, clip=0.2)).backward()
    assert logps.grad.isfinite().all()
    assert not logps.grad[~mask].any()
    assert logps.grad[mask].any()


def test_targets_carry_no_gradient():
    names = ("logps", "old_logps", "advantages")
    tensors = {name: tokens(i)[0].requires_grad_() for i, name in enumerate(names)}
    mask = tokens(0)[1]
    clipped_policy_loss(*tensors.values(), mask, clip=0.2).backward()
    assert {name for name, x in tensors.items() if x.grad is not None} == {"logps"}
    values = [tokens(i)[0].requires_grad_() for i in range(3)]
    clipped_value_loss(*values, mask, clip=0.2).backward()
    assert [x.grad is not None for x in values] == [True, False, False]
    assert not any(x.requires_grad for x in gae(*values[:2], mask, gamma=1.0, lam=0.9))


# -- KL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_both_estimators_have_the_kl_as_their_mean(estimator):
    policy, reference = distribution(0), distribution(1)
    kl = (policy.exp() * (policy - reference)).sum()
    mean = (policy.exp() * estimator(policy, reference)).sum()
    torch.testing.assert_close(mean, kl)
    assert kl > 0.1


def test_k3_is_never_negative_and_k1_is():
    policy, reference = distribution(0, size=1000), distribution(1, size=1000)
    assert (kl_k3(policy, reference) >= 0).all()
    assert (kl_k1(policy, reference) < 0).any()
    assert not kl_k3(policy, policy).any()


def test_k3_has_less_variance_near_the_reference():
    reference = distribution(0)
    policy = (reference + 0.1 * distribution(1)).log_softmax(0)
    spread = [
        (policy.exp() * k(policy, reference) ** 2).sum()
        - (policy.exp() * k(policy, reference)).sum() ** 2
        for k in (kl_k1, kl_k3)
    ]
    assert spread[1] < spread[0] / 10


def test_as_a_reward_k1_has_the_gradient_of_the_kl_and_k3_another_one():
    """`E_pi[k grad log pi]` by enumeration, against the gradients of the two KLs."""
    logits = distribution(0).requires_grad_()
    reference = distribution(1)

    def gradient(scalar):
        return torch.autograd.grad(scalar, logits)[0]

    def policy():
        return logits.log_softmax(0)

    forward = gradient((policy().exp() * (policy() - reference)).sum())
    backward = gradient((reference.exp() * (reference - policy())).sum())
    pushes = [
        gradient((policy().detach().exp() * k(policy().detach(), reference) * policy()).sum())
        for k in (kl_k1, kl_k3)
    ]
    torch.testing.assert_close(pushes[0], forward)
    torch.testing.assert_close(pushes[1], forward - backward)
    assert (pushes[1] - forward).norm() > 0.1 * forward.norm()


def test_the_approximate_kl_is_that_of_the_old_policy_to_the_new_and_zero_at_first():
    """Every response once, weighted as the old policy would draw them: 100 of 6 tokens."""
    counts = torch.tensor([40, 25, 15, 10, 6, 4])
    old = (counts / 100).double().log()
    new = distribution(2)
    drawn = torch.repeat_interleave(torch.arange(6), counts).unsqueeze(-1)
    mask = torch.ones_like(drawn)
    found = approximate_kl(new[drawn], old[drawn], mask)
    torch.testing.assert_close(found, (old.exp() * (old - new)).sum())
    assert approximate_kl(old[drawn], old[drawn], mask).item() == 0
    entropy = sampled_entropy(old[drawn], mask)
    torch.testing.assert_close(entropy, -(old.exp() * old).sum())


# -- the coefficient ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.4, 0.99), (0.0, 0.98)]
)
def test_the_coefficient_moves_with_the_relative_error_up_to_a_fifth(kl, factor):
    found = adapted_coefficient(0.5, kl, target=6.0, gain=0.1)
    assert found == pytest.approx(0.5 * factor)


def test_the_coefficient_finds_the_one_that_holds_the_kl_at_its_target():
    """Where the KL falls with the coefficient, as `8 / (1 + 40 c)`, the target 2 asks for 0.075."""
    coefficient = 0.5
    for _ in range(400):
        kl = 8 / (1 + 40 * coefficient)
        coefficient = adapted_coefficient(coefficient, kl, target=2.0, gain=0.1)
    assert coefficient == pytest.approx(0.075, rel=1e-3)


# -- diagnostics -------------------------------------------------------------------------------


def test_explained_variance_is_one_for_the_returns_and_zero_for_a_constant():
    returns, mask = tokens(17)
    assert explained_variance(returns + 5, returns, mask).item() == pytest.approx(1)
    assert explained_variance(torch.full_like(returns, 9), returns, mask).item() == pytest.approx(0)
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3)
    half = explained_variance(0.5 * returns, returns, mask).item()
    assert half == pytest.approx(0.75)
    assert explained_variance(returns, torch.full_like(returns, 2.0), mask).item() == 0


def test_the_clip_fraction_counts_tokens_without_gradient():
    (logps, mask), (old, _), (advantages, _) = tokens(18), tokens(19), tokens(20)
    logps = logps.requires_grad_()
    clipped_policy_loss(logps, old, advantages, mask, clip=0.2).backward()
    lost = (logps.grad[mask] == 0).double().mean()
    found = clip_fraction(logps, old, advantages, mask, clip=0.2)
    torch.testing.assert_close(found, lost)
    assert 0.2 < found < 0.8


def test_a_mean_is_over_tokens_alone():
    values, mask = tokens(21, padding=math.inf)
    torch.testing.assert_close(masked_mean(values, mask), values[mask].mean())
