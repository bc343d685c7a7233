"""`python -m flux_jax.evaluate nano`: a model's score on FLUX-nano's captions, or several models', paired with another.

In: one model, or several and one --against which they are measured. Out: OUT/ as `flux_jax.evaluate.nano` fills it;
with --against such folders OUT/against, OUT/model, OUT/model-2 ..., and beside them `table.md` (scores and differences,
as the paper's tables have them), `paired.json` (the same and the captions that flipped), `flipped.png`, `flipped-2.png`
... (these captions' pictures). Tables on stderr.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flux_jax.cli.main import expanded, path
from flux_jax.cli.sampling_arguments import add_sampling, same_sampling
from flux_jax.errors import UserError
from flux_jax.evaluate.models import Variant
from flux_jax.io import atomic
from flux_jax.nano.captions import EVALUATION_COUNT


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model of the run: where its pictures go, and what its other files' names end in."""

    variant: Variant
    out: Path
    suffix: str = ""


def add_command(commands) -> None:
    """The subcommand `nano`, on argparse's list of them."""
    count = EVALUATION_COUNT
    parser = commands.add_parser("nano", help=f"FLUX-nano on {count} held-out captions, judged by its oracle")
    add = parser.add_argument
    add("--out", type=path, required=True, help="folder for pictures, verdicts.jsonl and summary.json")
    named = "checkpoint or alias, with options: nano@dtype=float32 (nano)"
    add("--model", nargs="+", type=expanded, default=["nano"], help=named)
    add_sampling(parser, steps=28, model=False)
    other = "one more model: the same captions and seeds, and the differences to it"
    add("--against", type=expanded, metavar="MODEL", help=other)
    add("--dtype", choices=("auto", "float32", "bfloat16"), help="of a model that has no @dtype= of its own")
    add("--seed", type=int, default=0, help="picture i has seed SEED + i (default: %(default)s)")
    add("--every", type=int, default=1, help=f"only each N-th caption (default: all {count})")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Draws what is missing, judges, prints; returns the report that --json prints."""
    if args.every < 1:
        raise UserError(f"--every must be at least 1, not {args.every}.")
    from flux_jax.evaluate import image_folders, nano, paired
    from flux_jax.runtime import compilation_cache, environment

    entries = plan(args)
    sampling = same_sampling(args, [entry.variant for entry in entries])
    for entry in entries:
        settings = {"benchmark": "nano", "model": entry.variant.identity(), "sampling": sampling, "seed": args.seed}
        image_folders.stamp(entry.out, settings)
    environment.start_jax()
    compilation_cache.enable()
    reports, verdicts = [], []
    for entry in entries:
        with entry.variant.tracing():
            result = nano.evaluate(entry.variant.load(), entry.out, seed=args.seed, every=args.every, **sampling)
        reports.append({"model": entry.variant.label()} | result)
        verdicts.append(nano.verdicts(entry.out))
        say(f"{entry.variant}\n{nano.table(result)}")
    if args.against is None:
        return reports[0]
    *models, against = entries
    results = [paired.compare(rows, verdicts[-1]) for rows in verdicts[:-1]]
    report = {"models": reports[:-1], "against": reports[-1], "paired": results}
    atomic.write_whole(args.out / "paired.json", (json.dumps(report, indent=1) + "\n").encode(), overwrite=True)
    atomic.write_whole(args.out / "table.md", paired.page(**report).encode(), overwrite=True)
    for entry, result in zip(models, results, strict=True):
        if picture := paired.flip_sheet(result["flipped"], entry.out, against.out):
            atomic.write_whole(args.out / f"flipped{entry.suffix}.png", nano.png(picture), overwrite=True)
        say(f"{entry.variant} minus {against.variant}\n{paired.table(result)}")
    return report


def plan(args: argparse.Namespace) -> list[Entry]:
    """The models in their order; with --against, that one last. Of several, the second one's files end in "-2"."""
    if len(args.model) > 1 and args.against is None:
        raise UserError("Several models need --against: the one that they are compared with.")

    def variant(name: str) -> Variant:
        return Variant.parse(name).otherwise(dtype=args.dtype)

    entries = []
    for number, name in enumerate(args.model, 1):
        suffix = "" if number == 1 else f"-{number}"
        out = args.out if args.against is None else args.out / f"model{suffix}"
        entries.append(Entry(variant(name), out, suffix))
    if args.against is not None:
        entries.append(Entry(variant(args.against), args.out / "against"))
    return entries
