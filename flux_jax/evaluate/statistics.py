"""Intervals: how far a score can be trusted, and the difference of two.

In: pictures' scores, grouped by prompt, because pictures of one prompt succeed and fail together. Out: `Estimate`s with
95 % intervals. A prompt is the unit that is drawn; several pictures of it only make its own mean more certain.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Z95 = 1.959964  # of the standard normal distribution: 2.5 % lie above


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of scores, with its 95 % interval; the prompts and pictures behind it."""

    score: float
    interval: tuple[float, float]
    prompts: int
    pictures: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "score": self.score,
            "interval": list(self.interval),
            "prompts": self.prompts,
            "pictures": self.pictures,
        }


def wilson(right: int | float, count: int | float) -> list[float]:
    """95 % interval of a share (Wilson, 1927, equation for the score interval)."""
    share, z2 = right / count, Z95**2 / count
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def share(groups: Sequence[Sequence[bool]]) -> Estimate:
    """The share of pictures that are right; groups: a sequence of verdicts for each prompt.

    Wilson's interval for the effective number of pictures, share (1 - share) / variance, the variance being that of
    a mean over prompts; it lies between the number of prompts (all pictures of a prompt alike) and of pictures.
    """
    right, pictures = sum(sum(group) for group in groups), sum(len(group) for group in groups)
    score, effective = right / pictures, len(groups)
    if len(groups) > 1 and 0 < score < 1:
        residuals = [sum(group) - score * len(group) for group in groups]
        variance = sum(r * r for r in residuals) * len(groups) / (len(groups) - 1) / pictures**2
        effective = min(max(score * (1 - score) / max(variance, 1e-12), len(groups)), pictures)
    low, high = wilson(score * effective, effective)
    return Estimate(score, (low, high), len(groups), pictures)


def mean(groups: Sequence[Sequence[int | float]]) -> Estimate:
    """The mean of scores in [0, 1] over all pictures, with Student's interval of a mean over prompts. A single prompt
    says nothing about others: [0, 1]."""
    from scipy.special import stdtrit

    pictures = sum(len(group) for group in groups)
    score = sum(sum(group) for group in groups) / pictures
    if len(groups) < 2:
        return Estimate(score, (0.0, 1.0), len(groups), pictures)
    residuals = [sum(group) - score * len(group) for group in groups]
    variance = sum(r * r for r in residuals) * len(groups) / (len(groups) - 1) / pictures**2
    half = float(stdtrit(len(groups) - 1, 0.975)) * math.sqrt(variance)
    return Estimate(score, (max(0.0, score - half), min(1.0, score + half)), len(groups), pictures)


def margin(values: Sequence[int | float]) -> float:
    """Half of Student's 95 % interval of the mean of two or more values, one of each prompt."""
    from scipy.special import stdtrit

    return float(stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1)) / math.sqrt(len(values))


def mean_difference(
    first: Mapping[Any, Sequence[int | float]], second: Mapping[Any, Sequence[int | float]]
) -> Estimate:
    """First minus second on the prompts that both have (prompt -> scores), with Student's interval of the prompts'
    differences. ValueError where they have none in common."""
    common = [prompt for prompt in first if prompt in second]
    if not common:
        raise ValueError("no prompt in common")
    differences = [float(np.mean(first[prompt]) - np.mean(second[prompt])) for prompt in common]
    score, pictures = float(np.mean(differences)), sum(len(first[prompt]) for prompt in common)
    if len(common) < 2:
        return Estimate(score, (-1.0, 1.0), len(common), pictures)
    half = margin(differences)
    return Estimate(score, (score - half, score + half), len(common), pictures)


def average(parts: Sequence[Estimate]) -> Estimate:
    """The unweighted mean of independent estimates. Its interval takes the square root of the sum of their squared
    distances to their own bounds, on either side ("MOVER": Zou and Donner, 2008), and so is never empty."""
    score = float(np.mean([part.score for part in parts]))
    low = math.hypot(*(part.score - part.interval[0] for part in parts)) / len(parts)
    high = math.hypot(*(part.interval[1] - part.score for part in parts)) / len(parts)
    return Estimate(
        score, (score - low, score + high), sum(part.prompts for part in parts), sum(part.pictures for part in parts)
    )


def paired_difference(both: int, first: int, second: int, neither: int) -> Estimate:
    """Share right of the first model minus that of the second, on the same captions: counts of captions that both,
    only the first, only the second, neither got right. Interval: Newcombe (1998, Statistics in Medicine 17:2635),
    method 10, Wilson's intervals joined by the correlation of the two."""
    count = both + first + second + neither
    one, two = (both + first) / count, (both + second) / count
    (low1, high1), (low2, high2) = wilson(both + first, count), wilson(both + second, count)
    product = both * neither - first * second
    margins = math.sqrt((both + first) * (second + neither) * (both + second) * (first + neither))
    phi = (max(product - count / 2, 0.0) if product > 0 else float(product)) / margins if margins else 0.0

    def bound(down: float, up: float) -> float:
        return math.sqrt(max(down**2 - 2 * phi * down * up + up**2, 0.0))

    interval = one - two - bound(one - low1, high2 - two), one - two + bound(high1 - one, two - low2)
    return Estimate(one - two, interval, count, count)


def sign_test(first: int, second: int) -> float:
    """Probability of a split at least as uneven among the captions that flipped, were either way as likely (the exact
    form of McNemar's test, two-sided)."""
    from scipy.stats import binomtest  # takes a second to import

    return float(binomtest(first, first + second).pvalue) if first + second else 1.0
