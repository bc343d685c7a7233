"""Products on several devices, four of a CPU's in a process of their own: each takes its shard, nothing is gathered."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("backend", ["xla", pytest.param("triton", marks=pytest.mark.slow)])
def test_shards_stay_local(backend):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, __file__, backend], env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def main(backend):
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    from pallas_kernels import Target, compiling_for, pack_ternary, ternary_matmul

    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((2, 2), ("rows", "channels"), axis_types=(AxisType.Auto,) * 2)
    codes = rng.integers(-1, 2, (64, 256)).astype(np.int8)
    packed = pack_ternary(codes)
    scale, bias = rng.standard_normal((2, 64)).astype(np.float32)
    x, dy = (rng.standard_normal((8, size)).astype(np.float32) for size in (256, 64))
    collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

    def put(array, *axes):
        return jax.device_put(array, NamedSharding(mesh, P(*axes)))

    def product(activations):
        return lambda *a: ternary_matmul(*a, activations=activations, implementation=backend)

    whole = put(x, "rows"), put(packed, "channels"), put(scale, "channels"), put(bias, "channels")
    specs = (P("rows"), P("channels"), P("channels"), P("channels"))
    # Pallas's interpreter mixes up over which axes its own values vary; its compiler does not, see below.
    check = backend != "triton"

    def shard(f, specs, out):
        return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=check)

    for activations in ("bf16", "int8"):
        local = shard(product(activations), specs, P("rows", "channels"))
        compiled = jax.jit(local).lower(*whole).compile()
        found = [name for name in collectives if name in compiled.as_text()]
        assert not found, found
        y = compiled(*whole)
        assert {s.data.shape for s in y.addressable_shards} == {(4, 32)}
        expected = product(activations)(x, packed, scale, bias)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)

    def loss(x, scale, bias, f, packed):
        return (f(x, packed, scale, bias) * dy).sum()

    # Devices with other channels share x, those with other rows share the scale: such gradients add up.
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnames="f")
    sharded = gradient(whole[0], *whole[2:], f=local, packed=whole[1])
    alone = gradient(x, scale, bias, f=product("int8"), packed=packed)
    for a, b in zip(sharded, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)

    # k over devices: whole tiles of the rows are packed rows themselves, and partial products add up.
    def partial(x, packed, scale, bias):
        return jax.lax.psum(product("bf16")(x, packed, scale), "channels") + bias[None]

    by_k = shard(partial, (P(None, "channels"), P(None, "channels"), P(), P()), P())
    y = jax.jit(by_k)(put(x, None, "channels"), put(packed, None, "channels"), put(scale), put(bias))
    np.testing.assert_allclose(y, x @ codes.T * scale + bias, rtol=1e-4, atol=1e-3)

    # As it will be traced on a GPU, with types that say what varies.
    with compiling_for(Target("gpu", "9.0")):
        local = jax.shard_map(product("int8"), mesh=mesh, in_specs=specs, out_specs=P("rows", "channels"))
        assert jax.eval_shape(jax.jit(jax.grad(lambda x, *w: local(x, *w).sum())), *whole).shape == x.shape


if __name__ == "__main__":
    from pallas_kernels import Target, compiling_for

    with compiling_for(Target("interpret", "9.0")):
        main(sys.argv[1])
