"""Runs each kernel test with each backend: Triton's kernels on a GPU where there is one, else interpreted.

The interpreter does not lower a kernel: what Triton refuses, or warns of, it never meets. So with --compile-kernels-for
each call that a test interprets is also compiled for GPUs that are not here, and a test whose call is not fit fails.
"""

import functools

import jax
import pytest

from flux_jax.runtime import aot
from pallas_kernels import Target, compiling_for, current_target, supported, triton, triton_rows

KERNELS = (triton, "matmul"), (triton_rows, "norm_modulate_quantize"), (triton_rows, "concatenate_quantize")
SEEN = set()


@pytest.fixture(params=["xla", "triton"])
def implementation(request):
    """The name of a backend that works within the test."""
    if supported(request.param, current_target())[0]:
        yield request.param
    else:
        with compiling_for(Target("interpret", "9.0")):
            yield request.param


@pytest.fixture(autouse=True)
def compiled_kernels(request, monkeypatch):
    """After a test: its interpreted calls, compiled. One of the same shapes and options has been tried before."""
    gpus, calls = request.config.getoption("--compile-kernels-for"), []
    if gpus:
        for module, name in KERNELS:
            monkeypatch.setattr(module, name, functools.partial(recorded, getattr(module, name), calls))
    yield
    for kernel, static, (leaves, tree) in calls:
        key = kernel.__name__, repr(static), str(leaves), tree
        if key not in SEEN:
            SEEN.add(key)
            for gpu in gpus:
                aot.compile_for(gpu, called(kernel, static, tree), *leaves)


def recorded(kernel, calls, *args, **options):
    """The kernel itself; an interpreted call that it takes is kept, as shapes."""
    result = kernel(*args, **options)
    if options.get("interpret"):
        arrays = {name: options.pop(name, None) for name in ("layer", "epilogue")}
        leaves, tree = jax.tree.flatten((args, arrays))
        calls.append((kernel, options, ([jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves], tree)))
    return result


def called(kernel, static, tree):
    """The kernel as a jitted function of its arrays alone."""

    @jax.jit
    def function(*leaves):
        args, arrays = tree.unflatten(leaves)
        arrays = {name: array for name, array in arrays.items() if array is not None}
        return kernel(*args, **{**static, **arrays, "interpret": False})

    return function
