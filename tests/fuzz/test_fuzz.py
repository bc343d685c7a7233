"""A small share of what `python -m tests.fuzz` tries, in this process: the worst that a wrong input does is to be
refused in a sentence."""

from random import Random

import hypothesis
import pytest
from hypothesis import strategies

from tests.fuzz.targets import TARGETS

QUICK = {"safetensors": 100, "png": 60, "prompts": 60, "config": 60}
WHOLE = {"checkpoint": 40, "converter": 40}  # models, which take longer
OUTCOMES = ("refused", "equal", "other")


def check_known(name, folder, every=1):
    """The inputs that went wrong once, or each N-th of them."""
    target = TARGETS[name](folder / "known")
    for number in range(0, len(target.cases()), every):
        assert target.run(Random(0), number) in OUTCOMES, target.done


@pytest.mark.parametrize("name", QUICK)
def test_inputs_that_went_wrong_once(name, tmp_path):
    check_known(name, tmp_path)


def check_drawn(name, folder, count):
    """So many inputs that hypothesis draws, and makes simpler where one is wrong."""
    target = TARGETS[name](folder / "work")

    @hypothesis.settings(max_examples=count, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(strategies.randoms(use_true_random=False))
    def check(random):
        outcome = target.run(random)
        hypothesis.note(target.done)
        assert outcome in OUTCOMES

    check()


@pytest.mark.parametrize("name", QUICK)
def test_a_few(name, tmp_path):
    check_drawn(name, tmp_path, QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_whole_models(name, tmp_path):
    check_known(name, tmp_path, every=3)
    check_drawn(name, tmp_path, WHOLE[name])
