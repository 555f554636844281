"""Whether the probabilities of a reward model are those of what comes, measured as defined."""

import math

import numpy as np
import pytest

from dpo.core.stats import pair_calibration
from dpo.errors import InputError


def logit(p):
    return math.log(p / (1 - p))


def test_by_hand():
    """Two pairs at 0.9 of which one is right, two at 0.6 that are both right."""
    found = pair_calibration([logit(0.9), -logit(0.9), logit(0.6), logit(0.6)])
    assert found.error == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)
    assert found.brier == pytest.approx((0.1**2 + 0.9**2 + 2 * 0.4**2) / 4)
    assert [(b.n, round(b.confidence, 9), b.accuracy) for b in found.bins] == [
        (2, 0.6, 1.0),
        (2, 0.9, 0.5),
    ]


def test_a_model_that_knows_nothing_is_calibrated_and_has_a_brier_score_of_a_quarter():
    found = pair_calibration([0.0] * 10)
    assert (found.error, found.brier) == (0.0, 0.25)
    assert found.bins[0].accuracy == 0.5  # a tie is half right


def test_certain_and_right_is_perfect_and_certain_and_wrong_the_worst():
    assert pair_calibration([800.0] * 3)[:2] == (0.0, 0.0)
    assert pair_calibration([-800.0] * 3)[:2] == (1.0, 1.0)


def test_the_true_probabilities_are_calibrated_and_doubled_margins_are_not():
    rng = np.random.default_rng(0)
    gaps = rng.normal(size=20_000) * 2
    margins = np.where(rng.random(20_000) < 1 / (1 + np.exp(-gaps)), gaps, -gaps)
    true, doubled = pair_calibration(margins), pair_calibration(2 * margins)
    assert true.error < 0.015
    assert doubled.error > 0.05
    assert true.brier < doubled.brier  # a proper score
    assert sum(b.n for b in true.bins) == 20_000


def test_bins_partition_the_pairs_and_one_bin_compares_the_means():
    margins = np.linspace(-3, 4, 51)
    one, many = pair_calibration(margins, num_bins=1), pair_calibration(margins, num_bins=7)
    confidence = (1 / (1 + np.exp(-np.abs(margins)))).mean()
    right = (margins > 0).mean() + (margins == 0).mean() / 2
    assert one.error == pytest.approx(abs(confidence - right))
    assert many.error >= one.error - 1e-12
    assert one.brier == many.brier


@pytest.mark.parametrize("margins", [[], [math.nan], [math.inf]])
def test_nothing_to_measure_is_an_error(margins):
    with pytest.raises(InputError):
        pair_calibration(margins)
