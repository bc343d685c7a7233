"""What every program shares: its parser, its guard, its exit status; and the script `flux-jax`, which has them all.

In: the arguments of a command line. Out: an exit status: 0, 2 (bad input), 3 (missing or gated weights), 4 (out of
memory), 130 (interrupted); every foreseeable failure is one sentence on stderr, stdout has only what a script would
read.

`flux-jax NAME ...` is `python -m flux_jax.NAME ...`, and `flux-jax convert` is `python -m convert`.
"""

import argparse
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from flux_jax.errors import UserError, pip_install
from flux_jax.io.atomic import disk_is_full
from flux_jax.runtime import memory, watchdog
from flux_jax.runtime.console import output, output_json, say
from flux_jax.runtime.environment import version

__all__ = ["Parser", "check_device", "guarded", "main", "output", "output_json", "path", "program", "say"]

SCRIPT = "flux-jax"
PROGRAMS = {  # name -> module with `main`, what it is for
    "generate": ("flux_jax.cli.generate", "draw pictures from prompts"),
    "convert": ("convert.__main__", "published weights become a checkpoint, and back"),
    "plan": ("flux_jax.cli.plan", "the memory that a picture takes on a device"),
    "doctor": ("flux_jax.cli.doctor", "what this machine lacks, and what mends it"),
    "prompts": ("flux_jax.cli.prompts", "fetch, make and count the prompts of a distillation"),
    "distill": ("flux_jax.cli.distill", "a checkpoint becomes a 1.58-bit one"),
    "distill.compare": ("flux_jax.cli.velocity_error", "how near a student's velocities are to its teacher's"),
    "evaluate": ("flux_jax.cli.evaluate", "pictures for benchmarks, their scores, FLUX-nano's own"),
    "compare": ("flux_jax.cli.compare", "two models side by side, from the same noise"),
    "nano.train": ("flux_jax.cli.nano", "train FLUX-nano"),
    "nano.oracle_error": ("flux_jax.cli.oracle_error", "how often FLUX-nano's oracle errs"),
}


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}; see --help.")


def path(text: str) -> Path:
    """A path among the arguments. A shell expands "~" only where a word begins with it, not behind "--output=": here it
    is always the home folder. UserError where there is none."""
    if text == "~" or text.startswith("~/"):
        home = os.path.expanduser(text)
        if home == text:
            raise UserError(f"{text} is in the home folder, and this machine names none: set HOME, or give the path.")
        return Path(home)
    return Path(text)


def program(name: str) -> str:
    """How the program was called, for its usage line."""
    if Path(sys.argv[0]).name == SCRIPT:
        return f"{SCRIPT} {name}"
    return f"python -m {name}" if name == "convert" else f"python -m flux_jax.{name}"


def main(argv: Sequence[str] | None = None) -> int:
    """The script: hands the arguments behind a program's name to that program, and returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in PROGRAMS:
        return importlib.import_module(PROGRAMS[argv[0]][0]).main(argv[1:])
    parser = Parser(
        prog=SCRIPT,
        description="FLUX.1 in 1.58 bits.",
        epilog="\n".join(f"  {name:18}{about}" for name, (_, about) in PROGRAMS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("program", metavar="PROGRAM", choices=list(PROGRAMS), help="one of those below; see its --help")
    parser.add_argument("--version", action="version", version=f"flux_jax {version()}")

    def refuse(argv: Sequence[str]) -> None:
        parser.parse_args(argv)
        parser.error("the name of a program comes first")

    return guarded(refuse, argv or ["--help"])


def guarded(
    command: Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None = None,
    *,
    interrupted: str = "Interrupted.",
    no_memory: str = "Out of memory; this needs a machine with more of it.",
    no_disk: str = "The disk is full: free some space.",
) -> int:
    """Calls it with the arguments, by default the process's own, and returns the exit status: what it returned, or 0
    for None. Foreseeable failures, and warnings meant for users, are sentences on stderr; the three last arguments are
    those for Ctrl-C, for memory and for disk."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_, **__: say(in_flags(str(message)))
            status = command(sys.argv[1:] if argv is None else argv) or 0
        watchdog.leave()
        return status
    except UserError as error:
        status, sentence = error.exit_code, in_flags(str(error))
    except KeyboardInterrupt:
        status, sentence = 130, interrupted
    except Exception as error:
        if memory.is_exhausted(error):
            status, sentence = 4, no_memory
        elif disk_is_full(error):
            status, sentence = 2, no_disk
        elif watchdog.several():
            watchdog.stop()
        else:
            raise
    say(sentence)
    if watchdog.several():
        os._exit(status)  # at once: an ordinary exit would wait for the others
    return status


def in_flags(text: str) -> str:
    """The library names its arguments as Python does, `offload="layers"`; on a command line these are flags of the same
    names, `--offload layers`, and `overwrite=True` is `--overwrite`."""
    text = re.sub(r"\b([a-z_]+)=True\b", lambda found: f"--{found[1].replace('_', '-')}", text)
    return re.sub(r'\b([a-z_]+)="([^"]*)"', lambda found: f"--{found[1].replace('_', '-')} {found[2]}", text)


def check_device(device: str | None) -> None:
    """No silent fallback: a GPU that was asked for must be there, one that is there but not usable is mentioned."""
    import jax

    if jax.default_backend() == "gpu" or device == "cpu":
        return
    if device == "gpu":
        raise UserError(f"JAX finds no GPU; install its plugin with {pip_install('cuda13')}, or use --device cpu.")
    if Path("/proc/driver/nvidia/version").exists():
        say(f"JAX cannot use the NVIDIA driver that is here: running on the CPU ({pip_install('cuda13')}).")
