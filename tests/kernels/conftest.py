"""Runs each kernel test with each backend: Triton's kernels on a GPU where there is one, else interpreted."""

import pytest

from pallas_kernels import Target, compiling_for, current_target, supported


@pytest.fixture(params=["xla", "triton"])
def implementation(request):
    """The name of a backend that works within the test."""
    if supported(request.param, current_target())[0]:
        yield request.param
    else:
        with compiling_for(Target("interpret", "9.0")):
            yield request.param
