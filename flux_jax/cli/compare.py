"""`python -m flux_jax.compare A B [--prompts FILE] --out DIR`: the same noise through two models, side by side.

In: two models, each a checkpoint with options (`nano-1.58bit@kernel=xla`; see `flux_jax.evaluate.models`), and prompts
(a file that `flux_jax.io.prompts` reads, .jsonl with a seed, if wanted; without it FLUX-nano's: four held-out captions
of each tag, with the seeds that `flux_jax.evaluate nano` draws them with). Out: in DIR the pictures, `index.html` for
any browser, `grid.png`, `report.json`; a summary on stderr, with --json the report on stdout. Needs the extra
`evaluate`. Exit status as `flux_jax.evaluate`.

With --clip FOLDER also CLIP scores, with --lpips FILE also LPIPS (`flux_jax.compare.clip`, `.lpips` say what these must
be). They are taken from the finished pictures: the same command with another of them draws nothing again.
"""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from typing import Any

from flux_jax import validation
from flux_jax.cli.evaluate import INTERRUPTED, NO_MEMORY
from flux_jax.cli.main import Parser, check_device, expanded, guarded, path, program, say
from flux_jax.cli.sampling_arguments import add_sampling, same_sampling
from flux_jax.errors import UserError
from flux_jax.io import locks
from flux_jax.io.prompts import read_rows
from flux_jax.runtime.environment import set_environment

NEEDED = {"skimage": "scikit-image", "matplotlib": "matplotlib", "jinja2": "jinja2"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status; a user's mistake is one sentence on stderr."""
    return guarded(run, argv, interrupted=INTERRUPTED, no_memory=NO_MEMORY)


def options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog=program("compare"), description="Two models side by side, from the same noise.", allow_abbrev=False
    )
    add = parser.add_argument
    reference = "the reference: a checkpoint folder or alias, with options: nano@dtype=float32"
    add("a", type=expanded, metavar="A", help=reference)
    add("b", type=expanded, metavar="B", help="what is compared with it")
    add("--prompts", type=path, metavar="FILE", help="a .txt, .jsonl or .tsv file (default: FLUX-nano's)")
    add("--out", type=path, required=True, help="the folder; the same command again goes on where it stopped")
    add("--seed", type=int, default=0, help="prompt i has noise SEED + i, unless its line says another (%(default)s)")
    add("--clip", type=path, metavar="FOLDER", help="a CLIP model of the hub: CLIP scores of both models' pictures")
    add("--lpips", type=path, metavar="FILE", help="LPIPS weights (.safetensors): how far pictures look apart")
    add_sampling(parser, steps=None, model=False)
    add("--json", action="store_true", help="print the report on stdout")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> None:
    """Draws what is missing, judges, writes the report, and says what was found."""
    args = options(argv)
    if missing := [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]:
        raise UserError(f"This needs {' and '.join(missing)}: pip install 'flux-jax-ternary[evaluate]'.")
    set_environment(args.device)
    from flux_jax.compare import drawing, metrics, report
    from flux_jax.evaluate import image_folders
    from flux_jax.evaluate.models import Variant
    from flux_jax.runtime import compilation_cache

    chosen = prompts_and_seeds(args)
    validation.check_seeds([seed for _, seed in chosen])
    tasks = [drawing.ComparisonTask(i, prompt, seed) for i, (prompt, seed) in enumerate(chosen)]
    a, b = Variant.parse(args.a), Variant.parse(args.b)
    sampling = same_sampling(args, [a, b])
    check_device(args.device)
    networks = judges(args, [prompt for prompt, _ in chosen], sampling)
    identities = {"a": a.identity(), "b": b.identity()}
    settings = {"comparison": identities, "sampling": sampling, "prompts": [list(each) for each in chosen]}
    about = {"a": a.label(), "b": b.label(), "models": identities, "sampling": sampling, "networks": list(networks)}
    with locks.alone(args.out):
        image_folders.stamp(args.out, settings)
        compilation_cache.enable()
        rows = drawing.run(tasks, a, b, sampling, args.out)
        rows = drawing.judged(rows, tasks, args.out, list(networks.values()))
        result = report.write(args.out, tasks, rows, about)
    for line in (*metrics.sentences(result["summary"]), args.out / "index.html"):
        say(str(line))
    if args.json:
        print(json.dumps(result, ensure_ascii=False))


def judges(args: argparse.Namespace, prompts: Sequence[str], sampling: dict[str, Any]) -> dict[str, Any]:
    """The networks that were asked for, by what their scores are called; their files are checked, not loaded."""
    from flux_jax.compare import clip, lpips

    found: dict[str, Any] = {}
    if args.clip:
        found[f"CLIP score by {args.clip.name}"] = clip.judge(args.clip, prompts)
    if args.lpips:
        found[f"LPIPS by {args.lpips.name}"] = lpips.judge(args.lpips, sampling["height"], sampling["width"])
    return found


def prompts_and_seeds(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Of the file that was given, or FLUX-nano's own."""
    from flux_jax.evaluate import nano

    if args.prompts is None:
        return [(task.caption.text, task.seed) for task in nano.examples(4, args.seed)]
    rows, unknown = read_rows(args.prompts)
    if unused := sorted(set(unknown) | {key for row in rows for key in row.fields} - {"seed", "id"}):
        say(f"{args.prompts}: ignoring the keys {', '.join(unused)}.")
    return [(row.prompt, row.fields.get("seed", args.seed + i)) for i, row in enumerate(rows)]
