"""diffusers' FLUX transformer in torch, eager or compiled: what a user of this GPU has today, measured the same way.

In: a `FluxConfig` and numbers of steps. Out: the same figures as `bench.denoise.trial` gives. Needs torch with CUDA,
and diffusers; weights are random and made on the device.
"""

import itertools
import time
from typing import Any

import numpy as np

from bench import power
from flux_jax.config import FluxConfig
from flux_jax.errors import UserError
from flux_jax.sampling.schedule import position_ids, sigmas


def trial(compiled: bool, config: FluxConfig, steps: list[int], samples: int, tiny: bool) -> dict[str, Any]:
    """Seconds of a picture for each number of steps, peak memory, joules. UserError without torch, diffusers, CUDA."""
    try:
        import torch  # noqa: TID251 - a benchmark compares with it where it is there
        from diffusers import FluxTransformer2DModel  # noqa: TID251
    except ImportError as error:
        raise UserError(f"{error.name} is not installed") from None
    if not torch.cuda.is_available() and not tiny:
        raise UserError("torch finds no GPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes, text = config.transformer, config.sampling.max_sequence_length
    rows, columns = config.default_grid
    with torch.device(device), torch.inference_mode():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        model = FluxTransformer2DModel(
            in_channels=sizes.in_channels,
            num_layers=sizes.num_double_blocks,
            num_single_layers=sizes.num_single_blocks,
            attention_head_dim=sizes.head_dim,
            num_attention_heads=sizes.num_heads,
            joint_attention_dim=sizes.text_dim,
            pooled_projection_dim=sizes.pooled_dim,
            guidance_embeds=sizes.guidance_embeds,
            axes_dims_rope=sizes.axes_dim,
        ).eval()
        run = torch.compile(model, fullgraph=True) if compiled else model
        ids = torch.from_numpy(position_ids(rows, columns, text)).to(device)
        conditions = {
            "guidance": torch.full((1,), 3.5),
            "pooled_projections": torch.randn(1, sizes.pooled_dim),
            "encoder_hidden_states": torch.randn(1, text, sizes.text_dim),
            "txt_ids": ids[:text].bfloat16(),
            "img_ids": ids[text:].bfloat16(),
            "return_dict": False,
        }

        def wait() -> None:
            if device == "cuda":
                torch.cuda.synchronize()

        def picture(levels: np.ndarray) -> Any:
            latents = torch.randn(1, rows * columns, sizes.in_channels, dtype=torch.float32)
            for now, after in itertools.pairwise(levels):
                (v,) = run(latents.bfloat16(), timestep=torch.full((1,), float(now)), **conditions)
                latents = latents + float(after - now) * v.float()
            wait()
            return latents

        start = time.perf_counter()
        picture(sigmas(config.sampling, 1, rows * columns))
        first, pictures = time.perf_counter() - start, []
        for count in steps:
            levels = sigmas(config.sampling, count, rows * columns)
            picture(levels)
            seconds, before = [], power.joules()
            for _ in range(samples):
                start = time.perf_counter()
                finite = bool(torch.isfinite(picture(levels)).all())
                seconds.append(time.perf_counter() - start)
            joules = power.since(before, samples)
            pictures.append({"steps": count, "seconds": seconds, "joules": joules, "finite": finite})
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"compile_seconds": first, "peak_bytes": peak, "pictures": pictures}
