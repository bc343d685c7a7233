"""`python -m flux_jax.compare A B [--prompts FILE] --out DIR`: the same noise through two models, side by side.

In: two models, each a checkpoint with options (`nano-1.58bit@kernel=xla`; see `flux_jax.evaluate.models`), and prompts
(.txt, one a line, or .jsonl with prompt and, if wanted, seed; without them FLUX-nano's: four held-out captions of each
tag, with the seeds that `flux_jax.evaluate nano` draws them with). Out: in DIR the pictures, `index.html` for any
browser, `grid.png`, `report.json`; a summary on stderr, with --json the report on stdout. Needs the extra `evaluate`.
Exit status as `flux_jax.evaluate`.

With --clip FOLDER also CLIP scores, with --lpips FILE also LPIPS (`flux_jax.compare.clip`, `.lpips` say what these must
be). They are taken from the finished pictures: the same command with another of them draws nothing again.
"""

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flux_jax import validation
from flux_jax.cli.evaluate import INTERRUPTED, NO_MEMORY
from flux_jax.cli.main import Parser, check_device, guarded, program, say
from flux_jax.cli.sampling_arguments import add_sampling, same_sampling
from flux_jax.errors import UserError
from flux_jax.runtime.environment import set_environment

NEEDED = {"skimage": "scikit-image", "matplotlib": "matplotlib", "jinja2": "jinja2"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit status; a user's mistake is one sentence on stderr."""
    words = sys.argv[1:] if argv is None else argv
    return guarded(lambda: run(words), interrupted=INTERRUPTED, no_memory=NO_MEMORY)


def run(argv: Sequence[str]) -> None:
    parser = Parser(
        prog=program("compare"),
        description="Two models side by side, from the same noise.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("a", metavar="A", help="the reference: a checkpoint folder or alias, with options: nano@dtype=float32")
    add("b", metavar="B", help="what is compared with it")
    add("--prompts", type=Path, metavar="FILE", help=".txt, one prompt a line, or .jsonl (default: FLUX-nano's)")
    add("--out", type=Path, required=True, help="the folder; the same command again goes on where it stopped")
    add("--seed", type=int, default=0, help="prompt i has noise SEED + i, unless its line says another (%(default)s)")
    add("--clip", type=Path, metavar="FOLDER", help="a CLIP model of the hub: CLIP scores of both models' pictures")
    add("--lpips", type=Path, metavar="FILE", help="LPIPS weights (.safetensors): how far pictures look apart")
    add_sampling(parser, steps=None, model=False)
    add("--json", action="store_true", help="print the report on stdout")
    args = parser.parse_args(argv)
    if missing := [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]:
        raise UserError(f"This needs {' and '.join(missing)}: pip install 'flux-jax-ternary[evaluate]'.")

    set_environment(args.device)
    from flux_jax.cli import requests
    from flux_jax.compare import clip, drawing, lpips, metrics, report
    from flux_jax.evaluate import image_folders, nano
    from flux_jax.evaluate.models import Variant
    from flux_jax.runtime import compilation_cache

    if args.prompts is None:
        tasks = [drawing.ComparisonTask(i, e.caption.text, e.seed) for i, e in enumerate(nano.examples(4, args.seed))]
    else:
        lines, ignored = requests.read_prompts(args.prompts)
        if unused := sorted(set(ignored) | {key for line in lines for key in line} - {"prompt", "seed", "id"}):
            say(f"{args.prompts}: ignoring the keys {', '.join(unused)}.")
        tasks = [
            drawing.ComparisonTask(i, line["prompt"], line.get("seed", args.seed + i)) for i, line in enumerate(lines)
        ]
    validation.check_seeds([task.seed for task in tasks])
    a, b = Variant.parse(args.a), Variant.parse(args.b)
    sampling = same_sampling(args, [a, b])
    check_device(args.device)
    judges = {}
    if args.clip:
        judges[f"CLIP score by {args.clip.name}"] = clip.judge(args.clip, [task.prompt for task in tasks])
    if args.lpips:
        judges[f"LPIPS by {args.lpips.name}"] = lpips.judge(args.lpips, sampling["height"], sampling["width"])
    identities = {"a": a.identity(), "b": b.identity()}
    prompts = [[task.prompt, task.seed] for task in tasks]
    image_folders.stamp(args.out, {"comparison": identities, "sampling": sampling, "prompts": prompts})
    compilation_cache.enable()
    rows = drawing.judged(drawing.run(tasks, a, b, sampling, args.out), tasks, args.out, list(judges.values()))
    about = {"a": a.label(), "b": b.label(), "models": identities, "sampling": sampling, "networks": list(judges)}
    result = report.write(args.out, tasks, rows, about)
    found = result["summary"]
    for line in metrics.sentences(found):
        say(line)
    say(f"{args.out / 'index.html'}")
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
