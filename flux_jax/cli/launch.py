"""How every program of ours starts, by `python -m` as by the script `flux-jax`: signals and standard streams first,
then the program itself, whose import takes seconds.

In: the module that has the program's `main`. Out: the exit status of the process. Imports almost nothing.
"""

import importlib
import logging
from typing import NoReturn

from flux_jax.runtime import console, stopping


class Sentences(logging.Handler):
    """What libraries log that set up no handler of their own, such as JAX of a plugin that fails: without the
    traceback, since the run goes on."""

    def emit(self, record: logging.LogRecord) -> None:
        console.say(record.getMessage())


def launch(module: str) -> NoReturn:
    """Runs `main` of that module with the process's arguments, and ends the process."""
    stopping.own_process()
    console.make_unfailing()
    logging.lastResort = Sentences(logging.WARNING)
    stopping.decided(console.settled(_run(module)))


def script() -> NoReturn:
    """`flux-jax`."""
    launch("flux_jax.cli.main")


def _run(module: str) -> int:
    try:
        return importlib.import_module(module).main()
    except SystemExit as asked:  # --help
        return asked.code if isinstance(asked.code, int) else 0
    except Exception as error:  # while the program is imported; what comes later its own guard has seen
        from flux_jax.cli.main import foreseeable

        if (found := foreseeable(error)) is None:
            raise
        status, sentence = found
        console.say(sentence)
        return status
