"""A small share of what `python -m tests.fuzz` tries, in this process: the worst that a wrong input does is to be
refused in a sentence."""

import numpy as np
import pytest

from tests.fuzz.targets import TARGETS

QUICK = {"checkpoint": 12, "safetensors": 150, "png": 100, "converter": 6, "prompts": 100, "config": 100}


def share(name, folder, first, count):
    target = TARGETS[name](folder)
    outcomes = [target.run(np.random.default_rng((1, first + i))) for i in range(count)]
    assert set(outcomes) <= {"refused", "equal", "other"} and "refused" in outcomes


@pytest.mark.parametrize("name", QUICK)
def test_a_few(name, tmp_path):
    share(name, tmp_path / "work", 0, QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_more(name, tmp_path):
    share(name, tmp_path / "work", 1000, 10 * QUICK[name])
