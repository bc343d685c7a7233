"""A model on several devices: pictures side by side on the axis `data`, one picture's transformer split over `model`.

In: a mesh such as `data=2,model=4`, a checkpoint. Out: a transformer whose weights lie in shards, and the denoising
program for as many pictures at once as `data` has places. Each device runs the program of one picture on a FLUX with
fewer heads: projections into heads and MLP are split by rows, those back into the residual stream by columns, so that
one sum of activations per projection is all that devices exchange inside a step (Megatron-LM, arXiv 1909.08053). No
weight ever leaves its device. Modulation is split by rows, computed before the loop and gathered once.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.checkpoints.integrity import CODES
from flux_jax.config import TransformerConfig
from flux_jax.errors import UserError
from flux_jax.models.params import dotted
from flux_jax.models.ternary import TernaryLinear
from flux_jax.sampling import programs
from flux_jax.validation import MESH_AXES
from pallas_kernels import quantize_rows
from pallas_kernels.packing import TILE

AXES = MESH_AXES
LAYER = re.compile(r"(?:double_blocks|single_blocks)(?:\.\d+)?\.(?:(?:img|txt)\.)?(\w+)\.(weight|packed|scale|bias)")
COLUMN_PARALLEL, ROW_PARALLEL = ("qkv", "mlp_in", "linear1", "mod"), ("proj", "mlp_out", "linear2")


def make_mesh(shape: dict[str, int], config: TransformerConfig) -> Mesh:
    """All devices, of all processes, as a mesh. UserError where their number, or the model's heads, do not fit."""
    count, devices = shape["data"] * shape["model"], jax.device_count()
    if count != devices:
        raise UserError(f"The mesh has {count} places and JAX finds {devices} devices; the two must be equal.")
    check_heads(config, shape["model"])
    return jax.make_mesh((shape["data"], shape["model"]), AXES, axis_types=(AxisType.Auto,) * 2)


def check_heads(config: TransformerConfig, model: int) -> None:
    if config.num_heads % model:
        raise UserError(f"A mesh with model={model} does not divide the transformer's {config.num_heads} heads.")


def partition_spec(path: str) -> PartitionSpec:
    """How a stacked leaf [L, n, k] or [L, n] of the transformer lies on the axis `model`."""
    match = LAYER.fullmatch(path)
    if match is None:
        return PartitionSpec()
    layer, kind = match.groups()
    if layer in COLUMN_PARALLEL:
        return PartitionSpec(None, "model")
    if layer in ROW_PARALLEL and kind in ("weight", "packed"):
        return PartitionSpec(None, None, "model")
    return PartitionSpec()


def fused_sections(config: TransformerConfig, model: int, path: str) -> tuple[int, ...]:
    """The sections that a layer's leaf joins along the axis that is cut, for
    `flux_jax.checkpoints.sharded_restore.restore`: queries, keys, values, and the MLP. UserError for packed codes that
    would have to be taken apart."""
    match = LAYER.fullmatch(path)
    if match is None or model == 1:
        return ()
    (layer, kind), d = match.groups(), config.hidden_size
    if layer in ("qkv", "linear1"):
        return (d, d, d, config.mlp_dim) if layer == "linear1" else (d, d, d)
    if kind == "packed" and layer in ROW_PARALLEL and d % (model * TILE):
        raise UserError(
            f"A mesh with model={model} does not fit: ternary weights are split in tiles of {TILE}, and "
            f"{d} / {model} is no multiple."
        )
    if layer != "linear2" or kind not in ("weight", "packed"):
        return ()
    codes = 1 if kind == "weight" else CODES  # in a column
    return d // codes, config.mlp_dim // codes


class RowParallelLinear(nnx.Module):
    """A linear split by columns: the devices' partial products are added, then the bias once. Rows that are rounded to
    int8 are so by the largest magnitude on all devices, as if they lay on one."""

    def __init__(self, linear: Any):
        self.bias, linear.bias = linear.bias, None
        self.linear = linear

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        y = jax.lax.psum(self.partial(x), "model")
        return y if self.bias is None else y + self.bias[...].reshape((1,) * (y.ndim - 1) + self.bias[...].shape)

    def partial(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        if not isinstance(self.linear, TernaryLinear) or self.linear.activations != "int8":
            return self.linear(x)
        rows = x.reshape(-1, x.shape[-1])
        largest = jax.lax.pmax(jnp.abs(rows).max(-1), "model")
        y = self.linear.of_rows(*quantize_rows(rows, largest), x.dtype)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class ColumnParallelLinear(nnx.Module):
    """A linear split by rows whose outputs every device wants whole."""

    def __init__(self, linear: Any):
        self.linear = linear

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        y = self.linear(x)
        return jax.lax.all_gather(y, "model", axis=y.ndim - 1, tiled=True)


def partition(transformer: Any, model: int) -> Any:
    """The transformer as one device of `model` sees it inside `jax.shard_map`; its leaves are shared."""
    whole = transformer.config
    if model == 1:
        return transformer
    local = nnx.merge(*nnx.split(transformer))
    fewer = dataclasses.replace(whole, hidden_size=whole.hidden_size // model, num_heads=whole.num_heads // model)
    blocks = (local.double_blocks.img, local.double_blocks.txt, local.single_blocks)
    for block in blocks:
        block.config = fewer
        block.mod = ColumnParallelLinear(block.mod)
        for name in ROW_PARALLEL:
            if hasattr(block, name):
                setattr(block, name, RowParallelLinear(getattr(block, name)))
    return local


def load(stored: Checkpoint, mesh: Mesh, dtype: Any = None) -> nnx.Module:
    """The transformer of a checkpoint, each weight in shards on the mesh."""
    config, model = stored.config.transformer, mesh.shape["model"]

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(path))

    sections = functools.partial(fused_sections, config, model)
    return partition(stored.load("transformer", dtype=dtype, sharding=place, sections=sections), model)


def abstract(transformer: nnx.Module, mesh: Mesh) -> nnx.Module:
    """The same of an abstract transformer, for programs that are only compiled."""
    definition, state = nnx.split(transformer)
    placed = [
        (
            path,
            v.replace(
                jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, partition_spec(dotted(path))))
            ),
        )
        for path, v in nnx.to_flat_state(state)
    ]
    return partition(nnx.merge(definition, nnx.from_flat_state(placed)), mesh.shape["model"])


class ShardedSampler:
    """`denoise` for a transformer on a mesh: one jitted program for `width` pictures."""

    def __init__(self, transformer: nnx.Module, mesh: Mesh):
        self.mesh, self.width = mesh, mesh.shape["data"]
        self.leaves, structure = jax.tree.flatten(transformer)
        weights, each, same = [leaf.sharding.spec for leaf in self.leaves], PartitionSpec("data"), PartitionSpec()

        def one(leaves, latents, sigmas, conditions):
            mine = jax.tree.map(lambda x: x[0], (latents, conditions))
            x, finite = programs.denoise(jax.tree.unflatten(structure, leaves), mine[0], sigmas, mine[1])
            return x[None], finite[None]

        spread = jax.shard_map(
            one, mesh=mesh, in_specs=(weights, each, same, each), out_specs=(each, each), check_vma=False
        )
        # Whole on every device: each process can read all pictures.
        self.program = jax.jit(spread, out_shardings=NamedSharding(mesh, same))

    def arguments(
        self, latents: Sequence[Any], sigmas: np.ndarray, conditions: Sequence[programs.Conditions]
    ) -> tuple[Any, ...]:
        """Of `program`, for up to `width` pictures; it gives latents [width, i, c] and whether each step was finite.
        Places without a picture draw the last one again."""
        fill = self.width - len(latents)
        x, steering = ([*items, *[items[-1]] * fill] for items in (latents, conditions))
        return self.leaves, self._placed(x), sigmas, self._placed(steering)

    def _placed(self, pictures: Sequence[Any]) -> Any:
        """Arrays, or trees of them, of `width` pictures, stacked and put each where it is drawn."""

        def put(*arrays: Any) -> jax.Array:
            stacked = np.stack([np.asarray(array) for array in arrays])
            where = NamedSharding(self.mesh, PartitionSpec("data"))
            return jax.make_array_from_callback(stacked.shape, where, stacked.__getitem__)

        return jax.tree.map(put, *pictures)
