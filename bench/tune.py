"""`python -m bench.tune`: tries the Triton kernel's settings on this GPU, and writes the quickest with all raw times.

In: a GPU. For each product of FLUX's ternary layers, with what it ends with as the model runs it, a few settings that
have reasons (with --all every one that could suit) are compiled, several at a time, run one by one, and checked. Out:
`pallas_kernels/tuned/<device>.json`, which `pallas_kernels.dispatch` reads from then on. It is written after every
product, and products that are in it already are not tried again, so that a run may be cut off at any time.
"""

import argparse
import dataclasses
import datetime
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import report, timing
from bench.implementations import fused_case, kernel
from bench.journal import Journal
from bench.kernels import shape
from bench.products import Product
from bench.tiles import OPERANDS, candidates, own_settings, tile, wanted
from bench.timing import device_for
from flux_jax.config import FluxConfig, dev, nano
from flux_jax.errors import UserError
from flux_jax.io.atomic import write_whole
from pallas_kernels import LAYOUT_VERSION, Target, current_target
from pallas_kernels.tiling import TileConfig, table_path

PRODUCT_SECONDS = 10.0  # without which a product is not begun


def tune(
    product: Product, operand: str, tries: Sequence[TileConfig], head: int, journal: Journal, *, tiny: bool
) -> dict[str, Any] | None:
    """The row of the table for one product, its quickest setting that is also right; None if there is no such."""
    every = [own_settings(product, operand, head), *tries]
    cases = [
        fused_case(
            product,
            head,
            {"operand": operand, "tile": tile(dataclasses.astuple(settings))},
            functools.partial(kernel, settings=settings),
            OPERANDS[operand],
        )
        for settings in every
    ]
    trials = timing.run(cases, journal, tiny=tiny)
    good = [(trial["seconds"], settings) for trial, settings in zip(trials, every, strict=True) if trial.get("correct")]
    if not good:
        return None
    seconds, best = min(good, key=lambda pair: pair[0])
    labels = {"operand": operand, "epilogue": product.epilogue, **dict(zip("mnk", product[:3], strict=True))}
    return labels | {
        "settings": dataclasses.asdict(best),
        "seconds": seconds,
        "settings_before": dataclasses.astuple(every[0]),
        "seconds_before": trials[0]["seconds"] if trials[0].get("correct") else None,
        "trials": [
            {"settings": dataclasses.astuple(settings), **outcome(trial)}
            for settings, trial in zip(every, trials, strict=True)
        ],
    }


def outcome(trial: dict[str, Any]) -> dict[str, Any]:
    """Every sample, or why there are none that count."""
    if "seconds" not in trial:
        return {"failure": timing.missing(trial)}
    if not trial["correct"]:
        return {"failure": f"wrong: error {trial['error']:.3g}"}
    return {"samples_us": trial["samples_us"]}


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run with the same layout. UserError where the file holds something else."""
    try:
        table = json.loads(path.read_text()) if path.is_file() else {}
        return table["rows"] if table.get("layout") == LAYOUT_VERSION else []
    except (AttributeError, KeyError, ValueError):
        raise UserError(f"{path} is no table of measured settings: remove it, or name another --table.") from None


def write(path: Path, target: Target, rows: Sequence[dict[str, Any]]) -> None:
    """The table as `pallas_kernels.tiling.read_table` takes it."""
    about = {"device": target.name, "compute_capability": target.compute_capability, "layout": LAYOUT_VERSION}
    about |= {"versions": report.versions(), "commit": report.commit()}
    about |= {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")}
    lines = ",\n".join("  " + json.dumps(row) for row in rows)  # a row a line: it can be read, and compared
    try:
        write_whole(path, f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n'.encode(), overwrite=True)
    except UserError as error:  # a full disk: the journal has the row, and the next product may find room
        report.say(str(error))


def main(argv: Sequence[str]) -> None:
    args = options(argv)
    journal, config = report.journal(args), nano() if args.tiny else dev()
    head = config.transformer.head_dim
    with device_for(args.tiny):
        target = current_target()
        path = args.table or (None if args.tiny else table_path(target.name))
        rows = read(path) if path and not args.again else []
        done = {(row["operand"], row["epilogue"], row["m"], row["n"], row["k"]) for row in rows}
        for operand in args.operands:
            for product in chosen(config, operand, args):
                m, n, k, epilogue = product[:4]
                if (operand, epilogue, m, n, k) in done:
                    continue
                if journal.left() < PRODUCT_SECONDS:  # the same command goes on where this one stops
                    labels = {"operand": operand, "epilogue": epilogue, "m": m, "n": n, "k": k}
                    journal.row(**labels, skipped=f"less than {PRODUCT_SECONDS:.0f} s left")
                    continue
                tries = candidates(product, operand, head, args.all)[: 1 if args.tiny else None]
                report.say(f"{operand} {m} x {n} x {k}, {epilogue}: {1 + len(tries)} settings")
                row = tune(product, operand, tries, head, journal, tiny=args.tiny)
                if row is None:
                    report.say("none of them ran and was right")
                    continue
                rows.append(row)
                journal.row(**{key: value for key, value in row.items() if key != "trials"})
                if path is not None:
                    write(path, target, rows)
    header = ["operand", "epilogue", "m", "n", "k", "settings", "us", "before", "us before", "TFLOP/s"]
    print(report.table(header, map(line, rows)))
    kept = [{**row, "trials": len(row["trials"])} for row in rows]
    report.finish("tune", {"tiny": args.tiny, "table": path and path.name, "rows": kept}, save=args.save)


def chosen(config: FluxConfig, operand: str, args: argparse.Namespace) -> list[Product]:
    """Those of `wanted` that the options name; with --tiny, and nothing named, the first of each epilogue."""
    products = [p for p in wanted(config, operand) if args.m is None or p.m in args.m]
    products = [p for p in products if args.shapes is None or (p.n, p.k) in args.shapes]
    if args.tiny and args.m is None and args.shapes is None:
        products = list({p.epilogue: p for p in reversed(products)}.values())
    return products


def line(row: dict[str, Any]) -> list[Any]:
    settings, before = tile(row["settings"].values()), tile(row["settings_before"])
    old = row["seconds_before"] and f"{row['seconds_before'] * 1e6:.1f}"
    rate = 2e-12 * row["m"] * row["n"] * row["k"] / row["seconds"]
    product = [row[key] for key in ("operand", "epilogue", "m", "n", "k")]
    return [*product, settings, f"{row['seconds'] * 1e6:.1f}", before, old, rate]


def options(argv: Sequence[str]) -> argparse.Namespace:
    parser = report.parser("tune", __doc__, tiny="FLUX-nano on any device, to try the program; writes --table only")
    add = parser.add_argument
    add("--m", nargs="+", type=int, help="only products with so many tokens (default: all that the model has)")
    add("--shapes", nargs="+", type=shape, metavar="NxK", help="only these parts of layers (default: all)")
    add("--operands", nargs="+", default=["int8"], choices=list(OPERANDS), help="of the activations (default: int8)")
    add("--all", action="store_true", help="every setting that could suit: hours")
    add("--table", type=Path, metavar="FILE", help="default: pallas_kernels/tuned/<device>.json")
    add("--again", action="store_true", help="also what the table holds already")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(report.run(main))
