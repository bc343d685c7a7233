"""`python -m flux_jax.evaluate nano`: a model's score on FLUX-nano's captions, or several models', paired with another.

In: one model, or several and one --against which they are measured. Out: OUT/ as `flux_jax.evaluate.nano` fills it;
with --against such folders OUT/against, OUT/model, OUT/model-2 ..., and beside them `table.md` (scores and differences,
as the paper's tables have them), `paired.json` (the same and the captions that flipped), `flipped.png`, `flipped-2.png`
... (these captions' pictures). Tables on stderr.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flux_jax.cli.sampling_arguments import add_sampling, same_sampling
from flux_jax.errors import UserError
from flux_jax.evaluate.models import Variant
from flux_jax.io import atomic


def add_command(commands) -> None:
    parser = commands.add_parser("nano", help="FLUX-nano on 553 held-out captions, judged by its oracle")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for pictures, verdicts.jsonl and summary.json")
    add("--model", nargs="+", default=["nano"], help="checkpoint or alias, with options: nano@dtype=float32 (nano)")
    add_sampling(parser, steps=28, model=False)
    add("--against", metavar="MODEL", help="one more model: the same captions and seeds, and the differences to it")
    add("--dtype", choices=("auto", "float32", "bfloat16"), help="of a model that has no @dtype= of its own")
    add("--seed", type=int, default=0, help="picture i has seed SEED + i (default: %(default)s)")
    add("--every", type=int, default=1, help="only each N-th caption (default: all 553)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Draws what is missing, judges, prints; returns the report that --json prints."""
    if args.every < 1:
        raise UserError(f"--every must be at least 1, not {args.every}.")
    from flux_jax.evaluate import image_folders, nano, paired
    from flux_jax.runtime import compilation_cache

    if len(args.model) > 1 and args.against is None:
        raise UserError("Several models need --against: the one that they are compared with.")
    names = args.model if args.against is None else [*args.model, args.against]
    variants = [Variant.parse(name).otherwise(dtype=args.dtype) for name in names]
    sampling = same_sampling(args, variants)
    numbers = ["", *(f"-{i}" for i in range(2, len(names)))]  # of models and their sheets; the first has none
    outs = [args.out] if args.against is None else [args.out / f"model{n}" for n in numbers] + [args.out / "against"]
    for out, variant in zip(outs, variants, strict=True):
        image_folders.stamp(
            out, {"benchmark": "nano", "model": variant.identity(), "sampling": sampling, "seed": args.seed}
        )
    compilation_cache.enable()
    reports, verdicts = [], []
    for out, variant in zip(outs, variants, strict=True):
        with variant.tracing():
            result = nano.evaluate(variant.load(), out, seed=args.seed, every=args.every, **sampling)
        reports.append({"model": variant.label()} | result)
        verdicts.append([json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()])
        say(f"{variant}\n{nano.table(result)}")
    if args.against is None:
        return reports[0]
    results = [paired.compare(each, verdicts[-1]) for each in verdicts[:-1]]
    report = {"models": reports[:-1], "against": reports[-1], "paired": results}
    atomic.write_whole(args.out / "paired.json", (json.dumps(report, indent=1) + "\n").encode(), overwrite=True)
    atomic.write_whole(args.out / "table.md", paired.page(**report).encode(), overwrite=True)
    for variant, result, out, number in zip(variants, results, outs, numbers, strict=False):
        if picture := paired.flip_sheet(result["flipped"], out, outs[-1]):
            atomic.write_whole(args.out / f"flipped{number}.png", nano.png(picture), overwrite=True)
        say(f"{variant} minus {variants[-1]}\n{paired.table(result)}")
    return report
