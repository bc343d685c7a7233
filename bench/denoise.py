"""`python -m bench.denoise`: one picture by FLUX.1-dev's transformer, in bf16 and with ternary weights.

In: a GPU; weights are random, of full size, and made there. Out, for each kind of weights: seconds of a picture and
of a step for 50 and 28 steps, peak memory by the device's own counter, joules by NVML, and apart from them what
compiling took; on the same machine also diffusers in bf16, eager and compiled, where torch and it are installed. With
--save also a chart. Every trial has a process of its own, whose peak is its own, and a time box. Without a GPU: the
memory of the compiled programs (see `bench.memory`), and no time.

bf16's figures hold a cost that is not the products': the loop over the blocks copies each layer's weights out of their
stack. So the bytes of these copies stand beside them, and `bench.baseline` gives the time without them.
"""

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from bench import memory, power, process, reference, report, synthetic
from bench.journal import Journal, sentence
from flux_jax.config import FluxConfig, dev, nano
from flux_jax.errors import UserError
from flux_jax.models import attention
from flux_jax.runtime import aot
from flux_jax.runtime.memory import peak as device_peak
from flux_jax.sampling.programs import denoise
from pallas_kernels import Target

DIFFUSERS = {"diffusers bf16": False, "diffusers bf16, compiled": True}  # name -> whether torch.compile is used
TRIALS = (*memory.WEIGHTS, *DIFFUSERS)


def trial(weights: str, config: FluxConfig, steps: Sequence[int], samples: int) -> dict[str, Any]:
    """Runs one kind of weights here: {compile_seconds, peak_bytes, copied_bytes: of weights that each step copies out
    of their stacks, pictures: one for each number of steps}."""
    transformer = synthetic.weights(memory.abstract_transformer(config, weights))
    device, pictures, spent, copied = jax.local_devices()[0], [], 0.0, 0
    for count in steps:
        noise, *rest = synthetic.inputs(config, count, *config.default_grid, jnp.bfloat16)
        start = time.perf_counter()
        program = denoise.lower(transformer, noise, *rest).compile()
        spent += time.perf_counter() - start
        copied = memory.copied_in_loop(program.as_text() or "")
        jax.block_until_ready(program(transformer, noise + 0, *rest))
        seconds, before = [], power.joules()
        for _ in range(samples):
            latents = jax.block_until_ready(noise + 0)  # the program takes its latents for good
            start = time.perf_counter()
            _, finite = jax.block_until_ready(program(transformer, latents, *rest))
            seconds.append(time.perf_counter() - start)
        joules = power.since(before, samples)
        pictures.append({"steps": count, "seconds": seconds, "joules": joules, "finite": bool(finite.all())})
    found = {"compile_seconds": spent, "peak_bytes": device_peak(device), "copied_bytes": copied}
    return found | {"pictures": pictures}


def trial_with_any_attention(journal: Journal, weights: str, *how: Any) -> dict[str, Any]:
    """`trial`; where cuDNN's attention fails, a row says so, and it runs once more with XLA's."""
    try:
        return trial(weights, *how)
    except Exception as error:  # of many kinds, from tracing, compiling or running
        if "cudnn" not in str(error).lower():
            raise
        journal.row(weights=weights, failure=sentence(error), then="once more with XLA's attention")
    with attention_by_xla():
        return trial(weights, *how) | {"attention": "XLA's attention"}


@contextlib.contextmanager
def attention_by_xla() -> Iterator[None]:
    """Within it attention is traced as for a device that has no cuDNN."""
    jax.clear_caches()  # what was traced before has cuDNN in it
    with mock.patch.object(attention, "current_target", return_value=Target("cpu")):
        yield


def in_own_process(name: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The same by a new process; {"failure": why} where it failed."""
    arguments = ["--trial", name, "--samples", str(args.samples), "--steps", *map(str, args.steps)]
    arguments += ["--tiny"] if args.tiny else []
    return process.run(["-m", "bench.denoise", *arguments], seconds=min(args.trial_seconds, seconds)).result()


def write(journal: Journal, name: str, found: dict[str, Any]) -> None:
    """A trial's rows: one of the whole, and one for each number of steps."""
    pictures = found.get("pictures", [])
    journal.row(weights=name, **{key: value for key, value in found.items() if key != "pictures"})
    for picture in pictures:
        steps, seconds = picture["steps"], picture["seconds"]
        journal.row(
            weights=name,
            steps=steps,
            ms_a_step=1e3 * statistics.median(seconds) / steps,
            least_ms=1e3 * min(seconds) / steps,
            joules_a_step=picture["joules"] and picture["joules"] / steps,
            seconds=seconds,
            wrong=None if picture["finite"] else "not finite",
        )


def rows_of(name: str, found: dict[str, Any]) -> list[list[Any]]:
    """Rows of the table: one for each number of steps, or why there is none."""
    if "failure" in found:
        return [[name, None, None, None, None, None, found["failure"]]]
    peak = found["peak_bytes"] and found["peak_bytes"] / memory.GIGABYTE
    if not found["pictures"]:
        return [[name, None, None, None, peak, None, "compiled, not run"]]
    rows = []
    for picture in found["pictures"]:
        seconds = statistics.median(picture["seconds"])
        note = notes(found) if picture["finite"] else "NOT FINITE"
        rows.append([name, picture["steps"], seconds, 1e3 * seconds / picture["steps"], peak, picture["joules"], note])
    return rows


def notes(found: dict[str, Any]) -> str:
    """What a reader of the figures must know."""
    copied = found.get("copied_bytes")
    copies = f"copies {copied / memory.GIGABYTE:.3g} GB of weights a step: see bench.baseline" if copied else ""
    return "; ".join(filter(None, [found.get("attention", ""), copies]))


def chart(path: Path, title: str, found: dict[str, dict[str, Any]]) -> None:
    """Bars of peak memory and of seconds a picture, as in the paper's figure 2; what is not known is left out."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    seconds = {}
    for name, each in found.items():
        for picture in each.get("pictures", []):
            seconds[f"{name}, {picture['steps']} steps"] = statistics.median(picture["seconds"])
    peaks = {name: each["peak_bytes"] / memory.GIGABYTE for name, each in found.items() if each.get("peak_bytes")}
    bars = {"GB, peak": peaks, "seconds a picture": seconds}
    bars = {label: values for label, values in bars.items() if values}
    figure, axes = pyplot.subplots(1, len(bars), figsize=(5 * len(bars), 3.5), squeeze=False, layout="constrained")
    for axis, (label, values) in zip(axes[0], bars.items(), strict=True):
        axis.bar_label(axis.barh(list(values), list(values.values())), fmt="%.2f", padding=3)
        axis.set_xlabel(label)
        axis.invert_yaxis()
        axis.margins(x=0.15)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str]) -> None:
    args = options(argv)
    config = nano() if args.tiny else dev()
    journal = report.journal(args)
    if args.trial is not None:
        try:
            if args.trial in DIFFUSERS:
                found = reference.trial(DIFFUSERS[args.trial], config, args.steps, args.samples, args.tiny)
            else:
                found = trial_with_any_attention(journal, args.trial, config, args.steps, args.samples)
            write(journal, args.trial, found)
        except UserError as error:  # what it needs is not here
            found = {"failure": str(error)}
            journal.row(weights=args.trial, skipped=str(error))
        print(json.dumps(found))
        return
    report.leave_memory()
    os.environ.setdefault(aot.SKIP_CHECK, "1")  # before JAX starts, so that it can compile for a GPU that is not here
    on_gpu, size = jax.default_backend() == "gpu", f"{config.sampling.width} x {config.sampling.height}"
    if on_gpu or args.tiny:
        found, where = {}, report.device()
        for name in args.trials:
            report.say(f"trial: {name}")
            found[name] = in_own_process(name, args, journal.left())
            write(journal, name, found[name])
    else:
        report.say(f"JAX finds no GPU: memory as compiled for {args.gpu}, and no time")
        found, where = compiled_memory(args.gpu, config, args.steps[0]), f"none: compiled ahead of time for {args.gpu}"
    print(f"{config.name}, transformer only, {size}, one picture, on {where}\n")
    header = ["weights", "steps", "s a picture", "ms a step", "peak GB", "joules a picture", "note"]
    rows = [row for name, each in found.items() for row in rows_of(name, each)]
    if args.tiny:
        rows = [[*row[:2], None, None, *row[4:]] for row in rows]
    print(report.table(header, rows))
    if args.save:
        chart(args.save.with_suffix(".png"), f"{config.name}, {size}\n{where}", found)
    figures = {"model": config.name, "size": size, "tiny": args.tiny, "trials": found}
    report.finish("denoise", figures, save=args.save, on=where)


def compiled_memory(gpu: str, config: FluxConfig, steps: int) -> dict[str, Any]:
    """{name: {peak_bytes, pictures: none}} from the programs as they would run on a GPU that is not here."""
    rows, columns = config.default_grid
    measured = {name: memory.measure(gpu, name, config, steps, rows * columns) for name in memory.WEIGHTS}
    return {name: {"peak_bytes": each["total_bytes"], "pictures": []} for name, each in measured.items()}


def options(argv: Sequence[str]) -> argparse.Namespace:
    parser = report.parser("denoise", __doc__, tiny="FLUX-nano on any device, to try the program; no time is printed")
    add = parser.add_argument
    add("--trials", nargs="+", default=list(TRIALS), choices=TRIALS, help="default: all")
    add("--trial", choices=TRIALS, help=argparse.SUPPRESS)  # one of them, in this process; prints its JSON
    add("--steps", nargs="+", type=int, default=None, help="numbers of steps (default: 50 and 28)")
    add("--trial-seconds", type=float, default=900.0, help="at most for each trial (default: %(default)s)")
    add("--samples", type=int, default=3, help="pictures timed of each (default: 3)")
    add("--gpu", default="h100", help="without a GPU: compile for this one (default: h100)")
    args = parser.parse_args(argv)
    args.steps = args.steps or ([2] if args.tiny else [50, 28])
    if args.samples < 1 or min(args.steps) < 1:
        raise UserError("--samples and --steps must be at least 1.")
    return args


if __name__ == "__main__":
    raise SystemExit(report.run(main))
