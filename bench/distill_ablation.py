"""`python -m bench.distill_ablation OUT --prompts FILE...`: which parts of the distillation matter, on FLUX-nano.

In: captions, a number of seeds. Out: for each variant of the method, all else equal (points, batches, steps), the
held-out error of the velocity and the oracle's score with 95 % intervals; runs are kept in OUT, and the same command
goes on. A variant with one phase alone gives it the work of both.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import report
from flux_jax.distill.options import QUICK, Options
from flux_jax.io import prompts

VARIANTS: dict[str, dict[str, Any]] = {
    "rounded, not trained": {"phases": "none"},
    "blockwise + end to end": {},
    "blockwise alone": {"phases": "blockwise"},
    "end to end alone": {"phases": "end_to_end"},
    "random noise points": {"points": "noise"},
    "one scale per matrix": {"scales": "tensor"},
    "modulation stays float": {"modulation": False},
    "absmean start": {"method": "absmean"},
    "unweighted start": {"weighted": False},
    "half at the student's own points": {"own_trajectories": 128},
    "floats stay frozen": {"train_rest": False},
    "int8 activations": {"activations": "int8"},
    "learning rate falls as a square": {"decay": 1.0, "decay_power": 2.0},
    "codes never settle": {"learning_steps": QUICK["learning_steps"] + QUICK["settle_steps"], "settle_steps": 0},
}


def variant(base: Options, own: dict[str, Any]) -> Options:
    """The options of a variant; one phase alone takes as much work as both do."""
    made = dataclasses.replace(base, **own)
    if made.phases == "blockwise":
        extra = round(base.end_to_end_steps * base.batch / base.block_batch)
        made = dataclasses.replace(made, block_steps=base.block_steps + extra)
    if made.phases == "end_to_end":
        extra = round(base.block_steps * base.block_batch / base.batch)
        made = dataclasses.replace(made, learning_steps=base.learning_steps + extra)
    return made


def measure(teacher: str, folder: Path, texts: list[str], options: Options, points: Path, every: int) -> dict[str, Any]:
    """One run: its held-out losses and its score. points: a folder that trajectories are shared in."""
    from flax import nnx

    from flux_jax.distill.run import prepare, train_student
    from flux_jax.evaluate import nano
    from flux_jax.sampling.pipeline import FluxPipeline

    work = prepare(teacher, folder, texts, options, "data=1")
    work.begin()
    shared = points / f"{options.points}-{options.seed}"
    names = ("held_out", "trajectories")
    for name in names:
        if (shared / name).exists() and not (folder / name).exists():
            shutil.copytree(shared / name, folder / name)
    graph, params, about = train_student(work)
    for name in names:
        if (folder / name).exists() and not (shared / name).exists():
            shutil.copytree(folder / name, shared / name)
    found: dict[str, Any] = {"held_out": about["held_out_relative"]}
    if every:
        pipe = FluxPipeline.from_pretrained(teacher, dtype="float32")
        pipe.transformer = nnx.merge(graph, params)
        found["score"] = nano.evaluate(pipe, folder / "pictures", every=every)["overall"]
    return found


def main(argv: Sequence[str]) -> None:
    parser = report.parser("distill_ablation", __doc__)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT")
    add("--prompts", type=Path, nargs="+", required=True, metavar="FILE")
    add("--teacher", default="nano-bf16")
    add("--seeds", type=int, default=1, help="(default: %(default)s)")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    add("--every", type=int, default=8, help="score each N-th caption; 0: none (default: %(default)s)")
    add("--learning-steps", type=int, default=QUICK["learning_steps"])
    args = parser.parse_args(argv)
    texts, rows, figures = prompts.read_all(args.prompts), [], {}
    for name in args.variants:
        for seed in range(args.seeds):
            report.say(f"{name}, seed {seed}")
            base = Options(**(QUICK | {"seed": seed, "learning_steps": args.learning_steps}))
            folder = args.out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            found = measure(args.teacher, folder, texts, variant(base, VARIANTS[name]), args.out / "points", args.every)
            figures[f"{name}, seed {seed}"] = found
            last = list(found["held_out"].values())[-1]
            score = found.get("score", {"score": None, "interval": [None, None]})
            rows.append([name, seed, last, score["score"], *score["interval"]])
    print(report.table(["variant", "seed", "velocity error", "score", "from", "to"], rows))
    report.finish("distill_ablation", figures, save=args.save)


if __name__ == "__main__":
    raise SystemExit(report.run(main))
