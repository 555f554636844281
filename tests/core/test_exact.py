import math

import pytest
import torch

from dpo.core import exact
from dpo.errors import InputError


def vec(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def world() -> exact.World:
    return exact.World(
        prompt_probs=vec(0.25, 0.75),
        log_ref=torch.tensor([[0.5, 0.5], [0.8, 0.2]], dtype=torch.float64).log(),
        reward=torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]], dtype=torch.float64),
    )


def test_two_responses_by_hand() -> None:
    optimum = world().optimum(beta=1.0).exp()
    torch.testing.assert_close(optimum[0], vec(0.75, 0.25))
    torch.testing.assert_close(optimum[1], vec(0.8, 0.2))
    z = exact.log_partition(world().reward, world().log_ref, beta=1.0).exp()
    torch.testing.assert_close(z, vec(2.0, 1.0))


def test_optimal_objective_is_beta_log_z() -> None:
    w = world()
    value = w.objective(w.optimum(beta=0.5), beta=0.5)
    log_z = exact.log_partition(w.reward, w.log_ref, beta=0.5)
    torch.testing.assert_close(value, 0.5 * (w.prompt_probs @ log_z))


def test_canonical_reward_is_the_log_ratio_and_ignores_prompt_shifts() -> None:
    w = world()
    canonical = exact.canonical_reward(w.reward, w.log_ref, beta=0.3)
    torch.testing.assert_close(canonical, 0.3 * (w.optimum(beta=0.3) - w.log_ref))
    shifted = exact.canonical_reward(w.reward + 7.0, w.log_ref, beta=0.3)
    torch.testing.assert_close(canonical, shifted)


def test_kl_counts_zero_log_zero_as_zero_and_missing_support_as_infinite() -> None:
    point, even = vec(1.0, 0.0).log(), vec(0.5, 0.5).log()
    assert exact.kl(point, point).item() == 0.0
    assert exact.kl(point, even).item() == pytest.approx(math.log(2))
    assert exact.kl(even, point).item() == math.inf


def test_kl_gradient_is_finite_where_both_supports_end() -> None:
    logits = vec(0.3, -0.2).requires_grad_()
    log_p = torch.cat([torch.log_softmax(logits, -1), vec(-math.inf)])
    log_q = torch.cat([vec(0.5, 0.5).log(), vec(-math.inf)])
    exact.kl(log_p, log_q).backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_responses_outside_the_support_stay_outside() -> None:
    log_ref = vec(0.5, 0.5, 0.0).log()
    policy = exact.optimal_log_policy(vec(0.0, 0.0, 100.0), log_ref, beta=0.1)
    torch.testing.assert_close(policy.exp(), vec(0.5, 0.5, 0.0))


def test_total_variation_and_win_rate_by_hand() -> None:
    p, q = vec(1.0, 0.0).log(), vec(0.25, 0.75).log()
    assert exact.total_variation(p, q).item() == pytest.approx(0.75)
    table = torch.tensor([[0.5, 0.9], [0.1, 0.5]], dtype=torch.float64)
    assert exact.win_rate(p, q, table).item() == pytest.approx(0.25 * 0.5 + 0.75 * 0.9)


def test_frontier_rises_with_kl_as_beta_falls() -> None:
    frontier = world().frontier([4.0, 1.0, 0.25])
    assert bool((frontier.kl.diff() > 0).all())
    assert bool((frontier.reward.diff() > 0).all())


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_beta_must_be_positive(beta: float) -> None:
    with pytest.raises(InputError, match="beta must be positive and finite"):
        world().optimum(beta=beta)


def test_tables_must_agree() -> None:
    w = world()
    with pytest.raises(InputError, match="one shape"):
        exact.World(w.prompt_probs, w.log_ref, w.reward[:1])
    with pytest.raises(InputError, match="one entry per prompt"):
        exact.World(vec(1.0), w.log_ref, w.reward)
    with pytest.raises(InputError, match="prompt_probs must sum to 1"):
        exact.World(vec(0.5, 0.6), w.log_ref, w.reward)
    with pytest.raises(InputError, match="must sum to 1, off by 1"):
        exact.World(w.prompt_probs, w.log_ref + math.log(2), w.reward)
