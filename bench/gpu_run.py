"""`python -m bench.gpu_run`: one visit to a machine with a GPU, of a few minutes and without a second chance.

In: a folder, seconds, names of steps. Out: OUT/results.jsonl, every result the moment it is known; OUT/log.txt, all
that the steps print; OUT/summary.txt, and its most important lines on stdout. Each of `STEPS` is a process of its own
with a time box: one that fails, hangs or is killed costs only itself, and one for which too little time is left is not
begun. This process starts no JAX, so that the GPU is the steps' own. `GPU_RUN.md` says how to go about it.
"""

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

if not __package__:  # run by its path: with this folder as the first of sys.path, bench/convert.py would hide `convert`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import journal, process, report, summary
from flux_jax.errors import UserError

NO_TRITON_GEMM = "--xla_gpu_enable_triton_gemm=false"  # XLA tries cuBLAS alone: seconds of autotuning, not minutes
QUICK_COMPILING = "--xla_backend_optimization_level=0"  # for a rehearsal, in which nothing is timed
ENDINGS = (signal.SIGTERM, signal.SIGINT)
OUT = "{out}"  # in a step's arguments: the visit's folder
RESERVE = 3.0  # seconds at the end for the summary
MARGIN = 8.0  # seconds before its box's end, counted from behind its imports, after which a step begins nothing more
TINY_BOX, TINY_LANES = 300.0, 2  # seconds of a step that only rehearses; so many at a time, since nothing is timed
DEVICE_TESTS = [f"tests/kernels/test_{name}.py" for name in ("triton", "fused", "channels", "ternary_matmul")]


class Step(NamedTuple):
    """One step. arguments: behind `python`, to which come --rows, --label, --seconds and, for a rehearsal, --tiny; box:
    the seconds it may take; least: those without which it is not begun; env: variables of its own; tiny: arguments of a
    rehearsal, where they are others; triton_gemm: whether XLA may try its own matrix products in Triton. `OUT` in a
    word is the visit's folder."""

    arguments: Sequence[str]
    box: float
    least: float
    env: Mapping[str, str] = MappingProxyType({})
    tiny: Sequence[str] | None = None
    triton_gemm: bool = False


def _bench(name: str, *arguments: str) -> list[str]:
    return ["-m", f"bench.{name}", *arguments]


def _picture(name: str, box: float = 80) -> Step:
    arguments = _bench("denoise", "--trial", name)
    return Step(
        [*arguments, "--steps", "8", "--samples", "4"], box, 40, tiny=[*arguments, "--steps", "2", "--samples", "1"]
    )


def _tests(*files: str) -> list[str]:
    """pytest with a plugin that writes rows; without the type checker and further processes where they are missing."""
    arguments = ["-m", "pytest", "-p", "bench.pytest_rows", *files, "-q", "--tb=line", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and len(files) > 1:
        arguments += ["-n", "6"]
    return arguments if importlib.util.find_spec("beartype") else [*arguments, "-o", "addopts=--import-mode=importlib"]


XLA_PRODUCTS = _bench("kernels", "--implementations", "A8 scratch", "fp8 scratch", "--m")
# In the order of what must not be missing. The boxes add up to more than the visit: a step seldom takes all of its own.
STEPS = {
    "machine": Step(_bench("machine"), 40, 5),
    "correct": Step(_bench("correct"), 100, 25),
    "kernels": Step(_bench("kernels"), 120, 40),
    "A8": _picture("ternary A8"),
    "bf16": _picture("bf16"),
    "baseline": Step(_bench("baseline"), 40, 15),
    "A16": _picture("ternary A16"),
    "fused": Step(_bench("fused"), 60, 20),
    "nano": Step(_bench("nano_latents"), 60, 20),
    "energy": Step(_bench("energy"), 30, 12),
    "distill": Step(_bench("distill_steps", "--steps", "12"), 75, 35, tiny=_bench("distill_steps", "--steps", "1")),
    "xla_int8": Step(
        [*XLA_PRODUCTS, "4608", "--shapes", "12288x3072", "3072x15360"],
        50,
        25,
        triton_gemm=True,
        tiny=[*XLA_PRODUCTS, "33", "--shapes", "128x128"],
    ),
    "pytest": Step(
        _tests(*DEVICE_TESTS),
        120,
        45,
        {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTEST_ADDOPTS": ""},  # several processes share the GPU's memory
        tiny=_tests("tests/kernels/test_packing.py"),
    ),
    "tune": Step(_bench("tune", "--table", f"{OUT}/tuned.json"), 120, 40),
    "mosaic": Step(_bench("mosaic"), 60, 20),
    "diffusers": _picture("diffusers bf16", 90),
}
LATER = ("tune", "mosaic", "diffusers")  # not unless they are asked for


def environment(step: Step | None = None, tiny: bool = False) -> dict[str, str]:
    """Variables of a step: programs are compiled once for the whole visit, and nothing waits for a network."""
    flags = [os.environ.get("XLA_FLAGS", "")]
    flags += [] if step and step.triton_gemm else [NO_TRITON_GEMM]
    flags += [QUICK_COMPILING] if tiny else []
    return {
        "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "flux_jax_gpu_run"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_RAISE_PERSISTENT_CACHE_ERRORS": "false",
        "XLA_FLAGS": " ".join(filter(None, flags)),
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "1",
        "HF_HUB_OFFLINE": "1",
        **(step.env if step else {}),
    }


class Interrupted(BaseException):
    """The visit is ended from outside: what is known is still summed up."""


def interrupt(number: int, _frame: Any) -> None:
    """The signal's handler. Once is enough."""
    for each in ENDINGS:
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(signal.Signals(number).name)


class Visit:
    """Runs steps one after the other. `rows`: what they found, with that for which the disk had no room."""

    def __init__(self, out: Path, seconds: float, tiny: bool):
        self.out, self.tiny, self.end = out, tiny, time.monotonic() + seconds
        self.path, self.lost = out / "results.jsonl", []
        self.earlier = len(journal.read(self.path))  # rows of another visit to the same folder

    @property
    def rows(self) -> list[dict[str, Any]]:
        return journal.read(self.path)[self.earlier :] + self.lost

    def run(self, name: str, step: Step) -> None:
        """One step; its end, or why it was not begun, is a row."""
        left = self.end - time.monotonic() - RESERVE
        if left < step.least:
            return self._ended(name, skipped=f"{max(0.0, left):.0f} s left")
        box = min(TINY_BOX if self.tiny else step.box, left)
        arguments = step.tiny if self.tiny and step.tiny else step.arguments
        begin = max(box - MARGIN, box / 2)
        options = ["--rows", str(self.path), "--label", name, "--seconds", f"{begin:.1f}", *["--tiny"] * self.tiny]
        try:
            ended = process.run(
                [*(word.replace(OUT, str(self.out)) for word in arguments), *options],
                seconds=box,
                env=environment(step, self.tiny),
                log=self.out / "log.txt",
            )
        except Interrupted as why:
            self._ended(name, failure=f"interrupted by {why}")
            raise
        except OSError as error:  # there is no room for another process
            return self._ended(name, failure=journal.sentence(error))
        self.lost += summary.unwritten(ended.err)
        failure = {"failure": ended.failure} if ended.failure else {}
        self._ended(name, exit=ended.status, seconds=round(ended.seconds, 1), **failure)

    def _ended(self, name: str, **found: Any) -> None:
        row = {"step": name, "time": round(time.time(), 1), **found}
        if not journal.append(self.path, row):
            self.lost.append(row)
        print(summary.line(row), flush=True)


def main(argv: Sequence[str], steps: Mapping[str, Step] = STEPS) -> None:
    """UserError, with status 1, where a result is wrong or a step failed."""
    args = options(argv)
    if args.reference:
        arguments = _bench("nano_latents", "--reference", str(args.reference.resolve()), *["--tiny"] * args.tiny)
        if failure := process.run(arguments, env=environment()).failure:
            raise UserError(failure, 1)
        return
    names = args.steps or [name for name in steps if args.tiny or name not in LATER]
    if unknown := [name for name in names if name not in steps]:
        raise UserError(f"{unknown[0]} is no step: expected some of {', '.join(steps)}.")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.out} cannot be made: {error.strerror}.") from None
    visit = Visit(args.out.resolve(), args.seconds, args.tiny)
    handlers = {number: signal.signal(number, interrupt) for number in ENDINGS}
    try:
        try:
            with ThreadPoolExecutor(TINY_LANES) as pool:  # a visit's steps run in this thread, where a signal ends them
                list((pool.map if args.tiny else map)(visit.run, names, [steps[name] for name in names]))
        except Interrupted:
            report.say("interrupted")
        for number in ENDINGS:
            signal.signal(number, signal.SIG_IGN)  # what follows is short, and must be whole
        finish(visit)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def finish(visit: Visit) -> None:
    """Writes and prints what was found. UserError, with status 1, where some of it is a problem."""
    rows = visit.rows
    try:
        (visit.out / "summary.txt").write_text(summary.whole(rows) + "\n")
    except OSError as error:
        report.say(f"summary.txt is not written: {error.strerror}")
    print(summary.brief(rows), flush=True)
    if problems := sum(map(summary.is_problem, rows)):
        raise UserError(f"{problems} rows are wrong or failed.", 1)


def options(argv: Sequence[str]) -> argparse.Namespace:
    parser = report.command_line("gpu_run", __doc__)
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="DIR", help="a folder, made if need be")
    where.add_argument(
        "--reference", type=Path, metavar="FILE", help="before, on a CPU: FLUX-nano's latents, to carry along"
    )
    add("--seconds", type=float, default=450.0, help="of the whole visit (default: %(default)s)")
    add("--steps", nargs="+", metavar="NAME", help=f"of {', '.join(STEPS)} (default: all but {', '.join(LATER)})")
    add("--tiny", action="store_true", help="rehearse all steps, on any device, with small work")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(report.run(main))
