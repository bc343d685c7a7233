"""Makes a converted checkpoint ternary and teaches it to stay itself, from prompts and noise alone.

    python -m flux_jax.distill TEACHER OUT --prompts FILE...            (killed at any moment: the same command goes on)
    python -m flux_jax.distill nano-bf16 OUT --prompts FILE... --quick  (FLUX-nano on two cores in minutes)
    python -m flux_jax.distill TEACHER OUT --prompts FILE... --large    (FLUX.1-dev on 80 GB cards)

TEACHER is a checkpoint's folder or alias, OUT the ternary checkpoint. OUT.run keeps trajectories, training states,
metrics and their curve; it may be deleted afterwards. The last line on stdout is a JSON object: held-out losses.
"""

import argparse
import os
from collections.abc import Sequence

from flux_jax.cli.dataclass_flags import add_dataclass_flags, given
from flux_jax.cli.main import Parser, guarded, output_json, path, program, say
from flux_jax.distill.options import LARGE, QUICK, Options
from flux_jax.errors import UserError
from flux_jax.io import prompts
from flux_jax.runtime import compilation_cache, watchdog
from flux_jax.runtime.environment import start_jax


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a distillation and returns the exit status; a user's mistake is one sentence on stderr and status 2."""
    return guarded(
        run,
        argv,
        interrupted="Interrupted; the same command goes on from the last checkpoint.",
        no_memory="Out of memory while distilling; try a smaller --block-batch or a larger --accumulate or "
        "--rematerialise or a GPU with more memory.",
        no_disk="The disk is full: free some space, and the same command goes on from the last checkpoint.",
    )


def run(argv: Sequence[str]) -> None:
    args = build_parser().parse_args(argv)
    options = Options(**((QUICK if args.quick else LARGE if args.large else {}) | given(Options, args)))
    texts = prompts.read_all(args.prompts)
    connect(args, options)
    start_jax()
    import jax

    from flux_jax.distill.run import distill

    compilation_cache.enable()
    about = distill(args.teacher, args.out, texts, options, mesh=args.mesh, overwrite=args.overwrite)
    if jax.process_index() == 0:
        written = jax.process_count() == 1
        if not written:
            say(f"Trained; the same command as a single process now writes {args.out}.")
        losses = {name: about[name] for name in ("held_out_loss", "held_out_relative")}
        output_json({"out": str(args.out) if written else None} | losses)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=program("distill"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("teacher", metavar="TEACHER")
    add("out", type=path, metavar="OUT")
    add("--prompts", type=path, nargs="+", required=True, metavar="FILE", help=".txt, .jsonl or .tsv files")
    sets = parser.add_mutually_exclusive_group()
    for flag, about, values in (("--quick", "short phases", QUICK), ("--large", "for FLUX.1-dev's size", LARGE)):
        listed = ", ".join(f"{name} {value}" for name, value in values.items())
        sets.add_argument(flag, action="store_true", help=f"{about}: {listed}")
    add("--overwrite", action="store_true", help="replace OUT if it is a checkpoint")
    add("--mesh", metavar="data=N,fsdp=M", help="devices along each axis (default: all along data)")
    add("--coordinator", metavar="HOST:PORT", help="several processes: where the first one listens")
    add("--processes", type=int, metavar="N", help="several processes: how many")
    add("--process", type=int, metavar="I", help="several processes: which one this is, from 0")
    add_dataclass_flags(parser.add_argument_group("options"), Options)
    return parser


def connect(args: argparse.Namespace, options: Options) -> None:
    """Joins the other processes, where there are any; on a CPU makes one device of each core that a batch can use."""
    import jax

    if (args.coordinator is None) != (args.processes is None) or (args.coordinator is None) != (args.process is None):
        raise UserError("Several processes need all of --coordinator, --processes and --process.")
    rows = [options.batch // options.accumulate, options.block_batch]
    if args.mesh is None and args.coordinator is None and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", usable_cores(len(os.sched_getaffinity(0)), rows))
    if args.coordinator is not None:
        watchdog.join(args.coordinator, args.processes, args.process)


def usable_cores(cores: int, rows: list[int]) -> int:
    """The most devices, up to the number of cores, that divide all batches: data parallelism keeps cores busier than
    XLA's parallel products alone do."""
    return max(n for n in range(1, cores + 1) if not any(row % n for row in rows))
