"""Options as a dataclass: each is checked, and is a flag of its type."""

import argparse
import dataclasses
from typing import Literal

import pytest

from flux_jax.cli.dataclass_flags import add_dataclass_flags, given
from flux_jax.errors import UserError
from flux_jax.training.options import check, option


@dataclasses.dataclass(frozen=True)
class Few:
    steps: int = option(3, "how many", least=1)
    share: float = option(0.5, "of all", least=0, most=1)
    kind: Literal["one", "other"] = option("one", "which")
    loud: bool = option(False, "say so")
    name: str = option("", "of it")

    def __post_init__(self):
        check(self)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"steps": 0}, 'steps="0" must be at least 1.'),
        ({"share": 1.5}, 'share="1.5" must be between 0 and 1.'),
        ({"share": float("nan")}, 'share="nan" must be between 0 and 1.'),
        ({"kind": "both"}, 'kind="both" must be one or other.'),
    ],
)
def test_what_an_option_may_not_be_is_one_sentence(wrong, says):
    with pytest.raises(UserError) as caught:
        Few(**wrong)
    assert str(caught.value) == says


def test_flags_give_back_what_was_given_and_nothing_else():
    parser = argparse.ArgumentParser()
    add_dataclass_flags(parser, Few, {"steps": 7})
    assert given(Few, parser.parse_args([])) == {}
    words = ["--steps", "4", "--share", "0.25", "--kind", "other", "--loud", "--name", "x"]
    assert Few(**given(Few, parser.parse_args(words))) == Few(4, 0.25, "other", True, "x")
    assert given(Few, parser.parse_args(["--no-loud"])) == {"loud": False}
    told = parser.format_help()
    assert "how many (default: 7)" in told and "of all (default: 0.5)" in told
