"""What is timed on a GPU, as far as a machine without one goes: traced and lowered, never compiled."""

import dataclasses
import functools

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from bench import fused, implementations, kernels, mosaic, tiles, timing
from flux_jax.config import dev
from pallas_kernels import Target, compiling_for

KERNELS = {"triton", "A16 kernel", "A8 kernel", "A8 kernel, int8 given", "mosaic"}
HAS_MOSAIC = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)


def programs():
    """What the benches time on a GPU at full size by a kernel, or in its place: of the tuner the first settings of each
    product, and of all that differ in their channels alone one."""
    plan = kernels.groups(kernels.options([]))
    cases = [implementations.plain_case(m, *product) for m, products in plan for product in products]
    cases.append(implementations.plain_case(4608, 12288, 3072, "fp8 scratch"))
    cases += [case for case in fused.cases(dev(), tiny=False) if case.labels["implementation"] == "triton"]
    cases += mosaic.cases(*mosaic.SIZES[0], tiny=False) if HAS_MOSAIC else []
    for product in tiles.wanted(dev(), "int8"):
        settings = tiles.candidates(product, "int8", 128)[0]
        labels = {"implementation": "triton", "settings": dataclasses.astuple(settings)}
        multiply = functools.partial(implementations.kernel, settings=settings)
        cases.append(implementations.fused_case(product, 128, labels, multiply))
    alike = ("n", "k", "part", "calls", "settings")
    return {tuple((key, case.labels[key]) for key in case.labels if key not in alike): case for case in cases}


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_every_program_of_full_size_is_one_for_an_h100():
    """Traced and lowered from shapes alone, as far as a machine without the GPU's compiler goes."""
    abstract = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=abstract)
    with jax.sharding.use_abstract_mesh(mesh), compiling_for(Target("gpu", "9.0", abstract.device_kind)):
        for case in programs().values():
            x, weights, out = jax.eval_shape(case.start)
            traced = timing.loop(case.operation, 2).trace(x, [weights], [out])
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            by_kernel = case.labels.get("implementation") in KERNELS
            assert ("custom_call" in text) == by_kernel, case.labels
