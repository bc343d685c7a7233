"""Intervals cover what they promise, and reduce to known ones."""

import numpy as np
import pytest
from scipy import stats

from flux_jax.evaluate.statistics import (
    Estimate,
    average,
    mean,
    mean_difference,
    paired_difference,
    share,
    sign_test,
    wilson,
)

TRIALS = 500


def test_a_share_of_single_pictures_is_wilsons():
    groups = [[True]] * 30 + [[False]] * 20
    estimate = share(groups)
    assert estimate.score == 0.6
    assert (estimate.prompts, estimate.pictures) == (50, 50)
    np.testing.assert_allclose(estimate.interval, wilson(30, 50), atol=0.002)


def test_pictures_that_agree_count_once():
    alike = share([[True] * 4] * 30 + [[False] * 4] * 20)
    np.testing.assert_allclose(alike.interval, wilson(30, 50), atol=0.002)
    mixed = share([[True, True, False, True, False]] * 50)  # every prompt the same: as certain as pictures can make it
    np.testing.assert_allclose(mixed.interval, wilson(150, 250), atol=1e-9)
    assert share([[True] * 4] * 10).interval == tuple(wilson(10, 10))


def test_intervals_over_prompts_cover_the_truth():
    """Pictures of a prompt share its difficulty: intervals that took them for independent would miss twice as often."""
    rng = np.random.default_rng(1)
    difficulty = rng.beta(0.8, 0.5, (TRIALS, 60))
    verdicts = rng.random((TRIALS, 60, 4)) < difficulty[..., None]
    truth = 0.8 / 1.3
    for estimate in (share, mean):
        found = [estimate(trial.tolist()).interval for trial in verdicts]
        assert 0.93 < np.mean([low <= truth <= high for low, high in found]) < 0.97, estimate
    naive = [wilson(int(trial.sum()), trial.size) for trial in verdicts]
    assert np.mean([low <= truth <= high for low, high in naive]) < 0.85


def test_mean_is_students():
    values = [0.2, 0.5, 0.9, 0.4]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(mean([[v] for v in values]).interval, (low, high), atol=1e-9)
    assert mean([[0.5, 0.6]]).interval == (0.0, 1.0)


def test_differences_are_taken_prompt_by_prompt(snapshot_message):
    first = {"a": [0.5, 0.7], "b": [0.2, 0.2], "c": [0.9, 0.9]}
    second = {"b": [0.1, 0.1], "a": [0.4, 0.6], "d": [0.0, 0.0]}
    estimate = mean_difference(first, second)
    assert (estimate.prompts, estimate.score) == (2, pytest.approx(0.1))
    np.testing.assert_allclose(estimate.interval, (0.1, 0.1), atol=1e-9)  # both differ by 0.1, whatever their level
    with snapshot_message.raises(ValueError, "prompt"):
        mean_difference(first, {"z": [1.0]})


def test_average_of_independent_parts():
    part = Estimate(0.5, (0.4, 0.7), 10, 40)
    joined = average([part] * 4)
    np.testing.assert_allclose((joined.score, *joined.interval), (0.5, 0.45, 0.6))
    assert (joined.prompts, joined.pictures) == (40, 160)


@pytest.mark.parametrize("cells", [(0.5, 0.1, 0.05, 0.35), (0.9, 0.02, 0.02, 0.06), (0.05, 0.05, 0.1, 0.8)])
def test_paired_intervals_cover_the_truth(cells):
    rng = np.random.default_rng(2)
    found = [paired_difference(*map(int, counts)).interval for counts in rng.multinomial(100, cells, TRIALS)]
    truth = cells[1] - cells[2]
    assert 0.93 < np.mean([low <= truth <= high for low, high in found]) <= 0.99


def test_pairing_makes_intervals_narrower():
    paired = paired_difference(both=55, first=3, second=2, neither=40)
    unpaired = paired_difference(both=34, first=24, second=23, neither=19)  # about the same shares, unrelated
    assert np.ptp(paired.interval) < np.ptp(unpaired.interval) / 2
    assert paired.score == pytest.approx(0.01)
    swapped = paired_difference(both=55, first=2, second=3, neither=40)
    np.testing.assert_allclose(swapped.interval, (-paired.interval[1], -paired.interval[0]))


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 3), (12, 2), (0, 9)])
def test_sign_test_is_the_binomial_one(first, second):
    expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert sign_test(first, second) == pytest.approx(expected)
