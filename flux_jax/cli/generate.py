"""`python -m flux_jax.generate "a red circle"`: the command line over `FluxPipeline`.

In: arguments (`flux_jax.cli.arguments`). Out: PNG files that hold all it takes to repeat them; their paths, or one JSON
object, on stdout; notices, progress and timings on stderr. Exit status 0, 2 (bad input), 3 (missing weights), 4 (out
of memory), 130 (interrupted).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from flux_jax.checkpoints import checksums
from flux_jax.cli import arguments, requests
from flux_jax.cli.main import check_device, guarded, say
from flux_jax.config import FluxConfig
from flux_jax.errors import UserError
from flux_jax.io import png
from flux_jax.runtime import compilation_cache, memory, watchdog
from flux_jax.runtime.environment import set_environment, version


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; every foreseeable failure is one sentence on stderr."""
    words = sys.argv[1:] if argv is None else argv
    return guarded(
        lambda: run(arguments.parse(words)),
        interrupted="Interrupted; pictures that were finished are kept.",
        no_memory="Out of memory; choose a smaller --size, --dtype bfloat16, or a machine with more of it.",
    )


def run(args: argparse.Namespace) -> None:
    set_environment(args.device)
    if args.processes > 1:
        watchdog.join(args.coordinator, args.processes, args.process)
    from flux_jax.checkpoints.checkpoint import DEFAULT_MODEL, Checkpoint

    if args.list_models:
        list_models()
        return
    record = png.read_record(args.from_metadata) if args.from_metadata else None
    recorded = record or {"model": {}}
    name = args.model or recorded["model"].get("id") or DEFAULT_MODEL
    stored = Checkpoint.open(name)
    ternary = stored.quantization is not None
    stored = stored.using(args.activations or (recorded["model"].get("activations") if ternary else None))
    model = {"id": name, "name": stored.config.name, "sha256": stored.digest}
    if stored.quantization is not None:
        model["activations"] = stored.quantization["activations"]
    if record and record["model"].get("sha256") != stored.digest:
        say(f"{args.from_metadata} was made with another checkpoint than {name}: the picture will differ.")
    precision = args.dtype or recorded.get("dtype") or "auto"
    dtype = arguments.DTYPES.get(precision)
    if dtype is None:
        raise UserError(f"{args.from_metadata} was made in {precision}, which is not offered here; add --dtype.")
    planned, seeded = requests.plan_requests(args, stored.config, record, say)
    left = requests.skip_done(planned, args, seeded, model)
    if len(left) < len(planned) and not args.quiet:
        say(f"{len(planned) - len(left)} of {len(planned)} pictures exist already.")
    report: dict[str, Any] = {"model": model, "skipped": [str(job.output) for job in planned if job not in left]}
    if args.dry_run:
        report |= {"dry_run": True, "parameters": parameter_counts(stored.config), "weights": weights(stored)}
        report["images"] = [{"path": str(job.output), "id": job.id, **job.settings()} for job in left]
        words = ""
        if left:
            words, report["memory"] = memory_plan(
                stored, dtype, max(left, key=lambda job: job.height * job.width), args
            )
        explain(report, words, args)
    else:
        report |= generate(args, left, stored, model, dtype) if left else {"images": []}
    if args.json and not args.process:
        print(json.dumps(report, ensure_ascii=False), flush=True)


def list_models() -> None:
    """Alias and name of each model that came with the package, a line each, on stdout."""
    from flux_jax.checkpoints.checkpoint import ALIASES, MANIFEST, Checkpoint, resolve

    for alias in ALIASES:
        if (resolve(alias) / MANIFEST).is_file():
            print(f"{alias}\t{Checkpoint.open(alias).config.name}")


def generate(
    args: argparse.Namespace, todo: list[requests.Request], stored: Any, model: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """Loads the model, draws and writes each job; returns what the JSON report says about it."""
    start = time.perf_counter()
    import jax

    check_device(args.device)
    if args.verify:
        count = checksums.check(stored.directory)
        if args.verbose:
            say(f"{count} files of {stored.directory} are what was written")
    cached = None if args.no_cache else compilation_cache.enable()
    from flux_jax.sampling.pipeline import FluxPipeline

    mesh = None
    if args.mesh:
        from flux_jax.sampling import tensor_parallel

        mesh = tensor_parallel.make_mesh(args.mesh, stored.config.transformer)
    how = {"offload": args.offload, "vae_tiling": args.vae_tiling, "activations": model.get("activations")}
    pipe = FluxPipeline.from_pretrained(stored.directory, dtype=dtype, mesh=mesh, **how)
    device = jax.local_devices()[0]
    if args.verbose:
        where = f"{pipe.dtype} on {device.device_kind} ({device.platform})"
        say(f"{model['name']} from {stored.directory} | {where} | compiled programs: {cached or 'not kept'}")
    totals = {"load": time.perf_counter() - start}
    provenance = {
        "format": png.RECORD_FORMAT,
        "dtype": str(pipe.dtype),
        "model": model,
        "device": f"{device.platform} {device.device_kind}",
        "versions": {"flux_jax": version(), "jax": jax.__version__, "python": sys.version.split()[0]},
    }
    made = []
    for group in requests.batches(todo, args.mesh["data"] if args.mesh else 1):
        job = group[0]
        label = f"{todo.index(job) + 1}/{len(todo)} " if len(todo) > 1 else ""
        bar = Bar(job.steps, label) if shows_bar(args) else None
        out = pipe(
            [job.prompt for job in group],
            height=job.height,
            width=job.width,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance,
            seed=[job.seed for job in group],
            negative_prompt=job.negative_prompt,
            true_cfg_scale=job.true_cfg,
            max_sequence_length=job.max_sequence_length,
            callback_on_step_end=bar,
        )
        if bar:
            bar.clear()
        totals = {k: totals.get(k, 0.0) + out.timings.get(k, 0.0) for k in {**totals, **out.timings}}
        if args.process:
            continue
        for job, image in zip(group, out.images, strict=True):
            entry = {**provenance, **job.settings()}
            png.write_png(job.output, image, entry, overwrite=args.overwrite)
            made.append({"path": str(job.output), "id": job.id, **entry})
            if not args.json:
                print(job.output, flush=True)
            if not args.quiet:
                say(f"seed {job.seed} | {job.output} | repeat: python -m flux_jax.generate -C {job.output}")
    peak = memory.peak(device)
    if not args.quiet:
        say(summary(totals, peak))
    return {"images": made, "timings": {k: round(v, 3) for k, v in totals.items()}, "peak_bytes": peak}


def summary(seconds: dict[str, float], peak: int | None) -> str:
    """`load 1.0 s | compile 3.1 s | text 0.1 s | denoise 28 x 0.005 s | VAE 0.1 s | at most 3.57 GB on the device`."""
    steps = int(seconds["steps"])
    line = (
        f"load {seconds['load']:.1f} s | compile {seconds['compile']:.1f} s | text {seconds['text']:.2f} s | "
        f"denoise {steps} x {seconds['denoise'] / max(steps, 1):.3f} s | VAE {seconds['decode']:.2f} s"
    )
    return line if peak is None else f"{line} | at most {peak / 1e9:.2f} GB on the device"


def shows_bar(args) -> bool:
    return sys.stderr.isatty() and not args.quiet and not args.mesh


class Bar:
    """A progress bar as the pipeline's step callback; drawn on one line of a terminal, and wiped at the end."""

    WIDTH = 24

    def __init__(self, steps: int, label: str):
        self.steps, self.label, self.started = steps, label, 0.0
        self.draw("compiling, once for each size ...")

    def __call__(self, pipe, step: int, timestep: float, tensors) -> None:
        done = step + 1
        self.started = self.started or time.perf_counter()  # behind the first step: it may have been compiled in there
        pace = f"{(time.perf_counter() - self.started) / step:.2f} s/step" if step else ""
        filled = self.WIDTH * done // self.steps
        self.draw(f"{'#' * filled}{'.' * (self.WIDTH - filled)} {done}/{self.steps} {pace}")

    def draw(self, text: str) -> None:
        print(f"\r\033[K{self.label}{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def parameter_counts(config: FluxConfig) -> dict[str, int]:
    """Parameters of each component, from shapes alone."""
    import math

    from flux_jax.models import params

    return {
        component: sum(
            math.prod(shape) for shape in params.leaf_table(params.abstract_component(component, config)).values()
        )
        for component in params.COMPONENTS
    }


def weights(stored: Any) -> dict[str, Any]:
    """The form of a checkpoint's weights, in words, and their bytes as stored."""
    from flux_jax.checkpoints.integrity import stored_bytes

    tables = [stored.table(component) for component in stored.components]
    floating = {d.name for table in tables for n, (d, _) in table.items() if not n.endswith((".packed", ".scale"))}
    form = " and ".join(sorted(floating))
    size = sum(stored_bytes(table, name) for table in tables for name in table)
    return {"form": form if stored.quantization is None else f"ternary, the rest {form}", "bytes": size}


def memory_plan(stored: Any, dtype: str, job: requests.Request, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """What a picture would take on this machine, in words and in numbers."""
    from flux_jax.runtime.environment import resolve_dtype
    from flux_jax.sampling import planner

    check_device(args.device)
    model = planner.model_of(stored, resolve_dtype(dtype))
    sizes = {"height": job.height, "width": job.width, "steps": job.steps, "length": job.max_sequence_length}
    return planner.describe(planner.Planner(model, None, **sizes), args.offload, args.vae_tiling)


def explain(report: dict[str, Any], words: str, args) -> None:
    """A dry run in words on stderr, and the paths that would be written on stdout."""
    counts = report["parameters"]
    total = sum(counts.values())
    if not args.quiet:
        listed = ", ".join(f"{component} {count:,}" for component, count in counts.items())
        held = f"{report['weights']['bytes'] / 1e9:.2f} GB of weights ({report['weights']['form']})"
        say(f"{report['model']['name']}: {total:,} parameters ({listed}), {held}.")
        for image in report["images"]:
            size = f"{image['width']}x{image['height']}"
            say(f"{size}, {image['steps']} steps, seed {image['seed']}: {image['prompt']}")
        if words:
            say(words)
    if not args.json:
        for image in report["images"]:
            print(image["path"])
