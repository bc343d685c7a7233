"""`python -m flux_jax.evaluate WHAT`: pictures for the official evaluators, their scores, FLUX-nano's own.

In: a command line. Out: folders of pictures, tables; progress on stderr, on stdout only what a script would read.
"""

from collections.abc import Sequence

from flux_jax.cli import evaluate_benchmarks, evaluate_nano, evaluate_score
from flux_jax.cli.main import Parser, guarded, output_json, program, say
from flux_jax.runtime.environment import set_environment

INTERRUPTED = "Interrupted; pictures that were finished are kept, and the same command goes on from there."
NO_MEMORY = "Out of memory; choose a smaller --size, or a model with @dtype=bfloat16."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status; a user's mistake is one sentence on stderr."""
    return guarded(run, argv, interrupted=INTERRUPTED, no_memory=NO_MEMORY)


def run(argv: Sequence[str]) -> None:
    parser = Parser(prog=program("evaluate"), description="How good the pictures are.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="WHAT", dest="what")
    evaluate_benchmarks.add_commands(commands)
    evaluate_score.add_command(commands)
    evaluate_nano.add_command(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    args = parser.parse_args(argv)
    set_environment(getattr(args, "device", None))
    report = args.run(args, say)
    if args.json:
        output_json(report)
