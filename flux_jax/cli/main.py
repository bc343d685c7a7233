"""What every program shares: its parser, its guard, its exit status; and the script `flux-jax`, which has them all.

In: the arguments of a command line. Out: an exit status: 0, 2 (bad input), 3 (missing or gated weights), 4 (out of
memory), 130 (Ctrl-C), 143 (SIGTERM); every foreseeable failure is one sentence on stderr, stdout has only what a script
would read.

`flux-jax NAME ...` is `python -m flux_jax.NAME ...`, and `flux-jax convert` is `python -m convert`.
"""

import argparse
import contextlib
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from flux_jax.errors import UserError, pip_install, shortened
from flux_jax.io.places import disk_is_full
from flux_jax.io.reading import reason
from flux_jax.runtime import environment, memory, stopping, watchdog
from flux_jax.runtime.console import output, output_json, say

__all__ = ["Parser", "check_device", "guarded", "main", "output", "output_json", "path", "program", "say", "whole"]

SCRIPT = "flux-jax"
NO_MEMORY = "Out of memory; this needs a machine with more of it."
NO_DISK = "The disk is full: free some space."
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


def expanded(text: str) -> str:
    """`path` for what is not only a path, a template or the name of a model: "~" is the home folder,
    any other text stays as it is."""
    return f"{path(text)}{'/' * text.endswith('/')}" if text.startswith("~") else text


def whole(least: int, most: int) -> Callable[[str], int]:
    """What argparse calls with an argument that is a whole number within bounds."""

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):  # no number, or one of thousands of digits
            if least <= (value := int(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, not {shortened(text)}")

    return read


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
    parser.add_argument("--version", action="version", version=f"flux_jax {environment.version()}")

    def refuse(argv: Sequence[str]) -> None:
        parser.parse_args(argv)
        parser.error("the name of a program comes first")

    return guarded(refuse, argv or ["--help"])


def guarded(
    command: Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None = None,
    *,
    interrupted: str = "Interrupted.",
    no_memory: str = NO_MEMORY,
    no_disk: str = NO_DISK,
) -> int:
    """Calls it with the arguments, by default the process's own, and returns the exit status: what it returned, or 0
    for None. Foreseeable failures, and warnings meant for users, are sentences on stderr; the three last arguments are
    those for Ctrl-C and SIGTERM, for memory and for disk."""
    try:
        with stopping.caught(interrupted), warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_, **__: say(in_flags(str(message)))
            status = command(sys.argv[1:] if argv is None else argv) or 0
        watchdog.leave()
        return status
    except BaseException as error:
        if number := stopping.stopped_by(error):
            stopping.speak()
            status = 128 + number
        elif found := foreseeable(error, no_memory, no_disk):
            status, sentence = found
            say(sentence)
        elif watchdog.several() and isinstance(error, Exception):
            watchdog.stop()
        else:
            raise
    if watchdog.several():
        os._exit(status)  # at once: an ordinary exit would wait for the others
    return status


def foreseeable(error: BaseException, no_memory: str = NO_MEMORY, no_disk: str = NO_DISK) -> tuple[int, str] | None:
    """The exit status and the sentence of a failure that is no bug of ours; None for one that is."""
    if isinstance(error, UserError):
        return error.exit_code, in_flags(str(error))
    if memory.is_exhausted(error):
        return 4, no_memory
    if disk_is_full(error):
        return 2, no_disk
    if isinstance(error, OSError) and error.filename is not None:  # the last net: readers and writers say more
        return 2, str(UserError(f"Cannot use {error.filename}: {reason(error)}."))
    if isinstance(error, Exception) and (refusal := environment.refusal_to_start(error)):
        return 2, str(refusal)
    return None


def in_flags(text: str) -> str:
    """The library names its arguments as Python does, `offload="layers"`; on a command line these are flags of the same
    names, `--offload layers`, and `overwrite=True` is `--overwrite`."""
    text = re.sub(r"\b([a-z_]+)=True\b", lambda found: f"--{found[1].replace('_', '-')}", text)
    return re.sub(r'\b([a-z_]+)="([^"]*)"', lambda found: f"--{found[1].replace('_', '-')} {found[2]}", text)


def check_device(device: str | None) -> None:
    """Starts JAX. No silent fallback: a GPU that was asked for must be there, one that is there but not usable is
    mentioned."""
    environment.start_jax()
    import jax

    if jax.default_backend() == "gpu" or device == "cpu":
        return
    asked = os.environ.get("JAX_PLATFORMS")
    if device == "gpu" and asked and not {"gpu", "cuda", "rocm"} & set(asked.split(",")):
        raise UserError(
            f"JAX_PLATFORMS={shortened(asked, quote=False)} keeps JAX from a GPU; unset it, or --device cpu."
        )
    if device == "gpu":
        raise UserError(f"JAX finds no GPU; install its plugin with {pip_install('cuda13')}, or use --device cpu.")
    if not asked and Path("/proc/driver/nvidia/version").exists():
        say(f"JAX cannot use the NVIDIA driver that is here: running on the CPU ({pip_install('cuda13')}).")
