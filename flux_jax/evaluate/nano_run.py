"""`python -m flux_jax.evaluate nano`: one model's score on FLUX-nano's captions, or two models', paired.

In: one model, or two. Out: OUT/ as `flux_jax.evaluate.nano` fills it; with --against OUT/model/ and OUT/against/, and
beside them `paired.json` (differences, captions that flipped) and `flipped.png` (these captions' pictures). Tables on
stderr.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flux_jax import images
from flux_jax.errors import UserError
from flux_jax.evaluate import making
from flux_jax.evaluate.models import Variant


def add_command(commands) -> None:
    parser = commands.add_parser("nano", help="FLUX-nano on 553 held-out captions, judged by its oracle")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for pictures, verdicts.jsonl and summary.json")
    making.add_sampling(parser, steps=28)
    add("--against", metavar="MODEL", help="a second model: the same captions and seeds, and the differences to it")
    add("--dtype", choices=("auto", "float32", "bfloat16"), help="of a model that has no @dtype= of its own")
    add("--seed", type=int, default=0, help="picture i has seed SEED + i (default: %(default)s)")
    add("--every", type=int, default=1, help="only each N-th caption (default: all 553)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Draws what is missing, judges, prints; returns the report that --json prints."""
    if args.every < 1:
        raise UserError(f"--every must be at least 1, not {args.every}.")
    from flux_jax import cache
    from flux_jax.evaluate import folders, nano, paired

    names = [args.model] if args.against is None else [args.model, args.against]
    variants = [Variant.parse(name).otherwise(dtype=args.dtype) for name in names]
    sampling = making.same_sampling(args, variants)
    outs = [args.out] if args.against is None else [args.out / "model", args.out / "against"]
    for out, variant in zip(outs, variants, strict=True):
        folders.stamp(out, {"benchmark": "nano", "model": variant.identity(), "sampling": sampling, "seed": args.seed})
    cache.enable()
    reports, verdicts = [], []
    for out, variant in zip(outs, variants, strict=True):
        with variant.tracing():
            result = nano.evaluate(variant.load(), out, seed=args.seed, every=args.every, **sampling)
        reports.append({"model": str(variant)} | result)
        verdicts.append([json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()])
        say(f"{variant}\n{nano.table(result)}")
    if args.against is None:
        return reports[0]
    result = paired.compare(*verdicts)
    report = {"model": reports[0], "against": reports[1], "paired": result}
    images.write_whole(args.out / "paired.json", (json.dumps(report, indent=1) + "\n").encode(), overwrite=True)
    if picture := paired.flip_sheet(result["flipped"], *outs):
        images.write_whole(args.out / "flipped.png", nano.png(picture), overwrite=True)
    say(f"{variants[0]} minus {variants[1]}\n{paired.table(result)}")
    return report
