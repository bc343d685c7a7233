"""Which model draws, and how: `nano-1.58bit@kernel=xla,activations=int8` is a checkpoint with options.

In: such words of a command line. Out: a `Variant`, and from it pipelines, one for each device. Options: dtype of
weights and activations; activations, what ternary weights are multiplied with; kernel, what multiplies them: xla (the
paper's "no kernel"), triton, or interpret, which runs the Triton kernels on any device, slowly; offload, as
`flux_jax.generate --offload`.
"""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_jax.errors import UserError, shortened
from flux_jax.validation import ACTIVATIONS, OFFLOAD_MODES

if TYPE_CHECKING:
    from flux_jax.config import FluxConfig
    from flux_jax.sampling.pipeline import FluxPipeline

OPTIONS = {
    "dtype": ("auto", "float32", "bfloat16"),
    "activations": ACTIVATIONS,
    "kernel": ("auto", "xla", "triton", "interpret"),
    "offload": OFFLOAD_MODES,
}
IMPLEMENTATIONS = {"xla": "xla", "triton": "triton", "interpret": "triton"}  # of a kernel; else the layer's own choice
ANY_GPU = "8.0"  # a compute capability that the kernels accept, for the interpreter


@dataclasses.dataclass(frozen=True)
class Variant:
    """A checkpoint (folder or alias) and the options it was named with; None: the checkpoint's or machine's own."""

    model: str
    dtype: str | None = None
    activations: str | None = None
    kernel: str | None = None
    offload: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """MODEL or MODEL@OPTION=VALUE,...; a folder whose name holds "@" is taken as it is."""
        model, _, tail = (text, "", "") if os.path.exists(text) else text.partition("@")
        chosen = {}
        for pair in tail.split(",") if tail else ():
            name, _, value = pair.partition("=")
            if value not in OPTIONS.get(name, ()):
                known = "; ".join(f"{option}={'|'.join(values)}" for option, values in OPTIONS.items())
                where = f"{shortened(text, 160, quote=False)}: cannot read {shortened(pair)}"
                raise UserError(f"{where}; after @ may stand {known}, separated by commas.")
            chosen[name] = value
        return cls(model, **chosen)

    def otherwise(self, **options: str | None) -> "Variant":
        """With these options where it has none of its own."""
        lacking = {name: value for name, value in options.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **lacking)

    def label(self) -> str:
        """As `str`, without the folders that the checkpoint lies in: for what is shown to others."""
        return str(dataclasses.replace(self, model=Path(self.model).name or self.model))

    def __str__(self) -> str:
        options = [f"{name}={value}" for name in OPTIONS if (value := getattr(self, name)) is not None]
        return self.model + ("@" + ",".join(options) if options else "")

    def config(self) -> "FluxConfig":
        """Of the checkpoint. UserError where there is none, or an option does not fit it or the device."""
        from flux_jax.checkpoints.checkpoint import Checkpoint
        from pallas_kernels.dispatch import current_target, supported

        stored = Checkpoint.open(self.model)
        if (self.kernel or self.activations) and stored.quantization is None:
            raise UserError(f"{self}: {self.model} has no ternary weights, which kernel and activations are about.")
        if self.kernel == "triton":
            usable, reason = supported("triton", current_target())
            if not usable:
                raise UserError(f"{self}: {reason}; kernel=interpret runs them anywhere, slowly.")
        return stored.config

    def identity(self) -> dict[str, Any]:
        """What decides its pictures, for records: name and SHA-256 of the checkpoint's manifest, and the options."""
        from flux_jax.checkpoints.checkpoint import Checkpoint
        from flux_jax.runtime.environment import resolve_dtype

        stored = Checkpoint.open(self.model)
        options = {"activations": self.activations, "kernel": self.kernel}  # where parts lie changes no picture
        return {
            "name": stored.config.name,
            "sha256": stored.digest,
            "dtype": str(resolve_dtype(self.dtype or "auto")),
            **{name: value for name, value in options.items() if value is not None},
        }

    def load(self) -> "FluxPipeline":
        """On JAX's default device."""
        from flax import nnx

        from flux_jax.models.ternary import TernaryLinear
        from flux_jax.sampling.pipeline import FluxPipeline

        how = {"dtype": self.dtype or "auto", "offload": self.offload or "none", "activations": self.activations}
        pipe = FluxPipeline.from_pretrained(self.model, **how)
        for _, layer in nnx.iter_modules(pipe.transformer):
            if isinstance(layer, TernaryLinear):
                layer.implementation = IMPLEMENTATIONS.get(self.kernel or "auto")
        return pipe

    def tracing(self) -> contextlib.AbstractContextManager[None]:
        """Its pipelines must be called within this: it tells the kernels where they run."""
        from pallas_kernels.dispatch import Target, compiling_for

        target = Target("interpret", ANY_GPU, "interpret")
        return compiling_for(target) if self.kernel == "interpret" else contextlib.nullcontext()
