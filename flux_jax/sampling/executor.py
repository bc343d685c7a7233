"""How a pipeline's programs run: each stage timed, its weights where they are needed, its memory kept down as asked.

In: modules of a pipeline, token ids, latents [i, c]. Out: text [1, t, d] and pooled [1, p], pixels [h, w, 3], the
seconds of each stage. A stage that runs out of memory says so in one sentence, with the flag that helps.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from flux_jax.models.params import placement_of
from flux_jax.models.vae_tiling import STRIP_BYTES
from flux_jax.runtime import memory
from flux_jax.sampling import offload, programs


class StageExecutor:
    """One call of a pipeline. `seconds`: by stage, compilation apart, and the number of steps.

    offloading: a mode of `flux_jax.sampling.offload`. vae_tiling: decode in strips "on", "off", or "auto", where whole
    pictures would not fit into the device's free memory.
    """

    def __init__(self, offloading: str = "none", vae_tiling: str = "auto"):
        self.offloading, self.vae_tiling = offloading, vae_tiling
        self.seconds = dict.fromkeys(("compile", "text", "denoise", "decode", "steps"), 0.0)
        self.device = placement_of(None, "", ())

    def run(self, stage: str, program: Any, *args):
        """What `program` returns. One made by jax.jit is compiled ahead of its call, which then finds it ready.
        UserError with exit code 4 where it runs out of memory."""
        try:
            if hasattr(program, "lower") and (short := self.shortage(self.compile(program, *args))):
                raise MemoryError(short)
            start = time.perf_counter()
            result = jax.block_until_ready(program(*args))
        except (MemoryError, RuntimeError) as error:
            if not memory.is_exhausted(error):
                raise
            flags = memory.flags_for(stage, self.offloading, self.vae_tiling)
            reason = str(error) if isinstance(error, MemoryError) else ""
            raise memory.exhausted(memory.STAGES[stage] + reason, flags) from error
        self.seconds[stage] += time.perf_counter() - start
        return result

    def compile(self, program: Any, *args) -> jax.stages.Compiled:
        """The program that `program`, made by jax.jit, runs for these arguments."""
        start = time.perf_counter()
        compiled = program.lower(*args).compile()
        self.seconds["compile"] += time.perf_counter() - start
        return compiled

    def shortage(self, compiled: jax.stages.Compiled) -> str:
        """What a program needs beside its arguments and what is free on the device, in words; "" where that is enough.
        Known before it runs: on a CPU the system would rather kill the process than refuse the memory."""
        found, free = compiled.memory_analysis(), memory.free(next(iter(self.device.device_set)))
        if found is None or free is None:
            return ""
        needed = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        return "" if needed <= free else f" ({needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free)"

    def lend(self, module: nnx.Module) -> nnx.Module:
        """A component where programs run: there for good, or until the last reference to what is returned has gone."""
        return module if self.offloading == "none" else offload.lend(module, self.device)

    def encode(
        self, t5: nnx.Module, clip: nnx.Module, t5_ids: Sequence[np.ndarray], clip_ids: Sequence[np.ndarray]
    ) -> list[tuple[jax.Array, jax.Array]]:
        """(text [1, t, d], pooled [1, p]) of each prompt, from its ids int32 [1, t] and [1, p]."""
        if self.offloading != "layers":
            t5, clip = self.lend(t5), self.lend(clip)
            return [self.run("text", programs.encode, t5, clip, *ids) for ids in zip(t5_ids, clip_ids, strict=True)]
        texts = self.run("text", offload.encode_by_layers, t5, t5_ids, self.device)
        clip = self.lend(clip)
        return [(text, self.run("text", programs.pool, clip, ids)) for text, ids in zip(texts, clip_ids, strict=True)]

    def decode(self, vae: nnx.Module, drawn: Sequence[jax.Array], rows: int, columns: int) -> list[np.ndarray]:
        """Pixels float32 [h, w, 3] of each picture's latents [i, c]."""
        vae = self.lend(vae)
        strips = STRIP_BYTES if self.vae_tiling == "on" else None
        if self.vae_tiling == "auto":
            whole = self.compile(programs.decode, vae, drawn[0], rows, columns, None)
            if self.shortage(whole):
                strips = STRIP_BYTES
        return [np.asarray(self.run("decode", programs.decode, vae, x, rows, columns, strips)) for x in drawn]
