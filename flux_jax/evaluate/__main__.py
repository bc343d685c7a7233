"""`python -m flux_jax.evaluate WHAT`: pictures for the official evaluators, their scores, FLUX-nano's own.

In: a command line. Out: folders of pictures, tables; progress on stderr, on stdout only what a script would read. Exit
status 0, 2 (bad input), 3 (missing weights), 4 (out of memory), 130 (interrupted: what was finished is kept).
"""

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from flux_jax.cli import Parser
from flux_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status; a user's mistake is one sentence on stderr."""
    return guarded(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> None:
    from flux_jax.evaluate import making, nano_run, scoring
    from flux_jax.generate import set_environment

    parser = Parser(prog="python -m flux_jax.evaluate", description="How good the pictures are.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="WHAT", dest="what")
    making.add_commands(commands)
    scoring.add_command(commands)
    nano_run.add_command(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    args = parser.parse_args(argv)
    set_environment(getattr(args, "device", None))
    report = args.run(args, say)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))


def guarded(command: Callable[[], Any]) -> int:
    """Calls it and returns the exit status; foreseeable failures and warnings are sentences on stderr."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_, **__: say(str(message))
            command()
        return 0
    except UserError as error:
        say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        say("Interrupted; pictures that were finished are kept, and the same command goes on from there.")
        return 130
    except (MemoryError, RuntimeError) as error:  # jax.errors.JaxRuntimeError is a RuntimeError
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        say("Out of memory; choose a smaller --size, or a model with @dtype=bfloat16.")
        return 4


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
