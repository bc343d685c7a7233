"""1.58-bit FLUX in JAX: `from flux_jax import FluxPipeline`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux_jax.checkpoints.checkpoint import Checkpoint
    from flux_jax.config import FluxConfig
    from flux_jax.errors import UserError
    from flux_jax.sampling.pipeline import FluxPipeline

__all__ = ["Checkpoint", "FluxConfig", "FluxPipeline", "UserError"]

WHERE = {
    "Checkpoint": "flux_jax.checkpoints.checkpoint",
    "FluxConfig": "flux_jax.config",
    "FluxPipeline": "flux_jax.sampling.pipeline",
    "UserError": "flux_jax.errors",
}


def __getattr__(name: str) -> Any:
    """Loads what is asked for, and JAX with it, only then: programs set JAX's variables before."""
    if name in WHERE:
        return getattr(importlib.import_module(WHERE[name]), name)
    raise AttributeError(f"module 'flux_jax' has no attribute {name!r}")
