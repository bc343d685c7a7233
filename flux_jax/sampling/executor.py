"""How a pipeline's programs run: each stage timed, its weights where they are needed, its memory kept down as asked.

In: modules of a pipeline, token ids, latents [i, c]. Out: text [1, t, d] and pooled [1, p], pixels [h, w, 3], the
seconds of each stage. A stage that runs out of memory says so in one sentence, with the argument that helps.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from flux_jax.errors import UserError
from flux_jax.models.params import placement_of
from flux_jax.models.vae_tiling import STRIP_BYTES
from flux_jax.runtime import memory
from flux_jax.sampling import offload, programs

STAGES = ("compile", "text", "denoise", "decode")


class StageExecutor:
    """One call of a pipeline. `seconds`: by stage, compilation apart; `steps`: how many were run.

    offloading: one of `validation.OFFLOAD_MODES`. vae_tiling: decode in strips "on", "off", or "auto", where whole
    pictures would not fit into the device's free memory.
    """

    def __init__(self, offloading: str = "none", vae_tiling: str = "auto"):
        self.offloading, self.vae_tiling = offloading, vae_tiling
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.steps = 0
        self.device = placement_of(None, "", ())

    def timings(self) -> dict[str, float]:
        return {**self.seconds, "steps": float(self.steps)}

    def run(self, stage: str, program: Any, *args: Any, **static: Any) -> Any:
        """What `program` returns; `static`: its static arguments."""
        return self.prepare(stage, program, *args, **static)(*args)

    def prepare(self, stage: str, program: Any, *args: Any, **static: Any) -> Callable[..., Any]:
        """The program, compiled for these arguments where jax.jit made it, as a function of like ones: each call is
        waited for and timed. UserError with exit code 4 where it runs out of memory, or would."""
        return self._watching(stage, self._compile(stage, program, *args, **static))

    def _compile(self, stage: str, program: Any, *args: Any, **static: Any) -> Callable[..., Any]:
        if not hasattr(program, "lower"):
            return functools.partial(program, **static)
        with self._watched(stage), self._timed("compile"):
            return program.lower(*args, **static).compile()

    def _watching(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, waited for and timed; UserError where the device lacks the memory for it."""
        if short := self.shortage(call):
            raise self._exhausted(stage, short)

        def run(*args: Any) -> Any:
            with self._watched(stage), self._timed(stage):
                return jax.block_until_ready(call(*args))

        return run

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start

    @contextlib.contextmanager
    def _watched(self, stage: str) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not memory.is_exhausted(error):
                raise
            raise self._exhausted(stage) from error

    def _exhausted(self, stage: str, needed: str = "") -> UserError:
        remedies = memory.remedies(stage, self.offloading, self.vae_tiling)
        return memory.exhausted(memory.STAGES[stage] + needed, remedies)

    def shortage(self, call: Callable[..., Any]) -> str:
        """What a compiled program needs beside its arguments and what is free on the device, in words; "" where that is
        enough, or not known. Before it runs: on a CPU the system would rather kill the process than refuse memory."""
        analysis = call.memory_analysis() if isinstance(call, jax.stages.Compiled) else None
        free = memory.free(next(iter(self.device.device_set)))
        if analysis is None or free is None:
            return ""
        needed = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return "" if needed <= free else f" ({needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free)"

    def on_device(self, module: nnx.Module) -> nnx.Module:
        """A component where programs run: there for good, or until the last reference to what is returned has gone."""
        return module if self.offloading == "none" else offload.on_device(module, self.device)

    def encode(
        self, t5: nnx.Module, clip: nnx.Module, t5_ids: Sequence[np.ndarray], clip_ids: Sequence[np.ndarray]
    ) -> list[tuple[jax.Array, jax.Array]]:
        """(text [1, t, d], pooled [1, p]) of each prompt, from its ids int32 [1, t] and [1, p]."""
        if self.offloading != "layers":
            t5, clip = self.on_device(t5), self.on_device(clip)
            return [self.run("text", programs.encode, t5, clip, *ids) for ids in zip(t5_ids, clip_ids, strict=True)]
        texts = self.run("text", offload.encode_by_layers, t5, t5_ids, self.device)
        clip = self.on_device(clip)
        return [(text, self.run("text", programs.pool, clip, ids)) for text, ids in zip(texts, clip_ids, strict=True)]

    def decode(
        self, vae: nnx.Module, drawn: Sequence[jax.Array | np.ndarray], rows: int, columns: int
    ) -> list[np.ndarray]:
        """Pixels float32 [h, w, 3] of each picture's latents [i, c]. UserError for a picture that is not finite."""
        vae, sizes = self.on_device(vae), {"rows": rows, "columns": columns}
        compiled = functools.partial(self._compile, "decode", programs.decode, vae, drawn[0], **sizes)
        program = compiled(strip_bytes=STRIP_BYTES if self.vae_tiling == "on" else None)
        if self.vae_tiling == "auto" and self.shortage(program):
            program = compiled(strip_bytes=STRIP_BYTES)
        run = self._watching("decode", program)
        pictures = [np.asarray(run(vae, x)) for x in drawn]
        for number, (picture, latents) in enumerate(zip(pictures, drawn, strict=True), 1):
            if not np.isfinite(picture).all():
                raise UserError(_not_finite(f"Picture {number} of {len(pictures)}", vae, latents))
        return pictures


def _not_finite(which: str, vae: nnx.Module, latents: jax.Array | np.ndarray) -> str:
    """What a picture of NaN may come from."""
    if not np.isfinite(np.asarray(latents)).all():
        return f"{which} cannot be decoded: its latents are not finite."
    dtype = jax.tree.leaves(nnx.state(vae))[0].dtype
    damaged = "the VAE's weights may be damaged, copy or convert the checkpoint again"
    hint = damaged if dtype == np.float32 else f"try dtype float32; if that does not help, {damaged}"
    return f"{which} came out of the VAE with values that are not finite ({dtype}); {hint}."
