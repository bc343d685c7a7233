"""What a ternary product ends with, inside its kernel, and the same in plain JAX.

In: the product [m, n] in float32 and an epilogue. Out: what leaves the kernel, [m, n].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from pallas_kernels.tiling import EPILOGUES

EPS = 1e-6  # of FLUX's norms


class GatedResidual(NamedTuple):
    """residual + gate * y: the way back into the residual stream, behind proj, mlp_out and linear2."""

    gate: Float[Array, " n"]
    residual: Float[Array, "m n"]


class Gelu(NamedTuple):
    """gelu(y): the hidden layer of an MLP. tanh's form of GELU."""


class GeluQuantize(NamedTuple):
    """gelu(y) / step, rounded to int8: the hidden layer of an MLP, ready for the next product.

    `step` is one number for the whole layer, calibrated in advance: the largest value of a row is not known to a kernel
    that sees a part of its channels.
    """

    step: Float32[Array, ""]


class NormRope(NamedTuple):
    """RMSNorm and rotary embedding of every head, behind the channels of the queries, or of the keys.

    weight: the norm's [h]; rope: cosines and sines [2, m, h / 2].
    """

    weight: Float[Array, " h"]
    rope: Float32[Array, "2 m half"]


Epilogue = GatedResidual | Gelu | GeluQuantize | NormRope


KINDS = dict(zip(EPILOGUES, (type(None), GatedResidual, Gelu, GeluQuantize, NormRope), strict=True))


def epilogue_name(epilogue: Epilogue | None) -> str:
    """As the table of tuned settings calls it, one of `tiling.EPILOGUES`."""
    return next(name for name, kind in KINDS.items() if isinstance(epilogue, kind))


def finish(y: Float32[Array, "m n"], epilogue: Epilogue | None) -> Float32[Array, "m n"]:
    """The epilogue in plain JAX; whole numbers in -127..127 from GeluQuantize."""
    match epilogue:
        case None:
            return y
        case GatedResidual(gate, residual):
            return residual.astype(jnp.float32) + gate.astype(jnp.float32)[None] * y
        case Gelu():
            return jax.nn.gelu(y, approximate=True)
        case GeluQuantize(step):
            return jnp.clip(jnp.round(jax.nn.gelu(y, approximate=True) / step), -127, 127)
        case NormRope(weight, rope):
            heads = y.reshape(len(y), -1, len(weight))
            norm = lax.rsqrt(jnp.square(heads).mean(-1, keepdims=True) + EPS)
            heads = heads * norm * weight.astype(jnp.float32)[None, None]
            even, odd = jnp.unstack(heads.reshape(*heads.shape[:-1], -1, 2), axis=-1)
            cos, sin = rope[:, :, None]
            return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(y.shape)
