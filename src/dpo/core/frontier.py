"""Reward against KL: what is possible at a given KL, and what a method reached.

The exact frontier needs an enumerable world (`exact`); the rest takes measured points, wherever
they come from. KL in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from dpo.core.exact import World
from dpo.errors import InputError

Floats = NDArray[np.float64]

SMALLEST_BETA, LARGEST_BETA = 1e-4, 1e4
"""Between them lies, for rewards of ordinary size, all from the greedy policy to the reference."""
NUM_BISECTIONS = 60
NUM_STEPS = 1_000
"""In KL, where a curve has to be looked at everywhere."""


class Point(NamedTuple):
    """A policy on the reward-KL plane."""

    kl: float
    reward: float


class Optimum(NamedTuple):
    """The optimal policy of some beta, on the reward-KL plane."""

    beta: float
    kl: float
    reward: float


def merge_equal_rewards(world: World) -> World:
    """A world with one response for each distinct reward of a prompt, and the same frontier.

    `pi*/pi_ref` depends on a response through its reward alone, so that responses of equal reward
    can be one, with their probabilities added. Prompts with fewer distinct rewards than others are
    filled up with responses of probability zero.
    """
    levels = [row.unique(return_inverse=True) for row in world.reward]
    most = max(len(values) for values, _ in levels)
    shape = (len(levels), most)
    log_ref = world.log_ref.new_full(shape, -math.inf)
    reward = world.reward.new_zeros(shape)
    for prompt, (values, place) in enumerate(levels):
        mass = values.new_zeros(len(values)).index_add(0, place, world.log_ref[prompt].exp())
        log_ref[prompt, : len(values)] = mass.log()
        reward[prompt, : len(values)] = values
    return World(world.prompt_probs, log_ref, reward)


def optimum_at_kl(world: World, kl: float) -> Optimum:
    """The optimal policy whose KL to the reference is `kl`: no other has more reward there.

    One beta for all prompts, found by bisection: the KL falls as beta grows. A KL beyond that of
    the greedy policy gives the greedy policy.

    Raises:
        InputError: `kl` is negative or not a number.
    """
    if not kl >= 0:
        raise InputError(f"a KL is at least 0, got {kl}")
    low, high = math.log(SMALLEST_BETA), math.log(LARGEST_BETA)
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        if world.kl_to_ref(world.optimum(beta=math.exp(middle))) > kl:
            low = middle
        else:
            high = middle
    beta = math.exp(high)
    optimum = world.optimum(beta=beta)
    return Optimum(beta, float(world.kl_to_ref(optimum)), float(world.expected_reward(optimum)))


def concave_hull(points: Sequence[Point]) -> list[Point]:
    """The corners of the least concave, non-decreasing curve above all points, by rising KL.

    Every place on it is reached: a policy that takes one of two at random, once for a response, has
    the mean of their rewards, and at most the mean of their KLs, for KL is convex. Beyond the last
    corner the curve is level.

    >>> concave_hull([Point(0, 0), Point(1, 1), Point(2, 1.2), Point(1, 0.4), Point(3, 0.5)])
    [Point(kl=0, reward=0), Point(kl=1, reward=1), Point(kl=2, reward=1.2)]
    """
    corners: list[Point] = []
    for point in sorted(points, key=lambda point: (point.kl, -point.reward)):
        if corners and point.reward <= corners[-1].reward:
            continue
        while len(corners) >= 2 and _slope(corners[-2], corners[-1]) <= _slope(corners[-2], point):
            corners.pop()
        corners.append(point)
    return corners


def _slope(start: Point, end: Point) -> float:
    rise, run = end.reward - start.reward, end.kl - start.kl
    return rise / run if run > 0 else math.inf


def reward_at_kl(hull: Sequence[Point], kl: float) -> float:
    """The height of a hull at a KL; level beyond its last corner.

    >>> reward_at_kl([Point(0, 0), Point(2, 1)], 1), reward_at_kl([Point(0, 0), Point(2, 1)], 9)
    (0.5, 1.0)

    Raises:
        InputError: the KL is below the first corner's.
    """
    if not hull or kl < hull[0].kl:
        raise InputError(f"the frontier has no point at a KL of {kl} or less.")
    x = torch.tensor([point.kl for point in hull], dtype=torch.float64)
    right = min(int(torch.searchsorted(x, kl)), len(hull) - 1)
    if hull[right].kl <= kl:
        return float(hull[right].reward)
    left, end = hull[right - 1], hull[right]
    share = (kl - left.kl) / (end.kl - left.kl)
    return float((1 - share) * left.reward + share * end.reward)


def area_under(hull: Sequence[Point], max_kl: float) -> float:
    """Area between a hull and its first corner's reward, up to a KL; reward times nats.

    >>> area_under([Point(0, 1), Point(2, 3)], 4)  # a triangle, then level
    6.0
    """
    floor = hull[0].reward
    ends = [Point(p.kl, p.reward) for p in hull if p.kl < max_kl]
    ends.append(Point(max_kl, reward_at_kl(hull, max_kl)))
    return sum(
        (right.kl - left.kl) * ((left.reward + right.reward) / 2 - floor)
        for left, right in pairwise(ends)
    )


def tuned_rewards(points: Sequence[Point], exact: Sequence[Point], kls: ArrayLike) -> Floats:
    """What a method would reach at each KL if its strength were tuned for it, (K,).

    Efficiency (`reward gained over the reference / gained by the optimum of the same KL`) changes
    little from one strength to the next, so it is what is interpolated, linearly in the KL; below
    the first point it is the first point's, and beyond the last point the reward stays. The concave
    hull, which mixes policies, would pay for every gap between two strengths. The result never
    falls: a smaller KL is allowed as well.

    Args:
        points: policies of the method at different strengths.
        exact: the exact frontier by rising KL, from the reference at KL 0 on.

    >>> exact = [Point(0, 0), Point(1, 1), Point(2, 1.5)]
    >>> tuned_rewards([Point(0.5, 0.4), Point(1.5, 1.25)], exact, [0.25, 1.0, 2.0]).tolist()
    [0.2, 0.9, 1.25]
    """
    own, frontier = np.array(sorted(points), np.float64), np.array(exact, np.float64)
    reference = frontier[0, 1]

    def possible(kl: Floats) -> Floats:
        return np.asarray(np.interp(kl, frontier[:, 0], frontier[:, 1]) - reference)

    at = np.asarray(kls, dtype=np.float64)
    fine = np.linspace(0.0, max(at.max(), own[-1, 0]), NUM_STEPS + 1)
    grid = np.unique(np.concatenate([at, own[:, 0], fine]))
    efficiency = (own[:, 1] - reference) / possible(own[:, 0])
    reached = reference + np.interp(grid, own[:, 0], efficiency) * possible(grid)
    reached = np.maximum.accumulate(np.where(grid > own[-1, 0], own[-1, 1], reached))
    return np.asarray(reached[np.searchsorted(grid, at)])
