"""`python -m flux_jax.evaluate nano --model nano-bf16 --out DIR`: table on stderr, with --json an object on stdout."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flux_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one evaluation and returns the exit status; a user's mistake is one sentence on stderr and status 2 or 3."""
    parser = argparse.ArgumentParser(prog="python -m flux_jax.evaluate")
    nano = parser.add_subparsers(required=True, metavar="WHAT").add_parser(
        "nano", help="FLUX-nano on 553 held-out captions, judged by its oracle"
    )
    add = nano.add_argument
    add("--model", default="nano-bf16", help="checkpoint folder or alias (default: %(default)s)")
    add("--out", type=Path, required=True, help="folder for pictures, verdicts.jsonl and summary.json")
    add("--steps", type=int, default=28, help="denoising steps (default: %(default)s)")
    add("--guidance", type=float, help="guidance scale (default: the model's)")
    add("--seed", type=int, default=0, help="picture i has seed SEED + i (default: %(default)s)")
    add("--every", type=int, default=1, help="only each N-th caption (default: all 553)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    add("--json", action="store_true", help="print one JSON object on stdout")
    args = parser.parse_args(argv)
    try:
        if args.every < 1:
            raise UserError(f"--every must be at least 1, not {args.every}.")
        return run(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def run(args: argparse.Namespace) -> int:
    from flux_jax import cache
    from flux_jax.evaluate import nano
    from flux_jax.pipeline import FluxPipeline

    cache.enable()
    pipe = FluxPipeline.from_pretrained(args.model, dtype=args.dtype)
    sampling = {"num_inference_steps": args.steps}
    sampling["guidance_scale"] = pipe.config.sampling.guidance_scale if args.guidance is None else args.guidance
    result = {"model": str(args.model)} | nano.evaluate(pipe, args.out, seed=args.seed, every=args.every, **sampling)
    print(nano.table(result), file=sys.stderr)
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
