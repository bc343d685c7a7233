"""`python -m bench.tune`: tries the Triton kernel's settings on this GPU, and writes the quickest with all raw times.

In: a GPU. For each (n, k) of FLUX's ternary layers, number of rows and kind of activations, all settings that could
suit are compiled, several at a time, run one by one, and checked against float64; the quickest are run again, at
length. Out: `pallas_kernels/tuned/<device>.json`, which `pallas_kernels.settings` reads from then on. It is written
after every product, and products that are in it already are not tried again, so that a run may be cut off at any time.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bench import report, timing
from bench.kernels import FEW_ROWS, device_for, shape
from bench.products import LIMITS, error, expected, kernel, operands, quantized, shapes
from flux_jax.config import dev, nano
from flux_jax.images import write_whole
from pallas_kernels import LAYOUT_VERSION, Target, current_target, packed_width
from pallas_kernels.settings import Settings, choose_settings, table_path

OPERANDS = {"int8": "int8", "bfloat16": "bf16"}  # dtype of the activations that meet the weights -> kind of activations
SHARED_BYTES = 227 * 1024  # of a block of threads on the largest GPU: more never compiles
ACCUMULATORS = (64, 128)  # float32 or int32 registers a thread keeps for its tile: fewer idle, more spill
FINALISTS = 4


def candidates(m: int, k: int, operand: str) -> list[Settings]:
    """Settings that may suit m rows of k numbers: they fill tensor cores, registers and shared memory, and no more."""
    if m <= FEW_ROWS:
        grid = itertools.product((16,), (16, 32, 64, 128), (128, 256, 512, 1024), (1, 2, 4, 8), (2, 4))
    else:
        grid = itertools.product((64, 128, 256), (64, 128, 256), (128, 256, 512), (4, 8), (2, 3, 4))
    return [settings for values in grid if suits(settings := Settings(*values), m, k, operand)]


def suits(settings: Settings, m: int, k: int, operand: str) -> bool:
    """By the arithmetic of a tile: its steps end with the row, its parts fit, no thread has too little to do."""
    block_m, block_n, block_k, warps, stages = dataclasses.astuple(settings)
    if 4 * packed_width(k) % block_k or block_m > max(64, m):
        return False
    packed_tile, tile = block_n * block_k // 4, block_m * block_k * jnp.dtype(operand).itemsize
    if stages * tile + (stages - 1) * packed_tile > SHARED_BYTES:
        return False
    threads = 32 * warps
    if m <= FEW_ROWS:
        return 8 <= packed_tile // threads <= 64
    return ACCUMULATORS[0] <= block_m * block_n // threads <= ACCUMULATORS[1]


@dataclasses.dataclass
class Trial:
    """One setting: seconds of a call, sample by sample, or why there are none."""

    settings: Settings
    program: Any = None
    failure: str | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        times = {"samples_us": [round(s * 1e6, 3) for s in self.seconds]}
        return {"settings": dataclasses.astuple(self.settings)} | ({"failure": self.failure} if self.failure else times)


def compile_all(trials: Sequence[Trial], x: Any, copies: Sequence[Any], rounds: int) -> None:
    """Fills in `program` or `failure`. Traced one by one, compiled side by side: XLA needs no lock of Python's."""

    def attempt(trial: Trial, call: Any) -> Any:
        try:
            return call()
        except Exception as error:  # every fault of a setting (too much shared memory) is a result, whatever raised it
            trial.failure = (str(error).strip() or type(error).__name__).splitlines()[0][:200]

    lowered = []
    for trial in trials:
        program = timing.loop(functools.partial(kernel, settings=trial.settings), rounds)
        lowered.append(attempt(trial, functools.partial(program.lower, x, copies)))
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) * 3 // 4)) as pool:
        pairs = zip(trials, lowered, strict=True)
        compiled = pool.map(lambda pair: pair[1] and attempt(pair[0], pair[1].compile), pairs)
        for trial, program in zip(trials, compiled, strict=True):
            trial.program = program


def tune(m: int, n: int, k: int, operand: str, tries: Sequence[Settings], tiny: bool) -> dict[str, Any] | None:
    """The row of the table for one product, its quickest setting that is also right; None if there is no such."""
    x, _, weights = operands(m, n, k)
    right = expected(OPERANDS[operand], x, weights)
    x = quantized(x) if operand == "int8" else x
    own = choose_settings(current_target(), m, n, k, operand)
    trials = [Trial(settings) for settings in dict.fromkeys([own, *tries])]
    copies = timing.copies(weights, 1 if tiny else None)
    guess = max(2 * m * n * k / 5e14, n * k / 8e12, 4e-6)
    rounds = 1 if tiny else max(1, timing.rounds_for(guess, len(copies)) // 3)
    compile_all(trials, x, copies, rounds)
    for trial in trials:
        if trial.program is not None:
            trial.seconds = timing.samples(trial.program, x, copies, rounds, 3)
            wrong = max(error(y, right) for y in trial.program(x, copies)[:1])
            if wrong > LIMITS[OPERANDS[operand]]:
                trial.failure = f"wrong: error {wrong:.3g}"
    good = sorted((t for t in trials if not t.failure), key=lambda t: np.median(t.seconds))
    if not good:
        return None
    finalists = good[:FINALISTS] + [trial for trial in good[FINALISTS:] if trial.settings == own]
    for trial in finalists:
        trial.seconds = timing.samples(trial.program, x, copies, rounds, 15)
    best = min(finalists, key=lambda t: np.median(t.seconds))
    before = next((float(np.median(t.seconds)) for t in finalists if t.settings == own), None)
    row = {"operand": operand, "m": m, "n": n, "k": k, "settings": dataclasses.asdict(best.settings)}
    return row | {
        "seconds": float(np.median(best.seconds)),
        "seconds_before": before,
        "settings_before": dataclasses.astuple(own),
        "trials": [trial.to_json() for trial in trials],
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run with the same layout."""
    table = json.loads(path.read_text()) if path.is_file() else {}
    return table["rows"] if table.get("layout") == LAYOUT_VERSION else []


def write(path: Path, target: Target, rows: Sequence[dict[str, Any]]) -> None:
    about = {"device": target.name, "compute_capability": target.compute_capability, "layout": LAYOUT_VERSION}
    about |= {"versions": report.versions(), "commit": report.commit()}
    about |= {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")}
    lines = ",\n".join("  " + json.dumps(row) for row in rows)  # a row a line: it can be read, and compared
    write_whole(path, f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n'.encode(), overwrite=True)


def main(argv: Sequence[str]) -> None:
    args = options(argv)
    begun = time.monotonic()
    every = shapes(nano() if args.tiny else dev())
    wanted = [shape_ for shape_ in args.shapes or sorted(every, key=lambda s: -s[0] * s[1]) if shape_ in every]
    with device_for(args.tiny):
        target = current_target()
        path = args.table or (None if args.tiny else table_path(target.name))
        rows = read(path) if path and not args.again else []
        done = {(row["operand"], row["m"], row["n"], row["k"]) for row in rows}
        numbers = args.m or ([33] if args.tiny else [4608, 1])
        for operand, m, (n, k) in itertools.product(args.operands, numbers, wanted):
            if (operand, m, n, k) in done:
                continue
            if time.monotonic() - begun > args.seconds:
                report.say(f"{args.seconds} s are over; the same command goes on where this one stops")
                break
            tries = candidates(m, k, operand)
            tries = tries[:: max(1, len(tries) // 2)] if args.tiny else tries
            report.say(f"{operand} {m} x {n} x {k}: {len(tries)} settings")
            row = tune(m, n, k, operand, tries, args.tiny)
            if row is None:
                report.say("none of them ran and was right")
                continue
            rows.append(row)
            if path is not None:
                write(path, target, rows)
    header = ["operand", "m", "n", "k", "settings", "us", "before", "us before", "TFLOP/s"]
    print(report.table(header, map(line, rows)))
    kept = [{**row, "trials": len(row["trials"])} for row in rows]
    report.finish("tune", {"tiny": args.tiny, "table": path and path.name, "rows": kept}, save=args.save)


def line(row: dict[str, Any]) -> list[Any]:
    settings = "x".join(map(str, row["settings"].values()))
    before = "x".join(map(str, row["settings_before"]))
    old = row["seconds_before"] and f"{row['seconds_before'] * 1e6:.1f}"
    rate = 2 * row["m"] * row["n"] * row["k"] / row["seconds"] / 1e12
    product = [row["operand"], row["m"], row["n"], row["k"]]
    return [*product, settings, f"{row['seconds'] * 1e6:.1f}", before, old, rate]


def options(argv: Sequence[str]) -> argparse.Namespace:
    parser = report.parser("tune", __doc__)
    add = parser.add_argument
    add("--m", nargs="+", type=int, help="numbers of rows (default: 4608 and 1)")
    add("--shapes", nargs="+", type=shape, metavar="NxK", help="default: all of FLUX's, the largest first")
    add("--operands", nargs="+", default=list(OPERANDS), choices=list(OPERANDS))
    add("--seconds", type=float, default=3600.0, help="begin no further product after so long (default: 3600)")
    add("--table", type=Path, metavar="FILE", help="default: pallas_kernels/tuned/<device>.json")
    add("--again", action="store_true", help="also what the table holds already")
    add("--tiny", action="store_true", help="small products on any device, to try the program; writes --table only")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(report.run(main))
