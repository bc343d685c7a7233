"""How near a student's velocities and latents are to its teacher's, on prompts that no training used.

    python -m flux_jax.distill.compare TEACHER STUDENT... --prompts FILE... [--rounded] [--count N]

In: checkpoints with the same config. Out: for each student the relative squared error of the velocity at each noise
level of the teacher's own trajectories, and the peak signal-to-noise ratio of the latents that it samples itself, from
the same noise, against the teacher's: 10 log10(p^2 / mean squared difference), p the range of the teacher's latents.
Lines for people on stderr, one JSON object on stdout.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flux_jax import prompts
from flux_jax.cli import Parser
from flux_jax.errors import UserError

BATCH = 8


def compare(
    teacher: Any, students: dict[str, Any], chunks: list[tuple], sigmas: Any, rope: Any, guidance: float
) -> dict:
    """Name -> {"velocity": relative squared error by step, "psnr": decibel} of each student (a transformer). chunks:
    (noise [b, i, c], text [b, t, d], pooled [b, p]) of some pictures each."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from flux_jax.distill.trajectories import follow

    @functools.partial(jax.jit, static_argnames="steps")
    def velocities(transformer, x, text, pooled, sigmas, rope, steps):
        """x [b, s, i, c] -> the velocity at each point, float32."""

        def one(_, points):
            x, sigma = points
            levels, scales = jnp.full(x.shape[:1], sigma), jnp.full(x.shape[:1], guidance)
            modulation = transformer.modulation(levels, scales, pooled)
            return None, transformer(x.astype(text.dtype), text, modulation, rope).astype(jnp.float32)

        return jnp.moveaxis(jax.lax.scan(one, None, (jnp.moveaxis(x, 1, 0), sigmas[:steps]))[1], 0, 1)

    def end(points) -> np.ndarray:
        x, v = (np.asarray(a, np.float32) for a in points)
        return x[:, -1] + (sigmas[-1] - sigmas[-2]) * v[:, -1]

    steps = len(sigmas) - 1
    wrong = {name: np.zeros(steps) for name in students}
    differences: dict[str, list] = {name: [] for name in students}
    power, ends = np.zeros(steps), []
    for noise, text, pooled in chunks:
        given = (text, pooled, np.float32(guidance), sigmas, rope)
        theirs = follow(teacher, noise, *given, False)
        ends.append(end(theirs))
        expected = np.asarray(theirs[1], np.float64)
        power += np.square(expected).sum((0, 2, 3))
        for name, student in students.items():
            found = np.asarray(velocities(student, theirs[0], text, pooled, sigmas, rope, steps), np.float64)
            wrong[name] += np.square(found - expected).sum((0, 2, 3))
            differences[name].append(end(follow(student, noise, *given, False)) - ends[-1])
    latents = np.concatenate(ends)
    span = float(latents.max() - latents.min())
    return {
        name: {
            "velocity": [float(e / p) for e, p in zip(wrong[name], power, strict=True)],
            "velocity_mean": float(wrong[name].sum() / power.sum()),
            "psnr": 10 * math.log10(span**2 / max(1e-12, float(np.square(np.concatenate(d)).mean()))),
        }
        for name, d in differences.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison and returns the exit status; a user's mistake is one sentence on stderr and status 2."""
    parser = Parser(
        prog="python -m flux_jax.distill.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("teacher", metavar="TEACHER")
    add("students", nargs="*", metavar="STUDENT")
    add("--prompts", type=Path, nargs="+", required=True, metavar="FILE", help="only the held-out ones are used")
    add("--count", type=int, default=32, help="pictures (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--rounded", action="store_true", help="compare also the teacher rounded without training")
    add("--activations", choices=("bf16", "int8"), help="of the students (default: as their manifests say)")
    try:
        print(json.dumps(run(parser.parse_args(argv))))
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The comparison of checkpoints that the command line asks for."""
    import jax.numpy as jnp
    import numpy as np

    from flux_jax import cache, denoise, quantize, sampling
    from flux_jax.checkpoint import Checkpoint
    from flux_jax.distill.trajectories import noises
    from flux_jax.models.attention import rotary
    from flux_jax.pipeline import resolve_dtype
    from flux_jax.tokenizers import Tokenizers

    texts = prompts.split(prompts.read_all(args.prompts))[1]
    if not texts or args.count < 1:
        raise UserError(
            "None of these prompts is held out (one in 16 is, by its hash): give more, and --count above 0."
        )
    if not args.students and not args.rounded:
        raise UserError("Nothing to compare: name a student, or give --rounded.")
    stored, dtype = Checkpoint.open(args.teacher), resolve_dtype("auto")
    cache.enable()
    config, defaults = stored.config, stored.config.sampling
    students = {}
    for name in args.students:
        one = Checkpoint.open(name).using(args.activations)
        if one.config != config:
            raise UserError(f"{name} is no student of {args.teacher}: their configs differ.")
        students[str(name)] = one.load("transformer", dtype)
    teacher = stored.load("transformer", dtype)
    if args.rounded:
        students["rounded"] = quantize.quantize_transformer(teacher, activations=args.activations or "bf16")
    t5, clip = (stored.load(part, dtype) for part in ("t5", "clip"))
    tokenizers = Tokenizers.load(stored.tokenizers, config)
    ids = sampling.position_ids(*config.default_grid, defaults.max_sequence_length)
    rope = jnp.asarray(rotary(ids, config.transformer.axes_dim, float(config.transformer.theta)))
    sigmas = sampling.sigmas(defaults, defaults.num_inference_steps, math.prod(config.default_grid))
    chunks = []
    for start in range(0, args.count, BATCH):
        some = [texts[i % len(texts)] for i in range(start, min(start + BATCH, args.count))]
        pairs = [denoise.encode(t5, clip, tokenizers.t5([text]), tokenizers.clip([text])) for text in some]
        indices = np.arange(start, start + len(some), dtype=np.int32)
        noise = noises(np.uint32(args.seed), indices, *config.default_grid, config.vae.latent_channels)
        chunks.append((noise, *(jnp.concatenate(each) for each in zip(*pairs, strict=True))))
    found = compare(teacher, students, chunks, sigmas, rope, defaults.guidance_scale)
    for name, result in found.items():
        line = f"velocity error {result['velocity_mean']:.4f}, latent PSNR {result['psnr']:.2f} dB"
        print(f"{name}: {line}", file=sys.stderr)
    return {"teacher": str(args.teacher), "pictures": args.count, "sigmas": sigmas.tolist(), "students": found}


if __name__ == "__main__":
    sys.exit(main())
