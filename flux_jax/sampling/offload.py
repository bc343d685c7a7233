"""A model larger than its device: components wait in the host's memory and are on the device only while they work.

In: modules whose weights lie on the host (`host()`, JAX's CPU device), and a device. Out: the same module on the
device (`on_device`), or, for T5, the text itself, computed with one layer on the device at a time (`encode_by_layers`).
Whoever borrows a module keeps no reference to it: its memory is free as soon as the last one is gone.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float

from flux_jax.errors import UserError
from flux_jax.models.t5 import T5Encoder, T5Layer

Module = TypeVar("Module", bound=nnx.Module)


def host() -> SingleDeviceSharding:
    """The host's memory as a place for weights. UserError where JAX was started without its CPU backend."""
    try:
        return SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError as error:
        raise UserError("offload keeps weights on the CPU, which JAX_PLATFORMS excludes: add ',cpu' to it.") from error


def on_device(module: Module, device: Any) -> Module:
    """The module on a device (or in a sharding); itself where it is there already."""
    return jax.device_put(module, device)


_position_bias = jax.jit(T5Encoder.position_bias, static_argnums=1)


@jax.jit
def layer(weights: T5Layer, x: Float[Array, "b t d"], bias: Float[Array, "1 h t t"]) -> Float[Array, "b t d"]:
    """One layer of T5 as a program of its own."""
    return weights(x, bias)


@jax.jit
def _normed(norm: nnx.Module, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    return norm(x)


def encode_by_layers(t5: T5Encoder, ids: Sequence[np.ndarray], device: Any) -> list[Float[Array, "1 t d"]]:
    """The text [1, t, d] of each of `ids` (int32 [1, t], all of one length), the weights of one layer on the device.

    Token embeddings are looked up on the host. A layer serves all texts before the next one comes.
    """
    table = np.asarray(t5.token_embedding.weight[...])
    texts = [jax.device_put(table[each], device) for each in ids]
    bias = jax.device_put(_position_bias(t5, ids[0].shape[1]), device)
    for i in range(t5.config.num_layers):
        weights = jax.tree.map(lambda w, i=i: jax.device_put(np.asarray(w)[i], device), t5.layers)
        # Waited for: copies run ahead of the computation, and would bring further layers before this one has gone.
        texts = jax.block_until_ready([layer(weights, text, bias) for text in texts])
        del weights
    return [_normed(on_device(t5.final_norm, device), text) for text in texts]
