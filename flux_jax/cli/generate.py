"""`python -m flux_jax.generate "a red circle"`: the command line over `FluxPipeline`.

In: arguments (`flux_jax.cli.arguments`). Out: PNG files that hold all it takes to repeat them; their paths, or one JSON
object, on stdout; notices, progress and timings on stderr. A picture that was drawn is never thrown away: where it
cannot be written as asked, it goes elsewhere, and the exit status is 2.
"""

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flux_jax.checkpoints import checksums
from flux_jax.cli import arguments, dry_run, finished, requests
from flux_jax.cli.main import check_device, guarded, output, output_json, say
from flux_jax.errors import UserError, printable, shortened
from flux_jax.io import png
from flux_jax.runtime import compilation_cache, memory, watchdog
from flux_jax.runtime.environment import provenance, set_environment

if TYPE_CHECKING:
    from flux_jax.checkpoints.checkpoint import Checkpoint
    from flux_jax.sampling.pipeline import Callback, FluxPipeline


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; every foreseeable failure is one sentence on stderr."""
    return guarded(
        run,
        argv,
        interrupted="Interrupted; pictures that were finished are kept.",
        no_memory="Out of memory; choose a smaller --size, --dtype bfloat16, or a machine with more of it.",
    )


@dataclasses.dataclass(frozen=True)
class Session:
    """A run of the program: its arguments, the checkpoint that draws, under the name it was asked for, and the
    dtype."""

    args: argparse.Namespace
    name: str
    stored: "Checkpoint"
    dtype: str

    @property
    def model(self) -> dict[str, Any]:
        """What a picture's record says of the checkpoint."""
        entry = {"id": self.name, "name": self.stored.config.name, "sha256": self.stored.digest}
        if self.stored.quantization is not None:
            entry["activations"] = self.stored.quantization["activations"]
        return entry


def run(argv: Sequence[str]) -> int:
    """Draws, or with --dry-run says, what the arguments ask for, and returns the exit status."""
    args = arguments.parse(argv)
    set_environment(args.device)
    if args.processes > 1:
        watchdog.join(args.coordinator, args.processes, args.process)
    if args.list_models:
        list_models()
        return 0
    record = png.read_record(args.from_metadata, say) if args.from_metadata else None
    session = open_session(args, record or {"model": {}})
    if record and record["model"].get("sha256") != session.stored.digest:
        say(f"{args.from_metadata} was made with another checkpoint than {session.name}: the picture will differ.")
    planned, asked = requests.plan_requests(args, session.stored.config, record, say)
    left = requests.skip_done(planned, args, asked, session.model, session.dtype)
    if len(left) < len(planned) and not args.quiet:
        say(f"{len(planned) - len(left)} of {len(planned)} pictures exist already.")
    to_do = {each.index for each in left}
    skipped = [str(each.output) for each in planned if each.index not in to_do]
    report: dict[str, Any] = {"model": session.model, "skipped": skipped, "images": []}
    status = 0
    try:
        if args.dry_run:
            report |= dry_run.report(args, session.stored, session.dtype, left)
        elif left:
            status = draw(session, left, asked, report)
    except BaseException as error:
        report["error"] = printable(str(error)) or type(error).__name__
        raise
    finally:  # what is finished is told, whatever became of the rest
        if args.json and not args.process:
            output_json(report)
    return status


def list_models() -> None:
    """Alias and name of each model that came with the package, a line each, on stdout."""
    from flux_jax.checkpoints.checkpoint import ALIASES, MANIFEST, Checkpoint, resolve

    for alias in ALIASES:
        if (resolve(alias) / MANIFEST).is_file():
            output(f"{alias}\t{Checkpoint.open(alias).config.name}")


def open_session(args: argparse.Namespace, record: dict[str, Any]) -> Session:
    """The checkpoint that the arguments name, else the record, else the package's own. record: of an earlier picture,
    whoever made it, or {"model": {}}. UserError where it names another than the package's."""
    from flux_jax.checkpoints.checkpoint import ALIASES, DEFAULT_MODEL, Checkpoint

    name = args.model or record["model"].get("id") or DEFAULT_MODEL
    if not args.model and name not in ALIASES:
        raise UserError(
            f"{args.from_metadata} was made with the checkpoint {shortened(name, 120)}, and a picture opens no folder; "
            "name it yourself: --model PATH."
        )
    stored = Checkpoint.open(name)
    recorded = record["model"].get("activations") if stored.quantization is not None else None
    precision = args.dtype or record.get("dtype") or "auto"
    if precision not in arguments.DTYPES:
        raise UserError(
            f"{args.from_metadata} was made in {shortened(precision)}, which is not offered here; add --dtype."
        )
    return Session(args, name, stored.using(args.activations or recorded), arguments.DTYPES[precision])


def draw(session: Session, todo: list[requests.Request], asked: set[int], report: dict[str, Any]) -> int:
    """Loads the model, draws and writes each request; puts what the JSON report says about it there, each picture once
    it is written, and returns the exit status. asked: of `requests.plan_requests`."""
    import jax

    args, start = session.args, time.perf_counter()
    pipe = load(session)
    device = jax.local_devices()[0]
    totals = {"load": time.perf_counter() - start}
    common: dict[str, Any] = {"dtype": str(pipe.dtype), "model": session.model, **provenance(device)}
    status = 0
    for group in requests.batches(todo, args.mesh["data"] if args.mesh else 1):
        label = f"{todo.index(group[0]) + 1}/{len(todo)} " if len(todo) > 1 else ""
        with progress(args, group[0].steps, label) as callback:
            out = pipe.draw(requests.sampling_request(group), callback_on_step_end=callback)
        totals = {key: totals.get(key, 0.0) + out.timings.get(key, 0.0) for key in {**totals, **out.timings}}
        for request, image in zip(group, out.images, strict=True) if not args.process else ():
            record = png.Record(**common, **request.settings())
            path = finished.keep(request, image, record, args=args, seeded=request.index in asked)
            if path is None:
                report["skipped"].append(str(request.output))
                continue
            report["images"].append({"path": str(path), "id": request.id, **record.to_json()})
            finished.tell(args, path, request.seed, session.name)
            status = status or 2 * (path != request.output)
    peak = memory.peak(device)
    if not args.quiet:
        say(summary(totals, peak))
    report |= {"timings": {key: round(value, 3) for key, value in totals.items()}, "peak_bytes": peak}
    return status


def load(session: Session) -> "FluxPipeline":
    """The pipeline on the devices asked for, its programs kept on disk unless the arguments say otherwise."""
    args, stored = session.args, session.stored
    check_device(args.device)
    if args.verify:
        count = checksums.check(stored.directory)
        if args.verbose:
            say(f"{count} files of {stored.directory} are what was written")
    cached = None if args.no_cache else compilation_cache.enable()
    import jax

    from flux_jax.sampling import tensor_parallel
    from flux_jax.sampling.pipeline import FluxPipeline

    mesh = tensor_parallel.make_mesh(args.mesh, stored.config.transformer) if args.mesh else None
    how = {"dtype": session.dtype, "mesh": mesh, "offload": args.offload, "vae_tiling": args.vae_tiling}
    pipe = FluxPipeline.from_checkpoint(stored, **how)
    if args.verbose:
        device = jax.local_devices()[0]
        where = f"{pipe.dtype} on {device.device_kind} ({device.platform})"
        say(f"{stored.config.name} from {stored.directory} | {where} | compiled programs: {cached or 'not kept'}")
    return pipe


def shows_progress(args: argparse.Namespace) -> bool:
    return sys.stderr.isatty() and not args.quiet and not args.mesh


@contextlib.contextmanager
def progress(args: argparse.Namespace, steps: int, label: str) -> Iterator["Callback | None"]:
    """A progress bar as the pipeline's step callback, on a terminal, wiped at the end; None where none is wanted."""
    if not shows_progress(args):
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=steps, desc=f"{label}compiling, once for each size", leave=False, file=sys.stderr) as bar:

        def advance(*_: Any) -> None:
            if not bar.n:  # the first step may have been compiled in there: it tells nothing of the pace
                bar.set_description_str(label.strip() or None, refresh=False)
                bar.start_t = time.time()
            bar.update()

        yield advance


def summary(seconds: dict[str, float], peak: int | None) -> str:
    """`load 1.0 s | compile 3.1 s | text 0.1 s | denoise 28 x 0.005 s | VAE 0.1 s | at most 3.57 GB on the device`."""
    steps = int(seconds["steps"])
    line = (
        f"load {seconds['load']:.1f} s | compile {seconds['compile']:.1f} s | text {seconds['text']:.2f} s | "
        f"denoise {steps} x {seconds['denoise'] / max(steps, 1):.3f} s | VAE {seconds['decode']:.2f} s"
    )
    return line if peak is None else f"{line} | at most {peak / 1e9:.2f} GB on the device"
