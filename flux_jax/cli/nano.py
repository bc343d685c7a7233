"""Trains FLUX-nano from nothing but a seed.

    python -m flux_jax.nano.train vae --run RUN          the autoencoder
    python -m flux_jax.nano.train text --run RUN         the text encoders, from captions
    python -m flux_jax.nano.train flow --run RUN         the transformer: encoded text -> velocity
    python -m flux_jax.nano.train guidance --run RUN     its own guidance becomes an input
    python -m flux_jax.nano.train export --run RUN OUT   the checkpoint that ships
    python -m flux_jax.nano.train student STUDENT OUT    its 1.58-bit student, by flux_jax.distill, with a card

In: the phases before, in the folder RUN. Out: `RUN/<phase>/`. A phase that was killed goes on by the same command.
"""

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from flax import nnx

from flux_jax.cli.dataclass_flags import add_dataclass_flags, given
from flux_jax.cli.main import Parser, guarded, path, program, whole
from flux_jax.io import locks
from flux_jax.nano import training
from flux_jax.nano.training import Recipe
from flux_jax.runtime.environment import start_jax
from flux_jax.validation import SEED_LIMIT

RECIPES = {
    "text": Recipe(steps=600, batch=128),
    "flow": Recipe(steps=5500, decay=0.5),
    "guidance": Recipe(steps=1200, warmup=50, learning_rate=1e-3),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one phase and returns the exit status; a user's mistake is one sentence on stderr and status 2."""
    return guarded(run, argv, interrupted="Interrupted; the same command goes on from the last checkpoint.")


def run(argv: Sequence[str]) -> None:
    args = build_parser().parse_args(argv)
    with locks.alone(args.run) if "run" in args else contextlib.nullcontext():
        args.run_phase(args)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=program("nano.train"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    phases = parser.add_subparsers(required=True, metavar="PHASE")
    common = Parser(add_help=False)
    common.add_argument("--run", type=path, default=Path("runs/nano"), help="folder of the whole training")

    vae = phases.add_parser("vae", parents=[common], help="the autoencoder")
    vae.add_argument("--steps", type=whole(1, 10**9), default=2500)
    vae.add_argument("--seed", type=whole(0, SEED_LIMIT - 1), default=0)
    vae.set_defaults(run_phase=train_vae)
    helps = {
        "text": "the text encoders, from captions",
        "flow": "the transformer: encoded text -> velocity",
        "guidance": "its own guidance becomes an input",
    }
    for phase, recipe in RECIPES.items():
        sub = phases.add_parser(phase, parents=[common], help=helps[phase])
        add_dataclass_flags(sub, Recipe, dataclasses.asdict(recipe))
        sub.set_defaults(run_phase=train_networks, phase=phase)
    export = phases.add_parser("export", parents=[common], help="the checkpoint that ships")
    export.set_defaults(run_phase=run_export)
    student = phases.add_parser("student", help="the 1.58-bit checkpoint that ships: a student with its card")
    student.add_argument("student", type=path, metavar="STUDENT", help="an OUT of flux_jax.distill")
    student.set_defaults(run_phase=run_export_student)
    for sub in (export, student):
        sub.add_argument("out", type=path, metavar="OUT")
        sub.add_argument("--evaluation", type=path, help="an --out of flux_jax.evaluate, for the scores on the card")
        sub.add_argument("--overwrite", action="store_true")
    return parser


def use_all_cores() -> None:
    """Starts JAX with one CPU device per core: data parallelism keeps all of them busy, XLA's parallel products alone
    do not."""
    import jax

    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    start_jax()


def train_vae(args: argparse.Namespace) -> None:
    from flux_jax.nano import autoencoder

    use_all_cores()
    autoencoder.train(args.run / "vae", steps=args.steps, seed=args.seed)


def train_networks(args: argparse.Namespace) -> None:
    from flux_jax.nano import flow, text
    from flux_jax.nano.dataset import load_or_build
    from flux_jax.nano.export import load_vae, tokenizers, trained

    use_all_cores()
    recipe = dataclasses.replace(RECIPES[args.phase], **given(Recipe, args))
    config, vae = load_vae(args.run / "vae")
    tokenize = tokenizers(args.run, config)
    dataset = load_or_build(args.run / "latents.npz", vae, tokenize, config, seed=recipe.seed, count=recipe.examples)
    if args.phase == "text":
        text.train(args.run / "text", config, recipe, dataset, tokenize)
        return
    constants = flow.constants(config, trained(args.run, "text", config).encoders, dataset)
    if args.phase == "flow":
        networks, loss = flow.Networks(config, nnx.Rngs(recipe.seed)), flow.FlowLoss(config, recipe)
    else:
        networks, loss = trained(args.run, "flow", config), flow.GuidanceLoss(config, recipe)
        constants["teacher"] = networks
    training.train(args.run / args.phase, recipe, networks, dataset, loss, constants)


def run_export(args: argparse.Namespace) -> None:
    from flux_jax.nano.export import export

    export(args.run, args.out, args.evaluation, args.overwrite)


def run_export_student(args: argparse.Namespace) -> None:
    from flux_jax.nano.export import export_student

    export_student(args.student, args.out, args.evaluation, args.overwrite)
