"""Command line of the converter: `python -m convert SOURCE OUT`. A thin layer over `convert.run` and `convert.export`.

Progress, warnings and errors go to stderr; stdout gets the path of what was written. Exit codes: 2 bad input, 3
missing or gated weights.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from flux_jax.cli.launch import launch

    launch("convert.__main__")

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flux_jax.cli.main import Parser, expanded, guarded, path, program, say
from flux_jax.errors import UserError
from flux_jax.io.atomic import WholeFolder
from flux_jax.models.params import COMPONENTS
from flux_jax.models.quantize import METHODS, quantization_report
from flux_jax.runtime.environment import set_environment

DTYPES = ("bfloat16", "float32", "float16")
EPILOG = """\
examples:
  python -m convert black-forest-labs/FLUX.1-schnell schnell          from the Hugging Face hub
  python -m convert ./FLUX.1-dev dev                                   a diffusers folder
  python -m convert flux1-dev.safetensors dev --vae ae.safetensors --t5 text_encoder_2/ --clip text_encoder/ \\
      --tokenizers .                                                   BFL's single file
  python -m convert ./FLUX.1-dev mine --transformer mine.safetensors   a fine-tune, the rest from its base
  python -m convert all-in-one.safetensors dev --tokenizers ./FLUX.1-dev
  python -m convert --to diffusers dev FLUX.1-dev                      back again
  python -m convert dev dev-rounded --ternary                          packed to two bits a weight, untrained
"""


def parser() -> Parser:
    p = Parser(
        prog=program("convert"),
        description="Converts published FLUX weights into a flux_jax checkpoint, and back.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "source",
        type=expanded,
        help="a diffusers folder or hub name OWNER/NAME, or a .safetensors file: a transformer, or all in one",
    )
    p.add_argument("out", type=path, help="the directory to write; it appears when it is complete")
    p.add_argument(
        "--to", choices=("flux_jax", "diffusers"), default="flux_jax", help="what to write (default: flux_jax)"
    )
    p.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: what each is stored in)")
    p.add_argument(
        "--ternary",
        nargs="?",
        const=METHODS[0],
        choices=METHODS,
        metavar="METHOD",
        help="round the linears of the transformer's blocks to -1, 0, 1 times a scale, by least-squares (default) or "
        "absmean; without training, so for benchmarks only. SOURCE may then be a checkpoint of flux_jax, too",
    )
    p.add_argument(
        "--transformer", type=path, metavar="PATH", help="its folder or .safetensors file, instead of SOURCE's"
    )
    p.add_argument("--t5", type=path, metavar="PATH", help="T5's folder or .safetensors file, instead of SOURCE's")
    p.add_argument("--clip", type=path, metavar="PATH", help="CLIP's folder or .safetensors file, instead of SOURCE's")
    p.add_argument("--vae", type=path, metavar="PATH", help="the autoencoder's folder or file (such as ae.safetensors)")
    p.add_argument("--tokenizers", type=path, metavar="DIR", help="a folder that holds tokenizer/ and tokenizer_2/")
    p.add_argument("--parts", metavar="NAMES", help=f"only these, with commas between: {','.join(COMPONENTS)}")
    p.add_argument("--config", type=path, metavar="FILE", help="a FluxConfig as JSON, for sizes the files do not tell")
    p.add_argument("--overwrite", action="store_true", help="replace the checkpoint OUT if it exists")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return guarded(run, argv, interrupted="interrupted: nothing unfinished was left behind; run the same command again")


def run(argv: Sequence[str]) -> None:
    """What the arguments ask for. Raises UserError."""
    args = parser().parse_args(argv)
    set_environment("cpu")  # all that it computes, wherever pictures are made
    warnings = to_diffusers(args) if args.to == "diffusers" else to_checkpoint(args)
    for warning in warnings:
        say(f"warning: {warning}")
    print(args.out)


def to_diffusers(args: argparse.Namespace) -> list[str]:
    """Exports, and returns what the user should know."""
    from convert.export import export

    if args.ternary is not None:
        raise UserError("--ternary rounds a checkpoint of flux_jax: leave it out, or leave out --to diffusers")
    export(args.source, args.out, quiet=args.quiet)
    return []


def to_checkpoint(args: argparse.Namespace) -> list[str]:
    """Converts, or rounds a checkpoint that is there already, and returns what the user should know."""
    from convert import weight_format
    from convert.run import convert, rewrite
    from flux_jax.checkpoints.checkpoint import Checkpoint, is_checkpoint
    from flux_jax.checkpoints.writer import no_checkpoint

    components = None if args.parts is None else tuple(args.parts.split(","))
    if unknown := set(components or ()) - set(COMPONENTS):
        raise UserError(f"--parts knows {','.join(COMPONENTS)}, not {','.join(sorted(unknown))}")
    if args.ternary is not None and "transformer" not in (components or COMPONENTS):
        raise UserError("--ternary rounds the transformer, which --parts leaves out")
    WholeFolder(args.out, overwrite=args.overwrite, ours=no_checkpoint).check()  # before anything is downloaded
    how: dict[str, Any] = {
        "form": weight_format.WeightFormat(args.dtype, args.ternary),
        "overwrite": args.overwrite,
        "quiet": args.quiet,
    }
    options = {each: getattr(args, each) for each in COMPONENTS if getattr(args, each) is not None}
    if args.ternary is not None and is_checkpoint(args.source):
        if options or args.tokenizers or args.config:
            raise UserError(
                f"{args.source} is a checkpoint with parts of its own: leave out the options that name others"
            )
        warnings = rewrite(args.source, args.out, components=components, **how)
    else:
        warnings = convert(published(args, components, options), args.out, **how)
    if args.ternary is not None:
        warnings.append(weight_format.WARNING)
        if not args.quiet:
            say(quantization_report(Checkpoint.open(args.out).config))
    return warnings


def published(args: argparse.Namespace, components: tuple[str, ...] | None, options: dict[str, Path]) -> Any:
    """The files to convert, those of the hub fetched first. components: the ones wanted, None: all; options: those that
    come from elsewhere."""
    from convert import hub, sources

    place, origin = Path(args.source), None
    if hub.is_hub_name(args.source):
        needed = [component for component in components or COMPONENTS if component not in options]
        place, origin = hub.fetch(args.source, needed), args.source
    return sources.find(
        place,
        options=options,
        tokenizers=args.tokenizers,
        components=components,
        config=args.config,
        origin=origin,
    )
