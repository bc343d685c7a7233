"""`python -m bench.tables`: the tables of results in README.md and docs/, made from bench/results/*.json.

In: `bench/results/*.json`; README.md and docs/*.md, where a table stands between the lines `<!-- table: NAME -->` and
`<!-- /table -->`, NAME one of `TABLES`. Out: the same files with every such table written anew; what was written is
named on stdout. With --check nothing is written: exit status 1 where a file is stale, and its name on stderr. Only the
standard library, so that whoever builds the documentation needs nothing else.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^<!-- table: (\S+) -->\n.*?^<!-- /table -->$", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"^<!-- (?:table: \S+|/table) -->$", re.MULTILINE)
TAGS = {"overall": "overall", "single_object": "single object", "two_object": "two objects", "counting": "counting"}
TAGS |= {"colors": "colours", "position": "position", "color_attr": "colour attribution"}
VARIANTS = {  # the names that bench.distill_ablation gives its variants, in the words of docs/results.md
    "blockwise + end to end": "blockwise, then end to end",
    "random noise points": "random noise for the teacher's trajectories",
    "one scale per matrix": "one scale per matrix, not per output channel",
    "half at the student's own points": "half of the points from on-policy rollouts",
    "absmean start": "absmean for the first rounding",
    "floats stay frozen": "biases, norms and embedders frozen",
}
Load = Callable[[str], dict[str, Any]]  # NAME -> "figures" of bench/results/NAME.json
Rows = Callable[[Load], Iterable[Sequence[str]]]
TABLES: dict[str, tuple[Sequence[str], Rows]] = {}  # name -> header, and what gives the rows as cells of text


def table(name: str, *header: str) -> Callable[[Rows], Rows]:
    """Registers the function below it as the rows of table NAME."""
    return lambda rows: TABLES.setdefault(name, (header, rows))[1]


def plain(name: str, source: str, key: str, columns: dict[str, str]) -> None:
    """Registers a table with a row for each object in figure `key` of source.json: a header and a format a column."""
    TABLES[name] = (
        tuple(columns),
        lambda load: ([form.format(**r) for form in columns.values()] for r in load(source)[key]),
    )


def interval(key: str, sign: str = "") -> str:
    """The format of [value, lower, upper] under `key`."""
    return f"{{{key}[0]:{sign}.3f}} [{{{key}[1]:{sign}.3f}}, {{{key}[2]:{sign}.3f}}]"


def gigabytes(*sizes: float, digits: int = 2) -> str:
    """Bytes as GB of 10^9: one number, or the range of several."""
    return f"{between((size / 1e9 for size in sizes), digits)} GB"


def between(values: Iterable[float], digits: int) -> str:
    """The least and the largest, or the one number that both are."""
    ordered = sorted(values)
    return " to ".join(dict.fromkeys(f"{end:.{digits}f}" for end in (ordered[0], ordered[-1])))


HOURS = {
    "phase": "{phase}",
    "forward passes": "{forwards:,}",
    "operations": "{flop:.2e}",
    "H100 hours": "{gpu_hours:.1f}",
}
STAGES = {"weights": "{weights_gb:.3f} GB", "program": "{program_gb:.3f} GB", "total": "{total_gb:.3f} GB"}
EARLIER = {"error of the velocity": "{velocity_error:.4f}", "overall": interval("overall")}
EARLIER["difference to nano-bf16"] = interval("difference", "+")
SCORES = {words: interval(tag) for tag, words in TAGS.items()}
DIFFERENCES = {words: interval(tag, "+") for tag, words in TAGS.items()}
plain("parity", "parity", "rows", {"case": "{case}", "error": "{error:.1e}", "limit": "{limit:.0e}"})
plain("plan", "plan", "stages", {"stage": "{stage}"} | STAGES)
plain("distill-hours", "distill", "hours", HOURS)
plain("nano-scores", "nano", "scores", {"model": "{model}"} | SCORES)
plain("nano-differences", "nano", "differences", {"difference": "{model} − {against}"} | DIFFERENCES)
plain("nano-earlier", "nano", "earlier_runs", {"earlier run": "{run}"} | EARLIER)


def _programs(load: Load) -> dict[str, list[dict[str, Any]]]:
    """What bench.memory compiled, by kind of weights."""
    kinds = {"bf16": "bf16", "ternary A16": "ternary, bf16 activations", "ternary A8": "ternary, int8 activations"}
    found = load("memory")["programs"]
    return {words: [p for p in found if p["weights"] == kind] for kind, words in kinds.items()}


@table("claims", "what", "figure", "how it was found")
def _claims(load: Load) -> Iterable[Sequence[str]]:
    dense, *kinds = _programs(load).values()
    ternary = [p for kind in kinds for p in kind]
    small, large = (gigabytes(*(p["total_bytes"] for p in programs)) for programs in (ternary, dense))
    smaller = between((p["times_smaller"] for p in ternary), 1)
    yield (
        "memory of FLUX.1-dev's denoising loop",
        f"{small} ternary, {large} bf16: {smaller} times less",
        "compiled ahead of time for four GPUs, `python -m bench.memory`",
    )
    rows = [row for row in load("convert")["rows"] if row["to"] == "ternary"]
    ratio = between((row["source_bytes"] / row["output_bytes"] for row in rows), 1)
    written, source = (gigabytes(*(row[f"{kind}_bytes"] for row in rows)) for kind in ("output", "source"))
    yield (
        "FLUX.1-dev's transformer on disk",
        f"{written} ternary, {source} as published: {ratio} times less",
        "synthetic weights, `python -m bench.convert --full`",
    )
    cases = [row["error"] for row in load("parity")["rows"] if "bf16" not in row["case"]]
    yield (
        "difference to diffusers",
        f"at most {max(cases):.1e} of the largest value, in {len(cases)} float32 cases",
        "random weights through the converter, `pytest`",
    )
    nano = load("nano")
    score = {row["model"]: row["overall"][0] for row in nano["scores"]}
    lost, most, least = next(row["overall"] for row in nano["differences"] if row["model"] == "nano-1.58bit")
    yield (
        "score of the ternary FLUX-nano",
        f"{score['nano-1.58bit']:.3f}; its bf16 teacher {score['nano-bf16']:.3f}: {-lost:.3f} lost"
        f" (95 % interval {-least:.3f} to {-most:.3f})",
        f"{nano['captions']} held-out captions, `python -m flux_jax.evaluate nano`",
    )


@table("memory", "weights", "arguments", "temporary", "total", "times less than bf16")
def _memory(load: Load) -> Iterable[Sequence[str]]:
    for words, found in _programs(load).items():
        sizes = (gigabytes(*(p[f"{kind}_bytes"] for p in found)) for kind in ("argument", "temporary", "total"))
        yield words, *sizes, "" if words == "bf16" else between((p["times_smaller"] for p in found), 2)


@table("bits", "first rounding", "zeros", "bits in memory", "bits on disk", "entropy", "FLUX.1-dev on disk, estimated")
def _bits(load: Load) -> Iterable[Sequence[str]]:
    sizes = load("memory")["sizes"]
    for method, found in sizes["bits_per_weight"].items():
        bits = (f"{found[kind]:.3f}" for kind in ("memory", "disk", "entropy"))
        yield method, f"{found['zeros']:.0%}", *bits, gigabytes(sizes["estimated_disk_bytes"][method])


@table("convert", "source", "to", "written", "seconds", "peak memory", "MB/s", "share of a copy's speed")
def _convert(load: Load) -> Iterable[Sequence[str]]:
    for row in load("convert")["rows"]:
        speed, copy = row["mb_per_second"], row["copy_mb_per_second"]
        took = gigabytes(row["output_bytes"]), f"{row['seconds']:.0f}", gigabytes(row["peak_rss_bytes"])
        yield row["format"], row["to"], *took, f"{speed:.0f}", f"{speed / copy:.2f}"


@table("aot", "GPU", "kernels", "spilled bytes", "most registers", "products", "of them on the tensor cores", "faults")
def _aot(load: Load) -> Iterable[Sequence[str]]:
    kernels = load("aot")["kernels"]
    for gpu in dict.fromkeys(kernel["gpu"] for kernel in kernels):
        found = [kernel for kernel in kernels if kernel["gpu"] == gpu]
        products = [bool(kernel["mma"]) for kernel in found if kernel["kernel"].startswith("matmul")]
        code = len(found), sum(k["spilled_bytes"] for k in found), max(k["registers"] for k in found)
        yield gpu.upper(), *map(str, (*code, len(products), sum(products), sum(len(k["faults"]) for k in found)))


@table("distill", "training step of FLUX.1-dev", "points", "weights", "arguments", "temporary", "peak", "of")
def _distill(load: Load) -> Iterable[Sequence[str]]:
    for row in load("distill")["steps"]:
        sizes = (gigabytes(row[f"{kind}_bytes"], digits=1) for kind in ("argument", "temporary", "peak", "device"))
        step = f"{row['program']}, {row['devices']} x {row['gpu'].upper()}"
        yield step, str(row["batch"]), f"{row['parameters'] / 1e6:,.0f} M", *sizes


@table("ablation", "variant", "error of the velocity", "score, 95 % interval")
def _ablation(load: Load) -> Iterable[Sequence[str]]:
    for key, found in load("distill_ablation").items():
        name, score = key.removesuffix(", seed 0"), [found["score"]["score"], *found["score"]["interval"]]
        error = list(found["held_out"].values())[-1]
        yield VARIANTS.get(name, name), f"{error:.3f}", interval("score").format(score=score)


@table("nano-teacher", "tag", "score", "95 % interval")
def _teacher(load: Load) -> Iterable[Sequence[str]]:
    row = next(row for row in load("nano")["scores"] if row["model"] == "nano-bf16")
    for tag, words in TAGS.items():
        yield words, f"{row[tag][0]:.3f}", "{:.3f} to {:.3f}".format(*row[tag][1:])


@table("nano-velocity", "student", "error of the velocity")
def _velocity(load: Load) -> Iterable[Sequence[str]]:
    error = load("nano")["velocity_error"]
    words = {"rounded": "rounded, not trained", "blockwise": "after phase `blockwise`"}
    words |= {"codes_freeze": "after phase `end_to_end`, when the codes freeze", "end": "at the end"}
    for key, text in (words | {"quick_end": "at the end of `--quick`"}).items():
        yield text, str(error[key])


def rewrite(text: str, load: Load) -> str:
    """The text with every table made anew. ValueError for an unknown table, or a mark without its other half."""
    if len(MARK.findall(text)) != 2 * len(BLOCK.findall(text)):
        raise ValueError("a table's first or last line lacks the other one")

    def block(found: re.Match[str]) -> str:
        if found[1] not in TABLES:
            raise ValueError(f"no table is called {found[1]!r}; there are {', '.join(sorted(TABLES))}")
        header, rows = TABLES[found[1]]
        lines = "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows(load)])
        return f"<!-- table: {found[1]} -->\n\n{lines}\n\n<!-- /table -->"

    return BLOCK.sub(block, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or compares the tables; exit status 1 where one is stale, 2 where one cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a table is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the clone (default: this one)")
    args = parser.parse_args(argv)

    def load(name: str) -> dict[str, Any]:
        return json.loads((args.root / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))["figures"]

    status = 0
    for path in [args.root / "README.md", *sorted((args.root / "docs").glob("*.md"))]:
        old, name = path.read_text(encoding="utf-8"), path.relative_to(args.root)
        try:
            new = rewrite(old, load)
        except (OSError, ValueError, LookupError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 2
            continue
        if new != old and args.check:
            print(f"{name} is stale: run python -m bench.tables", file=sys.stderr)
            status = status or 1
        elif new != old:
            path.write_text(new, encoding="utf-8")
            print(name)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
