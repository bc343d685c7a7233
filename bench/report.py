"""What all benchmarks share: a table for people, one JSON object for programs, and the file that is committed.

In: figures, as anything that JSON can hold. Out: on stdout a table and, as the last line, `{"bench", "device",
"versions", "commit", "date", "figures"}`; with --save the same object as `bench/results/NAME.json`. Progress and
errors go to stderr.
"""

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.journal import Journal
from flux_jax.cli.main import guarded, say
from flux_jax.errors import DISTRIBUTION, UserError
from flux_jax.io.atomic import write_whole
from flux_jax.runtime.environment import version_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("jax", "jaxlib", "flax", "jax-cuda13-plugin")


def command_line(name: str, description: str | None) -> argparse.ArgumentParser:
    """Of a program of this folder, without options yet."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parser(name: str, description: str | None, *, tiny: str | None = None) -> argparse.ArgumentParser:
    """Options that every benchmark has: --save, and for `journal` --rows, --label and --seconds; and --tiny, for those
    that say what it is."""
    made = command_line(name, description)
    made.add_argument(
        "--save",
        nargs="?",
        type=Path,
        const=RESULTS / f"{name}.json",
        metavar="FILE",
        help=f"write the JSON object to a file (default: bench/results/{name}.json)",
    )
    made.add_argument("--rows", type=Path, metavar="FILE", help="append each result to a file the moment it is known")
    made.add_argument("--label", default=name, help="what the rows are called there (default: %(default)s)")
    made.add_argument("--seconds", type=float, default=math.inf, help="begin nothing more after so long")
    if tiny is not None:
        made.add_argument("--tiny", action="store_true", help=tiny)
    return made


def journal(args: argparse.Namespace) -> Journal:
    """The rows of a benchmark, as the options of `parser` say."""
    return Journal(args.rows, args.label, args.seconds)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns of equal width: words to the left, numbers to the right, None as a dash, floats with three digits."""
    cells = [[_cell(value) for value in row] for row in rows]
    numbers = [all(_is_number(row[i]) for row in cells) for i in range(len(header))]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        columns = zip(row, widths, numbers, strict=True)
        return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in columns).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, cells)])


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.replace(",", "").replace(".", "").replace("e", "").strip("+-x%").isdigit()


def versions() -> dict[str, str]:
    """Of Python, this package and JAX's parts, as far as they are installed."""
    found = {"python": platform.python_version(), DISTRIBUTION: version_of(DISTRIBUTION) or "clone"}
    return found | {name: version for name in PACKAGES if (version := version_of(name))}


def commit() -> str | None:
    """The clone's commit, with "-dirty" where tracked files differ from it; None outside a clone."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def device() -> str:
    """What JAX computes on, such as "NVIDIA H100 80GB HBM3", or the host's CPU."""
    import jax

    first = jax.local_devices()[0]
    return f"cpu ({platform.machine()})" if first.platform == "cpu" else first.device_kind


def has_gpu(tiny: bool) -> bool:
    """Whether JAX computes on a GPU. UserError where it does not, unless `tiny` says that no time is wanted."""
    import jax

    found = jax.default_backend() == "gpu"
    if not found and not tiny:
        raise UserError("JAX finds no GPU, and the time of a CPU would say nothing: add --tiny to try the program")
    return found


def leave_memory() -> None:
    """Before JAX starts in a process that only starts others: they find the GPU's memory free."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def finish(name: str, figures: dict[str, Any], *, save: Path | None = None, on: str | None = None) -> dict[str, Any]:
    """Print the JSON object, and write it to `save` if that is given; returns it. on: the device, if not JAX's own."""
    result = {
        "bench": name,
        "device": on or device(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "figures": figures,
    }
    if save is not None:
        write_whole(save, (json.dumps(result, indent=1) + "\n").encode(), overwrite=True)
        say(f"written: {save}")
    sys.stdout.flush()
    print(json.dumps(result), flush=True)
    return result


def run(main: Callable[[Sequence[str]], Any]) -> int:
    """`main` on the command line, whatever it returns; foreseeable failures are sentences on stderr. Returns the exit
    status."""

    def command(argv: Sequence[str]) -> None:
        main(argv)

    return guarded(command)
