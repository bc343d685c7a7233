"""What a call may be given: numbers of Python and numpy, in range; anything else is a sentence, never an exception of
another kind."""

import itertools
import json

import numpy as np
import pytest

from flux_jax.config import nano
from flux_jax.errors import LONGEST, UserError
from flux_jax.sampling.request import SamplingRequest
from flux_jax.validation import check_seeds

ODD = (None, True, -1, 10**400, 10**5000, float("nan"), float("inf"), "a", b"a", "", "x\0", "\ud800", 1j, object())
ODD += ([], [1], [None], {}, range(2), np.bool_(True), np.float32("nan"), np.array("a"), np.array(3), np.zeros(3))
ARGUMENTS = (
    "prompt",
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "num_images_per_prompt",
    "seed",
    "latents",
    "prompt_embeds",
    "pooled_prompt_embeds",
    "negative_prompt",
    "true_cfg_scale",
    "max_sequence_length",
)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_odd_values_are_taken_or_refused_in_a_sentence(name):
    pairs = itertools.product(ODD, ({}, {"prompt": None, "prompt_embeds": np.zeros((1, 4, 128))}))
    for value, others in pairs:
        try:
            request = SamplingRequest.checked(nano(), **{"prompt": "a", **others, name: value})
        except UserError as error:
            message = str(error)
            assert len(message) <= LONGEST and message.isprintable()
            continue
        json.dumps([request.seeds, request.height, request.steps, request.guidance, request.max_sequence_length])


def test_numpys_numbers_are_numbers():
    numbers = {"height": np.int64(64), "width": np.uint16(64), "num_inference_steps": np.int32(2)}
    numbers |= {"guidance_scale": np.float32(2.5), "max_sequence_length": np.int8(12), "seed": np.arange(3, 5)}
    request = SamplingRequest.checked(nano(), prompt=["a", "b"], **numbers)
    assert (request.height, request.width, request.steps, request.guidance) == (64, 64, 2, 2.5)
    assert request.seeds == (3, 4) and all(type(seed) is int for seed in request.seeds)
    assert check_seeds([np.uint32(2**32 - 1)]) == [2**32 - 1]


@pytest.mark.parametrize("seed", [True, 1.0, np.bool_(True), np.float64(1), "1", 2**32, np.int64(2**32), -1])
def test_what_is_no_seed(seed):
    with pytest.raises(UserError, match="A seed must be a whole number from 0 to 4294967295"):
        check_seeds([seed])
