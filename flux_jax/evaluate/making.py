"""`python -m flux_jax.evaluate geneval | t2i-compbench | parti`: pictures for the official evaluators.

In: a benchmark's prompt file, a model (see `flux_jax.evaluate.models`), how to sample. Out: the folder that the
benchmark's evaluator reads (`flux_jax.evaluate.benchmarks` has the layouts); progress and the time left on stderr.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flux_jax import images, inputs
from flux_jax.errors import UserError
from flux_jax.evaluate import benchmarks, folders
from flux_jax.evaluate.benchmarks import CATEGORIES, IMAGES, Picture, Prompt
from flux_jax.evaluate.models import Variant

Plan = list[tuple[Path, dict[str, Any], list[Picture], list[Picture]]]  # folder, its run.json, all, this shard's


def add_commands(commands) -> None:
    """The three subcommands, on argparse's list of them."""
    geneval = commands.add_parser("geneval", help="GenEval's folder: 553 prompts, 4 pictures each")
    geneval.add_argument("--metadata", type=Path, required=True, help="GenEval's evaluation_metadata.jsonl")
    t2i = commands.add_parser("t2i-compbench", help="T2I-CompBench's folders: 300 prompts a category, 10 pictures each")
    t2i.add_argument("--category", required=True, help=f"all, or one of {', '.join(CATEGORIES)}")
    t2i.add_argument("--prompts", type=Path, required=True, help="its CATEGORY_val.txt; for all: the folder of these")
    parti = commands.add_parser("parti", help="PartiPrompts, in GenEval's layout: 1632 prompts, a picture each")
    parti.add_argument("--prompts", type=Path, required=True, help="PartiPrompts.tsv")
    for name, parser, plan in (
        ("geneval", geneval, _plan_geneval),
        ("t2i-compbench", t2i, _plan_t2i),
        ("parti", parti, _plan_parti),
    ):
        add = parser.add_argument
        add("--out", type=Path, required=True, help="the folder; the same command again goes on where it stopped")
        add_sampling(parser, steps=None)
        add("--seed", type=int, default=benchmarks.SEED, help="picture k of every prompt has SEED + k (%(default)s)")
        add("--images", type=int, default=IMAGES[name], help="pictures of a prompt (%(default)s)")
        add("--subset", type=int, metavar="N", help="N prompts only, always the same, tags in proportion")
        add("--shard", default="1/1", metavar="I/N", help="the I-th of N parts of the prompts, one for each machine")
        add("--devices", type=int, metavar="N", help="devices of this machine to use (default: all)")
        add("--dry-run", action="store_true", help="say what would be made, and make nothing")
        parser.set_defaults(run=run, plan=plan)


def add_sampling(parser: argparse.ArgumentParser, steps: int | None, model: bool = True) -> None:
    """The options that say which model draws (unless `model` is False) and how."""
    add = parser.add_argument
    if model:
        add("--model", default="nano", help="checkpoint or alias, with options: nano@dtype=float32 (%(default)s)")
    add("--steps", type=int, default=steps, help="denoising steps (default: the model's)")
    add("--guidance", type=float, help="guidance scale (default: the model's)")
    add("--size", metavar="WxH", help="in pixels (default: the model's; FLUX.1: 1024x1024)")
    add("--device", choices=("cpu", "gpu"), help="default: a GPU if JAX finds one")


def run(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Makes the pictures that the arguments ask for; returns the report that --json prints."""
    if args.images < 1 or (args.subset is not None and args.subset < 1) or (args.devices or 1) < 1:
        raise UserError("--images, --subset and --devices must be at least 1.")
    part, parts = read_shard(args.shard)
    variant = Variant.parse(args.model)
    sampling = sampling_of(args, variant)
    inputs.check_seeds([args.seed, args.seed + args.images - 1])
    plan = args.plan(args, lambda prompts: (prompts, benchmarks.shard(prompts, part, parts)))
    settings = {"benchmark": args.what, "model": variant.identity(), "sampling": sampling, "seed": args.seed}
    report = {"model": str(variant), "folders": [], "planned": 0, "there": 0, "made": 0}
    for out, own, _, mine in plan:
        left = len(folders.missing(mine, out))
        report["folders"].append(str(out))
        report["planned"] += len(mine)
        report["there"] += len(mine) - left
        if not args.dry_run:
            folders.stamp(out, settings | own)
    say(f"{report['planned']} pictures, {report['there']} of them there already.")
    if args.dry_run or report["planned"] == report["there"]:
        for out, _, everything, _ in plan if not args.dry_run else ():
            folders.sweep(everything, out)
        return report

    import jax

    from flux_jax import cache
    from flux_jax.generate import check_device

    check_device(args.device)
    cache.enable()
    devices = jax.local_devices()[: args.devices]
    say(f"{variant} on {len(devices)} x {devices[0].device_kind} ({devices[0].platform}).")
    draw = once_for_each(painter(variant, sampling))
    for out, _, everything, mine in plan:
        report["made"] += folders.make(mine, out, draw, recorder(variant, sampling, devices[0]), devices)
        folders.sweep(everything, out)
    return report


def sampling_of(args: argparse.Namespace, variant: Variant) -> dict[str, Any]:
    """Arguments of the pipeline, checked: num_inference_steps, guidance_scale, height, width."""
    config = variant.config()
    defaults = config.sampling
    width, height = inputs.parse_size(args.size) if args.size else (defaults.width, defaults.height)
    height, width, _ = inputs.fit_size(config, height, width, strict=True)
    steps = defaults.num_inference_steps if args.steps is None else args.steps
    guidance = float(defaults.guidance_scale if args.guidance is None else args.guidance)
    length = defaults.max_sequence_length
    inputs.check_numbers(config, steps=steps, guidance=guidance, true_cfg=1.0, max_sequence_length=length)
    return {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width}


def same_sampling(args: argparse.Namespace, variants: Sequence[Variant]) -> dict[str, Any]:
    """`sampling_of` models that are to be compared; UserError unless it is the same for all, and so is their noise."""
    first, *others = variants
    sampling, channels = sampling_of(args, first), first.config().transformer.in_channels
    for other in others:
        if sampling_of(args, other) != sampling:
            raise UserError(f"{first} and {other} have other defaults; give --steps, --guidance and --size.")
        if other.config().transformer.in_channels != channels:
            raise UserError(f"{first} and {other} have latents of other shapes: they cannot start from the same noise.")
    return sampling


def painter(variant: Variant, sampling: dict[str, Any]) -> Callable[[Any], Callable[[Picture], Any]]:
    """device -> (picture -> PIL image), with a copy of the model on that device."""
    import jax

    def on(device: Any) -> Callable[[Picture], Any]:
        with jax.default_device(device):
            pipe = variant.load()

        def draw(picture: Picture) -> Any:
            with jax.default_device(device), variant.tracing():
                return pipe(picture.prompt, seed=picture.seed, **sampling).images[0]

        return draw

    return on


def once_for_each(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same function, remembering its results: a model is loaded once for all folders of a run."""
    made: dict[Any, Any] = {}

    def remembered(key: Any) -> Any:
        if key not in made:
            made[key] = make(key)
        return made[key]

    return remembered


def recorder(variant: Variant, sampling: dict[str, Any], device: Any) -> Callable[[Picture, Any], dict[str, Any]]:
    """(picture, image) -> the record that its file holds, as `flux_jax.generate` writes it."""
    import jax

    from flux_jax.generate import version

    identity = variant.identity()
    common = {
        "format": images.RECORD_FORMAT,
        "negative_prompt": None,
        "steps": sampling["num_inference_steps"],
        "guidance": sampling["guidance_scale"],
        "true_cfg": 1.0,
        "height": sampling["height"],
        "width": sampling["width"],
        "max_sequence_length": variant.config().sampling.max_sequence_length,
        "dtype": identity["dtype"],
        "model": {"id": variant.model} | {key: value for key, value in identity.items() if key != "dtype"},
        "device": f"{device.platform} {device.device_kind}",
        "versions": {"flux_jax": version(), "jax": jax.__version__, "python": sys.version.split()[0]},
    }
    return lambda picture, image: {"prompt": picture.prompt, "seed": picture.seed, **common}


def read_shard(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8)."""
    words = text.split("/")
    if len(words) != 2 or not all(word.isdigit() for word in words) or not 1 <= int(words[0]) <= int(words[1]):
        raise UserError(f"--shard must read I/N with I from 1 to N, such as 1/4, not {text!r}.")
    return int(words[0]), int(words[1])


Split = Callable[[list[Prompt]], tuple[list[Prompt], list[Prompt]]]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _planned(out: Path, source: Path, prompts: Sequence[Prompt], args, split: Split, layout, **own: Any):
    parts = split(benchmarks.subset(list(prompts), args.subset))
    everything, mine = (layout(part, args.images, args.seed) for part in parts)
    return out, {"prompts": _digest(source), "images": args.images, **own}, everything, mine


def _plan_geneval(args: argparse.Namespace, split: Split) -> Plan:
    prompts = benchmarks.read_geneval(args.metadata)
    return [_planned(args.out, args.metadata, prompts, args, split, benchmarks.folder_pictures)]


def _plan_parti(args: argparse.Namespace, split: Split) -> Plan:
    prompts = benchmarks.read_parti(args.prompts)
    return [_planned(args.out, args.prompts, prompts, args, split, benchmarks.folder_pictures)]


def _plan_t2i(args: argparse.Namespace, split: Split) -> Plan:
    if args.category != "all" and args.category not in CATEGORIES:
        raise UserError(f"Unknown category {args.category!r}; T2I-CompBench has {', '.join(CATEGORIES)} (or: all).")
    if args.category != "all":
        sources = {args.category: (args.prompts, args.out)}
    else:
        sources = {name: (args.prompts / f"{name}_val.txt", args.out / name) for name in CATEGORIES}
    plan = []
    for category, (source, out) in sources.items():
        prompts = benchmarks.read_t2i_compbench(source, args.images)
        plan.append(_planned(out, source, prompts, args, split, benchmarks.t2i_pictures, category=category))
    return plan
