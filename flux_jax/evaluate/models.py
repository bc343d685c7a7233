"""Which model draws, and how: `nano-1.58bit@kernel=xla,activations=int8` is a checkpoint with options.

In: such words of a command line. Out: a `Variant`, and from it pipelines, one for each device. Options: dtype (of
weights and activations: auto, float32, bfloat16), activations (what ternary weights are multiplied with: bf16, int8)
and kernel (what multiplies them: xla, the paper's "no kernel", or triton).
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_jax.errors import UserError

if TYPE_CHECKING:
    from flux_jax.config import FluxConfig
    from flux_jax.pipeline import FluxPipeline

OPTIONS = {
    "dtype": ("auto", "float32", "bfloat16"),
    "activations": ("bf16", "int8"),
    "kernel": ("auto", "xla", "triton"),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A checkpoint (folder or alias) and the options it was named with; None: the checkpoint's or machine's own."""

    model: str
    dtype: str | None = None
    activations: str | None = None
    kernel: str | None = None

    @classmethod
    def parse(cls, words: str) -> "Variant":
        """MODEL or MODEL@OPTION=VALUE,...; a folder whose name holds "@" is taken as it is."""
        model, _, tail = (words, "", "") if Path(words).exists() else words.partition("@")
        chosen = {}
        for pair in tail.split(",") if tail else ():
            name, _, value = pair.partition("=")
            if value not in OPTIONS.get(name, ()):
                known = "; ".join(f"{option}={'|'.join(values)}" for option, values in OPTIONS.items())
                raise UserError(f"{words}: cannot read {pair!r}; after @ may stand {known}, separated by commas.")
            chosen[name] = value
        return cls(model, **chosen)

    def otherwise(self, **options: str | None) -> "Variant":
        """With these options where it has none of its own."""
        lacking = {name: value for name, value in options.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **lacking)

    def __str__(self) -> str:
        options = [f"{name}={value}" for name in OPTIONS if (value := getattr(self, name)) is not None]
        return self.model + ("@" + ",".join(options) if options else "")

    def config(self) -> "FluxConfig":
        """Of the checkpoint; UserError where there is none."""
        from flux_jax.checkpoint import Checkpoint

        return Checkpoint.open(self.model).config

    def identity(self) -> dict[str, Any]:
        """What decides its pictures, for records: name and SHA-256 of the checkpoint's manifest, and the options."""
        from flux_jax.checkpoint import MANIFEST, Checkpoint
        from flux_jax.pipeline import resolve_dtype

        stored = Checkpoint.open(self.model)
        digest = hashlib.sha256((stored.directory / MANIFEST).read_bytes()).hexdigest()
        options = {"activations": self.activations, "kernel": self.kernel}
        return {
            "name": stored.config.name,
            "sha256": digest,
            "dtype": str(resolve_dtype(self.dtype or "auto")),
            **{name: value for name, value in options.items() if value is not None},
        }

    def load(self) -> "FluxPipeline":
        """On JAX's default device."""
        from flux_jax.pipeline import FluxPipeline

        return FluxPipeline.from_pretrained(self.model, dtype=self.dtype or "auto")
