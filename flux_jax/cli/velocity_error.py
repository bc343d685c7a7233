"""How near a student's velocities and latents are to its teacher's, on prompts that no training used.

    python -m flux_jax.distill.compare TEACHER STUDENT... --prompts FILE... [--rounded] [--count N]

In: checkpoints with the same config. Out: for each student the relative squared error of the velocity at each noise
level of the teacher's own trajectories, and the peak signal-to-noise ratio of the latents that it samples itself, from
the same noise, against the teacher's: 10 log10(p^2 / mean squared difference), p the range of the teacher's latents.
Lines for people on stderr, one JSON object on stdout.
"""

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flux_jax import validation
from flux_jax.cli.main import Parser, expanded, guarded, output_json, path, program, say, whole
from flux_jax.errors import UserError
from flux_jax.io import prompts
from flux_jax.runtime.environment import start_jax

if TYPE_CHECKING:
    from flux_jax.checkpoints.checkpoint import Checkpoint

BATCH = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison and returns the exit status; a user's mistake is one sentence on stderr and status 2."""
    return guarded(run, argv)


def build_parser() -> Parser:
    parser = Parser(
        prog=program("distill.compare"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("teacher", type=expanded, metavar="TEACHER")
    add("students", type=expanded, nargs="*", metavar="STUDENT")
    add("--prompts", type=path, nargs="+", required=True, metavar="FILE", help="only the held-out ones are used")
    add("--count", type=whole(1, 10**6), default=32, help="pictures (default: %(default)s)")
    add("--seed", type=whole(0, validation.SEED_LIMIT - 1), default=0)
    add("--rounded", action="store_true", help="compare also the teacher rounded without training")
    add("--activations", choices=validation.ACTIVATIONS, help="of the students (default: as their manifests say)")
    return parser


def run(argv: Sequence[str]) -> None:
    """Compares the checkpoints that the command line asks for, and prints what was found."""
    args = build_parser().parse_args(argv)
    texts = prompts.split(prompts.read_all(args.prompts))[1]
    if not texts:
        raise UserError("None of these prompts is held out (one in 16 is, by its hash): give more.")
    if not args.students and not args.rounded:
        raise UserError("Nothing to compare: name a student, or give --rounded.")
    start_jax()
    import jax.numpy as jnp

    from flux_jax.checkpoints.checkpoint import Checkpoint
    from flux_jax.distill.velocity_error import compare
    from flux_jax.models import quantize
    from flux_jax.runtime import compilation_cache
    from flux_jax.runtime.environment import resolve_dtype
    from flux_jax.sampling import schedule

    stored, dtype = Checkpoint.open(args.teacher), resolve_dtype("auto")
    compilation_cache.enable()
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
    rope = jnp.asarray(schedule.rope_table(config.transformer, *config.default_grid, defaults.max_sequence_length))
    sigmas = schedule.sigmas(defaults, defaults.num_inference_steps, math.prod(config.default_grid))
    batches = batches_of([texts[i % len(texts)] for i in range(args.count)], stored, args.seed, dtype)
    found = compare(teacher, students, batches, sigmas, rope, defaults.guidance_scale)
    for name, result in found.items():
        line = f"velocity error {result['velocity_mean']:.4f}, latent PSNR {result['psnr']:.2f} dB"
        say(f"{name}: {line}")
    about = {"teacher": str(args.teacher), "pictures": args.count, "sigmas": sigmas.tolist(), "students": found}
    output_json(about)


def batches_of(texts: Sequence[str], stored: "Checkpoint", seed: int, dtype: Any) -> list[tuple[Any, ...]]:
    """(noise [b, i, c], text [b, t, d], pooled [b, p]) of `BATCH` prompts at a time; prompt i has the seed's i-th
    noise."""
    import jax.numpy as jnp
    import numpy as np

    from flux_jax.checkpoints.tokenizers import Tokenizers
    from flux_jax.distill.trajectories import encode_each, noises

    config = stored.config
    t5, clip = (stored.load(component, dtype) for component in ("t5", "clip"))
    tokenizers = Tokenizers.load(stored.tokenizers, config)
    batches = []
    for start in range(0, len(texts), BATCH):
        some = texts[start : start + BATCH]
        pairs = encode_each(t5, clip, tokenizers, some)
        indices = np.arange(start, start + len(some), dtype=np.int32)
        noise = noises(np.uint32(seed), indices, *config.default_grid, config.vae.latent_channels)
        batches.append((noise, *(jnp.concatenate(each) for each in zip(*pairs, strict=True))))
    return batches
