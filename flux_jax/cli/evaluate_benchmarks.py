"""`python -m flux_jax.evaluate geneval | t2i-compbench | parti`: pictures for the official evaluators.

In: a benchmark's prompt file, a model (see `flux_jax.evaluate.models`), how to sample. Out: the folder that the
benchmark's evaluator reads (`flux_jax.evaluate.benchmarks` has the layouts); progress and the time left on stderr.
"""

import argparse
import functools
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_jax import validation
from flux_jax.cli.main import check_device, path
from flux_jax.cli.sampling_arguments import add_sampling, sampling_of
from flux_jax.errors import UserError, shortened
from flux_jax.evaluate import benchmarks, image_folders
from flux_jax.evaluate.benchmarks import CATEGORIES, IMAGES, Picture, Prompt
from flux_jax.evaluate.geneval import TAGS
from flux_jax.evaluate.models import Variant
from flux_jax.evaluate.render_prompts import painter, recorder
from flux_jax.io import locks, reading

MOST = 1_000_000  # pictures of a prompt, prompts, devices
Split = Callable[[list[Prompt]], list[Prompt]]  # prompts -> this shard's
Layout = Callable[[list[Prompt], int, int], list[Picture]]  # prompts, pictures of each, first seed


@dataclass(frozen=True)
class Folder:
    """A folder of pictures: what its run.json says beside the run's own settings, this shard's pictures."""

    out: Path
    settings: dict[str, Any]
    mine: list[Picture]


def add_commands(commands) -> None:
    """The three subcommands, on argparse's list of them."""
    geneval = commands.add_parser("geneval", help=f"GenEval's folder: {sum(TAGS.values())} prompts, 4 pictures each")
    geneval.add_argument("--metadata", type=path, required=True, help="GenEval's evaluation_metadata.jsonl")
    t2i = commands.add_parser("t2i-compbench", help="T2I-CompBench's folders: 300 prompts a category, 10 pictures each")
    t2i.add_argument("--category", required=True, help=f"all, or one of {', '.join(CATEGORIES)}")
    t2i.add_argument("--prompts", type=path, required=True, help="its CATEGORY_val.txt; for all: the folder of these")
    parti = commands.add_parser("parti", help="PartiPrompts, in GenEval's layout: 1632 prompts, a picture each")
    parti.add_argument("--prompts", type=path, required=True, help="PartiPrompts.tsv")
    for name, parser, plan in (
        ("geneval", geneval, _plan_geneval),
        ("t2i-compbench", t2i, _plan_t2i),
        ("parti", parti, _plan_parti),
    ):
        add = parser.add_argument
        add("--out", type=path, required=True, help="the folder; the same command again goes on where it stopped")
        add_sampling(parser, steps=None)
        add("--seed", type=int, default=benchmarks.SEED, help="picture k of every prompt has SEED + k (%(default)s)")
        add("--images", type=int, default=IMAGES[name], help="pictures of a prompt (%(default)s)")
        add("--subset", type=int, metavar="N", help="N prompts only, always the same, tags in proportion")
        add("--shard", default="1/1", metavar="I/N", help="the I-th of N parts of the prompts, one for each machine")
        add("--devices", type=int, metavar="N", help="devices of this machine to use (default: all)")
        add("--dry-run", action="store_true", help="say what would be made, and make nothing")
        parser.set_defaults(run=run, plan=plan)


def run(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Makes the pictures that the arguments ask for; returns the report that --json prints."""
    for name in ("images", "subset", "devices"):
        if (count := getattr(args, name)) is not None and not 1 <= count <= MOST:
            raise UserError(f"--{name} must be from 1 to {MOST}, not {shortened(count)}.")
    part, parts = read_shard(args.shard)
    variant = Variant.parse(args.model)
    sampling = sampling_of(args, variant)
    validation.check_seeds([args.seed, args.seed + args.images - 1])
    folders: list[Folder] = args.plan(args, lambda prompts: benchmarks.shard(prompts, part, parts))
    settings = {"benchmark": args.what, "model": variant.identity(), "sampling": sampling, "seed": args.seed}
    report = {"model": str(variant), "folders": [], "planned": 0, "there": 0, "made": 0}
    for folder in folders:
        left = len(image_folders.missing(folder.mine, folder.out))
        report["folders"].append(str(folder.out))
        report["planned"] += len(folder.mine)
        report["there"] += len(folder.mine) - left
        if not args.dry_run:
            image_folders.stamp(folder.out, settings | folder.settings)
    say(f"{report['planned']} pictures, {report['there']} of them there already.")
    if args.dry_run or report["planned"] == report["there"]:
        for folder in folders if not args.dry_run else ():
            locks.sweep(folder.out)
        return report

    import jax

    from flux_jax.runtime import compilation_cache

    check_device(args.device)
    compilation_cache.enable()
    devices = jax.local_devices()[: args.devices]
    say(f"{variant} on {len(devices)} x {devices[0].device_kind} ({devices[0].platform}).")
    draw = functools.cache(painter(variant, sampling))  # a model is loaded once for all folders of a run
    record = recorder(variant, sampling, devices[0])
    for folder in folders:
        report["made"] += image_folders.make(folder.mine, folder.out, draw, record, devices)
        locks.sweep(folder.out)
    return report


def read_shard(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8)."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--shard must read I/N with I from 1 to N, such as 1/4, not {shortened(text)}.")
    return int(found[1]), int(found[2])


def _digest(file: Path) -> str:
    return hashlib.sha256(reading.read_bytes(file, most=reading.LARGE)).hexdigest()


def _planned(
    args: argparse.Namespace, split: Split, layout: Layout, prompts: list[Prompt], source: Path, out: Path, **own: str
) -> Folder:
    mine = split(benchmarks.subset(prompts, args.subset))
    settings = {"prompts": _digest(source), "images": args.images, **own}
    return Folder(out, settings, layout(mine, args.images, args.seed))


def _plan_geneval(args: argparse.Namespace, split: Split) -> list[Folder]:
    prompts = benchmarks.read_geneval(args.metadata)
    return [_planned(args, split, benchmarks.folder_pictures, prompts, args.metadata, args.out)]


def _plan_parti(args: argparse.Namespace, split: Split) -> list[Folder]:
    prompts = benchmarks.read_parti(args.prompts)
    return [_planned(args, split, benchmarks.folder_pictures, prompts, args.prompts, args.out)]


def _plan_t2i(args: argparse.Namespace, split: Split) -> list[Folder]:
    if args.category != "all" and args.category not in CATEGORIES:
        known = ", ".join(CATEGORIES)
        raise UserError(f"Unknown category {shortened(args.category)}; T2I-CompBench has {known} (or: all).")
    if args.category != "all":
        sources = {args.category: (args.prompts, args.out)}
    else:
        sources = {name: (args.prompts / f"{name}_val.txt", args.out / name) for name in CATEGORIES}
    folders = []
    for category, (source, out) in sources.items():
        prompts = benchmarks.read_t2i_compbench(source, args.images)
        folders.append(_planned(args, split, benchmarks.t2i_pictures, prompts, source, out, category=category))
    return folders
