"""The arguments of `python -m flux_jax.generate`: names that FLUX users know, checked where no model is needed.

In: words of a command line. Out: a namespace; what was not given is None, so that an earlier picture's record or the
model's own default can fill it (`flux_jax.cli.requests`).
"""

import argparse
import math
import re
import sys
from collections.abc import Sequence

from flux_jax import validation
from flux_jax.cli.main import Parser, expanded, path, program, say
from flux_jax.errors import UserError, shortened
from flux_jax.io import reading
from flux_jax.runtime.environment import version

ANY_SEED = -1  # as web interfaces have it: drawn at random
DTYPES = {"auto": "auto", "float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}

EXAMPLES = """\
examples:
  python -m flux_jax.generate "a red circle to the left of a blue square" --seed 7
  python -m flux_jax.generate "a green cross" --num-images 4 -o "crosses/{i}-{seed}.png"
  python -m flux_jax.generate --prompts-file prompts.txt -o pictures/      (again: continues where it stopped)
  python -m flux_jax.generate -C outputs/flux-20260101-120000-7.png --steps 50
What is not given is the model's own default.
exit status: 2 bad input, 3 missing or gated weights, 4 out of memory"""


PROMPTS_FILE = (
    "many prompts: .txt, one a line, .tsv with a column Prompt, or .jsonl, objects with prompt and, if wanted, id, "
    "seed, width, height, steps, guidance, negative_prompt, true_cfg; pictures that exist already are skipped"
)
TRUE_CFG = "classifier-free guidance against the negative prompt; twice as slow (default: 1, off)"
OFFLOADING = (
    "keep weights in the host's memory: each part is on the device while it works (model), and T5 layer by layer "
    "(layers); slower, for GPUs that cannot hold all parts at once"
)
ACTIVATIONS = "multiply ternary weights with activations as they are, or rounded to int8 (default: as the model says)"
TILING = "decode in strips: less memory, the same picture (default: auto, where whole pictures would not fit)"
MESH = "devices: N pictures side by side, the transformer of each split over M (default: one device)"
PROCESSES = "processes, on one or several hosts, that make up the mesh; start the same command for each"
OUTPUT = "a .png or a folder; may hold {seed}, {i}, {id} and {prompt} (default: outputs/flux-<time>-<seed>.png)"


def build_parser() -> Parser:
    parser = Parser(
        prog=program("generate"),
        description="Draws a picture from a prompt. Paths of the pictures go to stdout, everything else to stderr.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what to draw").add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what the picture shows; - reads it from stdin")
    add("-p", "--prompt", action="append", default=[], metavar="PROMPT", help="the same, as an option")
    add("--prompts-file", type=path, metavar="FILE", help=PROMPTS_FILE)
    add("-n", "--negative-prompt", metavar="PROMPT", help="what to avoid; needs --true-cfg above 1")
    add("-C", "--from-metadata", type=path, metavar="IMG", help="repeat the picture in this PNG; other options win")

    add = parser.add_argument_group("how").add_argument
    add(
        "-s",
        "--seed",
        nargs="+",
        metavar="N",
        help="picture i of the run uses seed N + i; several: one picture for each; -1: a random one (default)",
    )
    add("-b", "--num-images", type=int, metavar="N", help="pictures for each prompt (default: 1)")
    add("--steps", "--num-inference-steps", "--num-steps", type=int, metavar="N", help="denoising steps")
    add("-g", "--guidance", "--guidance-scale", type=float, metavar="G", help="guidance embedded in the model")
    add("--true-cfg", "--true-cfg-scale", "--cfg-scale", type=float, metavar="G", help=TRUE_CFG)
    add("-W", "--width", type=int, metavar="PIXELS")
    add("-H", "--height", type=int, metavar="PIXELS")
    add("--size", metavar="WxH", help="width and height in one word")
    add("--aspect", metavar="W:H", help="a shape, at about the model's own number of pixels")
    add("--strict-size", action="store_true", help="refuse a size that would have to be rounded")
    add("--max-sequence-length", type=int, metavar="N", help="T5 tokens")

    add = parser.add_argument_group("model and machine").add_argument
    add(
        "-m",
        "--model",
        type=expanded,
        metavar="MODEL",
        help="a checkpoint's folder, or a name that --list-models prints",
    )
    add("--list-models", action="store_true", help="print the models that came with the package, and stop")
    add("--dtype", choices=sorted(DTYPES), help="auto (default): bfloat16 on a GPU, float32 on a CPU")
    add("--activations", choices=validation.ACTIVATIONS, help=ACTIVATIONS)
    add("--device", choices=("cpu", "gpu"), help="default: a GPU if JAX finds one")
    add("--offload", choices=validation.OFFLOAD_MODES, default="none", help=OFFLOADING)
    add("--vae-tiling", choices=("auto", "on", "off"), default="auto", help=TILING)
    add("--mesh", metavar="data=N,model=M", help=MESH)
    add("--processes", type=int, default=1, metavar="N", help=PROCESSES)
    add("--process", type=int, default=0, metavar="I", help="which of them this is, from 0; the first writes")
    add("--coordinator", metavar="HOST:PORT", help="where the first of several processes listens")
    add("--verify", action="store_true", help="compare the checkpoint's files with their SHA-256 before use")
    add("--no-cache", action="store_true", help="do not keep compiled programs in the user's cache folder")

    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", type=expanded, metavar="PATH", help=OUTPUT)
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--json", action="store_true", help="print one JSON object on stdout instead of paths")
    add("--dry-run", action="store_true", help="say what would be done, and do nothing")
    add("-q", "--quiet", action="store_true", help="no progress and no summary")
    add("-v", "--verbose", action="store_true", help="say more: device, dtype, cache folder")
    add("--version", action="version", version=f"flux_jax {version()}")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with prompts gathered in `prompts` and `seed` a list of integers, some of them ANY_SEED, or
    None."""
    args = build_parser().parse_intermixed_args(argv)
    # `--seed 1 2 "a red circle"`: an option that takes several values swallows the prompt behind it; hand it back.
    values = args.seed or []
    numbers = [w for w in values if re.fullmatch(r"[+-]?\d+", w)]
    if values[: len(numbers)] != numbers or (values and not numbers):
        raise UserError(f"--seed takes whole numbers, not {shortened(next(w for w in values if w not in numbers))}.")
    if long := [word for word in numbers if len(word) > 30]:
        raise UserError(f"--seed takes numbers of at most 64 bits, not {shortened(long[0])}.")
    args.seed = [int(n) for n in numbers] or None
    validation.check_seeds([seed for seed in args.seed or () if seed != ANY_SEED])
    args.prompts = [*args.prompts, *values[len(numbers) :], *args.prompt]
    if args.quiet and args.verbose:
        raise UserError("-q and -v contradict each other.")
    if args.num_images is not None and not validation.is_whole(args.num_images, 1, validation.MAX_PICTURES):
        most, given = validation.MAX_PICTURES, shortened(args.num_images)
        raise UserError(f"--num-images must be from 1 to {most}, not {given}.")
    if args.seed and len(args.seed) > 1 and (args.num_images or 1) > 1:
        raise UserError("Several seeds already say how many pictures to make; leave out --num-images.")
    if (
        sum(
            given is not None
            for given in (args.size, args.aspect, args.width if args.width is not None else args.height)
        )
        > 1
    ):
        raise UserError("Give the size once: --size, --aspect, or --width and --height.")
    if args.mesh is not None:
        args.mesh = parse_mesh(args.mesh)
    if args.processes > 1 and not (args.mesh and args.coordinator and args.seed and ANY_SEED not in args.seed):
        raise UserError("Several processes need --mesh, --coordinator, and a --seed that they agree on.")
    if not 0 <= args.process < args.processes:
        raise UserError(f"--process must be from 0 to {args.processes - 1}, not {args.process}.")
    if args.prompts_file and (args.prompts or args.from_metadata):
        raise UserError("--prompts-file brings its own prompts; leave out the others and --from-metadata.")
    if "-" in args.prompts:
        said = read_stdin()
        args.prompts = [said if prompt == "-" else prompt for prompt in args.prompts]
    return args


def read_stdin() -> str:
    """The prompt on standard input. UserError where that is closed, too long or no text."""
    name, most = "standard input", 4 * validation.MAX_PROMPT  # bytes of a character, at most
    if sys.stdin is None:
        raise reading.unreadable(name, "it is closed", "give the prompt in place of -")
    if sys.stdin.isatty():
        say("Type the prompt, then Ctrl-D at the beginning of a line.")
    try:
        data = sys.stdin.buffer.read(most + 1) or b""
    except (OSError, ValueError) as error:
        raise reading.unreadable(name, reading.reason(error)) from error
    if len(data) > most:
        raise reading.unreadable(name, f"a prompt has at most {validation.MAX_PROMPT} characters")
    return reading.as_text(data, name).strip()


def parse_size(text: str) -> tuple[int, int]:
    """`1280x720` as (width, height)."""
    match = re.fullmatch(r"(\d{1,9})\s*[xX×]\s*(\d{1,9})", text.strip())
    if not match:
        raise UserError(f"--size must read WIDTHxHEIGHT, such as 1024x768, not {shortened(text)}.")
    return int(match[1]), int(match[2])


def parse_mesh(text: str) -> dict[str, int]:
    """`data=2,model=4` as {"data": 2, "model": 4}; an axis that is not named has one place."""
    found = re.findall(r"(data|model)=([1-9]\d{0,8})", text)
    if not found or ",".join(f"{axis}={count}" for axis, count in found) != text or len(dict(found)) != len(found):
        raise UserError(f"--mesh must read data=N,model=M, such as data=2,model=4, not {shortened(text)}.")
    return {axis: int(dict(found).get(axis, 1)) for axis in validation.MESH_AXES}


def aspect_size(text: str, area: int, multiple: int) -> tuple[int, int]:
    """`16:9` as the (width, height) nearest to `area` pixels, both whole multiples of `multiple`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[:/]\s*(\d+(?:\.\d+)?)", text.strip())
    ratio = float(match[1]) / float(match[2]) if match and float(match[2]) else 0.0
    if not 0.1 <= ratio <= 10:
        raise UserError(f"--aspect must read WIDTH:HEIGHT between 1:10 and 10:1, such as 16:9, not {shortened(text)}.")
    width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    return validation.nearest_multiple(width, multiple), validation.nearest_multiple(height, multiple)
