"""1.58-bit FLUX in JAX: `from flux_jax import FluxPipeline`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flux_jax.pipeline import FluxPipeline

__all__ = ["FluxPipeline"]


def __getattr__(name: str) -> Any:
    """Loads the pipeline, and with it JAX, only when it is asked for: the command line sets variables before that."""
    if name == "FluxPipeline":
        from flux_jax.pipeline import FluxPipeline

        return FluxPipeline
    raise AttributeError(f"module 'flux_jax' has no attribute {name!r}")
