"""`python -m flux_jax.plan --gpu l20 --size 1024x1024`: what each stage takes on a device, before anything is loaded.

In: a model (a checkpoint, or a preset with synthetic weights), a size, and a device: the one that is present, or a name
of `flux_jax.runtime.aot`. Out: the table of `flux_jax.sampling.planner` on stdout; whether it fits, and if not, the
flags that make it.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from flux_jax import validation
from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.cli.arguments import OFFLOADING, TILING, parse_size
from flux_jax.cli.main import Parser, expanded, guarded, in_flags, output, output_json, program, say, whole
from flux_jax.config import dev, schnell
from flux_jax.runtime import aot
from flux_jax.runtime.console import unheard
from flux_jax.runtime.environment import start_jax
from flux_jax.sampling.planner import AbstractModel, Planner, describe, model_of

PRESETS = {"dev": dev, "schnell": schnell}


def options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=program("plan"), description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    model = "a checkpoint's folder, or dev or schnell: FLUX.1 with synthetic weights (default: dev)"
    add("-m", "--model", type=expanded, default="dev", help=model)
    add("--weights", choices=("ternary", "bf16"), default="ternary", help="of dev and schnell (default: ternary)")
    add("--activations", choices=validation.ACTIVATIONS, help="of ternary layers (default: the checkpoint's; bf16)")
    add("--gpu", choices=sorted(aot.GPUS), help="a GPU that need not be here (default: JAX's device)")
    add("--size", type=parse_size, metavar="WxH", help="of the picture (default: the model's own)")
    add(
        "--batch",
        type=whole(1, 10**6),
        default=1,
        help="pictures; they are drawn one at a time and take no more than one",
    )
    add("--steps", type=whole(1, validation.MAX_STEPS), help="denoising steps (default: the model's own)")
    add("--offload", choices=validation.OFFLOAD_MODES, default="none", help=OFFLOADING)
    add("--vae-tiling", choices=("auto", "on", "off"), default="auto", help=TILING)
    add("--json", action="store_true", help="print one JSON object on stdout")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a plan; exit status 0 if it fits, 4 if not, 2 and 3 as for `flux_jax.generate`."""
    return guarded(run, argv)


def run(argv: Sequence[str]) -> int:
    args = options(argv)
    os.environ.setdefault(aot.SKIP_CHECK, "1")
    start_jax()
    if args.model in PRESETS:
        ternary = (args.activations or "bf16") if args.weights == "ternary" else None
        model = AbstractModel(PRESETS[args.model](), ternary, jnp.dtype(jnp.bfloat16))
    else:
        model = model_of(Checkpoint.open(args.model).using(args.activations), jnp.bfloat16)
    defaults = model.config.sampling
    width, height = args.size or (defaults.width, defaults.height)
    height, width, _ = validation.fit_size(model.config, height, width, strict=True)
    steps, length = args.steps or defaults.num_inference_steps, defaults.max_sequence_length
    planner = Planner(model, args.gpu, height=height, width=width, steps=steps, length=length)
    say(f"Compiling for {planner.device} ...")
    with unheard():  # XLA speaks of a program that does not fit, an answer here, as of an error
        text, figures = described(planner, args)
    form = "bf16" if model.activations is None else f"ternary, {model.activations} activations"
    head = f"{model.config.name} ({form}), {width}x{height}, {steps} steps"
    if args.json:
        output_json({"model": model.config.name, "weights": form, **figures})
    else:
        output(f"{head}\n{text}")
    return 0 if figures["fits"] else 4


def described(planner: Planner, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """`flux_jax.sampling.planner.describe` for the arguments `offload` and `vae_tiling`, with flags for remedies."""
    text, figures = describe(planner, args.offload, args.vae_tiling)
    return in_flags(text), figures | {"remedy": in_flags(figures["remedy"] or "") or None}
