"""Command line of the converter: `python -m convert SOURCE OUT`. A thin layer over `convert.run` and `convert.export`.

Progress, warnings and errors go to stderr; stdout gets the path of what was written. Exit codes: 2 bad input, 3
missing or gated weights.
"""

import argparse
import sys
from pathlib import Path

from flux_jax.errors import UserError
from flux_jax.parts import PARTS

DTYPES = ("bfloat16", "float32", "float16")
EPILOG = """\
examples:
  python -m convert black-forest-labs/FLUX.1-schnell schnell          from the Hugging Face hub
  python -m convert ./FLUX.1-dev dev                                   a diffusers folder
  python -m convert flux1-dev.safetensors dev --vae ae.safetensors --t5 text_encoder_2/ --clip text_encoder/ \\
      --tokenizers .                                                   BFL's single file
  python -m convert --to diffusers dev FLUX.1-dev                      back again
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m convert",
        description="Converts published FLUX weights into a flux_jax checkpoint, and back.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "source", help="a diffusers folder, a single .safetensors file in BFL's format, or a hub name OWNER/NAME"
    )
    p.add_argument("out", type=Path, help="the directory to write; it appears when it is complete")
    p.add_argument(
        "--to", choices=("flux_jax", "diffusers"), default="flux_jax", help="what to write (default: flux_jax)"
    )
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights written (default: bfloat16)")
    p.add_argument("--t5", type=Path, metavar="PATH", help="T5's folder or .safetensors file, instead of SOURCE's")
    p.add_argument("--clip", type=Path, metavar="PATH", help="CLIP's folder or .safetensors file, instead of SOURCE's")
    p.add_argument("--vae", type=Path, metavar="PATH", help="the autoencoder's folder or file (such as ae.safetensors)")
    p.add_argument("--tokenizers", type=Path, metavar="DIR", help="a folder that holds tokenizer/ and tokenizer_2/")
    p.add_argument("--parts", metavar="NAMES", help=f"only these, with commas between: {','.join(PARTS)}")
    p.add_argument("--config", type=Path, metavar="FILE", help="a FluxConfig as JSON, for sizes the files do not tell")
    p.add_argument("--overwrite", action="store_true", help="replace the checkpoint OUT if it exists")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parser().parse_args(arguments)
    try:
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: nothing was left behind; run the same command again", file=sys.stderr)
        return 130
    print(args.out)
    return 0


def run(args: argparse.Namespace) -> None:
    """What the parsed arguments ask for. Raises UserError."""
    if args.to == "diffusers":
        from convert.export import export

        export(args.source, args.out, quiet=args.quiet)
        return
    from convert import hub, sources
    from convert.run import convert

    parts = None if args.parts is None else tuple(args.parts.split(","))
    if unknown := set(parts or ()) - set(PARTS):
        raise UserError(f"--parts knows {','.join(PARTS)}, not {','.join(sorted(unknown))}")
    options = {part: path for part in PARTS if (path := getattr(args, part, None)) is not None}
    if args.out.exists() and not args.overwrite:  # said before anything is downloaded
        raise UserError(f"{args.out} exists already: choose another name, or give --overwrite to replace it")
    source, origin = Path(args.source), None
    if hub.is_hub_name(args.source):
        needed = [part for part in parts or PARTS if part not in options]
        source, origin = hub.fetch(args.source, needed), args.source
    model = sources.find(
        source, options=options, tokenizers=args.tokenizers, parts=parts, config=args.config, origin=origin
    )
    for warning in convert(model, args.out, dtype=args.dtype, overwrite=args.overwrite, quiet=args.quiet):
        print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
