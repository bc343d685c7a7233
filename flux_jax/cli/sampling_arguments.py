"""The options of every program that draws with a model in order to judge it: how many steps, which guidance and size.

In: such options of a command line, and the models they are for. Out: arguments of the pipeline, checked.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from flux_jax import validation
from flux_jax.cli.arguments import parse_size
from flux_jax.cli.main import expanded
from flux_jax.errors import UserError
from flux_jax.evaluate.models import Variant


def add_sampling(parser: argparse.ArgumentParser, steps: int | None, model: bool = True) -> None:
    """The options that say which model draws (unless `model` is False) and how."""
    add = parser.add_argument
    if model:
        named = "checkpoint or alias, with options: nano@dtype=float32 (%(default)s)"
        add("--model", type=expanded, default="nano", help=named)
    add("--steps", type=int, default=steps, help="denoising steps (default: the model's)")
    add("--guidance", type=float, help="guidance scale (default: the model's)")
    add("--size", metavar="WxH", help="in pixels (default: the model's; FLUX.1: 1024x1024)")
    add("--device", choices=("cpu", "gpu"), help="default: a GPU if JAX finds one")


def sampling_of(args: argparse.Namespace, variant: Variant) -> dict[str, Any]:
    """Arguments of the pipeline, checked: num_inference_steps, guidance_scale, height, width."""
    config = variant.config()
    defaults = config.sampling
    width, height = parse_size(args.size) if args.size else (defaults.width, defaults.height)
    height, width, _ = validation.fit_size(config, height, width, strict=True)
    steps = defaults.num_inference_steps if args.steps is None else args.steps
    guidance = float(defaults.guidance_scale if args.guidance is None else args.guidance)
    length = defaults.max_sequence_length
    validation.check_numbers(config, steps=steps, guidance=guidance, true_cfg=1.0, max_sequence_length=length)
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
