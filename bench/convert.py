"""`python -m bench.convert --full`: FLUX.1-dev's transformer converted at its real size, from both published formats.

In: nothing but disk space (about 50 GB with --full). Synthetic weights with the right names, shapes and dtype are
written first: seeded, bf16, drawn from one pool of normal numbers. Then, a format at a time: a plain copy of the same
bytes (with fsync, as the converter does), the converter in a process of its own, and the same with --ternary. Out:
seconds, MB/s of source read, the copy's speed, peak memory of the process as the system counted it, bytes written.
Sources are read from the disk, not from what the system still holds of them. Interrupted or terminated, it leaves
nothing behind. Without --full a model of FLUX-nano's size, in seconds.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bench import report
from convert.configs import published
from convert.engine import expected
from convert.rules import FORMATS, Format
from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.config import FluxConfig, dev, nano
from flux_jax.errors import UserError
from flux_jax.io.safetensors import file_header
from flux_jax.models.params import abstract_component, leaf_table

POOL = 2**24  # normal numbers that all weights are taken from, in pieces that start anywhere
SHARD_BYTES = 10e9  # of a file in the diffusers format, as published
BLOCK = 2**24
WEIGHT_STD = 0.02
ROOM = 2.2  # times the source's bytes: the source beside its copy, and then beside the checkpoint


def tensors(fmt: Format, config: FluxConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the transformer in that format."""
    weights = expected("transformer", fmt, config, leaf_table(abstract_component("transformer", config)))
    return {piece.name: piece.shape for weight in weights.values() for piece in weight.pieces}


def shards(shapes: dict[str, tuple[int, ...]], limit: float) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors in groups of at most `limit` bytes."""
    group: dict[str, tuple[int, ...]] = {}
    held = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        if group and held + nbytes > limit:
            yield group
            group, held = {}, 0
        group[name] = shape
        held += nbytes
    yield group


def write_safetensors(
    file: Path, shapes: dict[str, tuple[int, ...]], pool: np.ndarray, rng: np.random.Generator
) -> int:
    """A file of bf16 tensors with values from the pool; returns its bytes. No tensor is held in memory."""
    bf16 = np.dtype(ml_dtypes.bfloat16)
    with open(file, "wb") as out:
        out.write(file_header({name: (bf16, shape) for name, shape in shapes.items()}))
        for shape in shapes.values():
            left = int(np.prod(shape))
            while left:
                start = int(rng.integers(len(pool)))
                piece = pool[start : start + left]
                out.write(piece.tobytes())
                left -= len(piece)
        out.flush()
        os.fsync(out.fileno())
    return file.stat().st_size


def write_source(folder: Path, fmt: Format, config: FluxConfig, seed: int) -> tuple[Path, int]:
    """A model in that format: what `convert` takes as SOURCE, and the bytes of its weights."""
    rng = np.random.default_rng(seed)
    pool = (WEIGHT_STD * rng.standard_normal(POOL, np.float32)).astype(ml_dtypes.bfloat16).view(np.uint16)
    shapes = tensors(fmt, config)
    if "diffusers" not in fmt.name:
        file = folder / "flux1.safetensors"
        return file, write_safetensors(file, shapes, pool, rng)
    root = folder / "diffusers"
    (root / "transformer").mkdir(parents=True)
    (root / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    (root / "transformer" / "config.json").write_text(json.dumps(published("transformer", config)))
    for part, name in (("clip", "tokenizer"), ("t5", "tokenizer_2")):  # any will do: their texts are not encoded
        shutil.copytree(Checkpoint.open("nano").tokenizers / part, root / name)
    groups, where, total = list(shards(shapes, SHARD_BYTES)), {}, 0
    for i, group in enumerate(groups, 1):
        name = f"diffusion_pytorch_model-{i:05d}-of-{len(groups):05d}.safetensors"
        total += write_safetensors(root / "transformer" / name, group, pool, rng)
        where |= dict.fromkeys(group, name)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (root / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return root, total


def weight_files(source: Path) -> list[Path]:
    return [source] if source.is_file() else sorted(source.rglob("*.safetensors"))


def forget(source: Path) -> None:
    """Drops the weights from the system's memory, so that whoever comes next reads them from the disk."""
    for file in weight_files(source):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, target: Path) -> float:
    """Seconds to copy the weights' files and have them on the disk; the copy is deleted."""
    forget(source)
    start = time.perf_counter()
    for file in weight_files(source):
        with open(file, "rb") as read, open(target, "wb") as written:
            shutil.copyfileobj(read, written, BLOCK)
            written.flush()
            os.fsync(written.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def convert(source: Path, out: Path, config: Path, ternary: bool) -> dict[str, Any]:
    """Runs the converter; seconds, peak resident bytes, bytes of the checkpoint, which is deleted. UserError if it
    fails."""
    command = [sys.executable, "-m", "convert", str(source), str(out), "--parts", "transformer", "-q"]
    command += ["--config", str(config), *(["--ternary"] if ternary else [])]
    forget(source)
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=report.ROOT, stdout=subprocess.DEVNULL)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:  # it must not go on writing into a folder that is about to be deleted
        process.kill()
        process.wait()
        raise
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"the converter failed with exit code {process.returncode}: {' '.join(command)}")
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    shutil.rmtree(out)
    return {"seconds": seconds, "peak_rss_bytes": 1024 * usage.ru_maxrss, "output_bytes": written}


def measure(folder: Path, fmt: Format, config: FluxConfig, seed: int) -> list[dict[str, Any]]:
    """The rows of one format; leaves nothing in the folder."""
    described = folder / "config.json"
    described.write_text(json.dumps(config.to_json()))
    report.say(f"{fmt.name}: writing")
    source, nbytes = write_source(folder, fmt, config, seed)
    report.say(f"{fmt.name}: copying {nbytes / 1e9:.2f} GB")
    copied = copy_seconds(source, folder / "copy")
    rows = []
    for ternary in (False, True):
        form = "ternary" if ternary else "bf16"
        report.say(f"{fmt.name}: converting to {form}")
        found = convert(source, folder / "out", described, ternary)
        speeds = {"mb_per_second": nbytes / 1e6 / found["seconds"], "copy_mb_per_second": nbytes / 1e6 / copied}
        rows.append({"format": fmt.name, "to": form, "source_bytes": nbytes, **found, **speeds})
    shutil.rmtree(source) if source.is_dir() else source.unlink()
    return rows


def scaled(scale: float) -> FluxConfig:
    """FLUX.1-dev with that share of its blocks, at full width."""
    config = dev()
    counts = {name: max(1, round(scale * getattr(config.transformer, name))) for name in
              ("num_double_blocks", "num_single_blocks")}  # fmt: skip
    return dataclasses.replace(config, name=f"FLUX.1-dev x {scale:g}",
                               transformer=dataclasses.replace(config.transformer, **counts))  # fmt: skip


def main(argv: Sequence[str]) -> None:
    parser = report.parser("convert", __doc__)
    add = parser.add_argument
    add("--full", action="store_true", help="all of FLUX.1-dev: 23.8 GB a format")
    add("--scale", type=float, metavar="SHARE", help="this share of FLUX.1-dev's blocks, at full width")
    add("--dir", type=Path, metavar="FOLDER", help="where to write (default: the system's folder for such files)")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an interruption, which deletes what was written
    if args.scale is not None and (args.full or not 0 < args.scale <= 1):
        raise UserError("--scale takes a share between 0 and 1, and no --full.")
    config = dev() if args.full else nano() if args.scale is None else scaled(args.scale)
    try:
        rows = run(config, args)
    except KeyboardInterrupt:
        raise UserError("Interrupted; nothing was left behind.", 130) from None
    header = ["from", "to", "source GB", "s", "MB/s", "copy MB/s", "of copy", "peak RSS GB", "output GB"]
    lines = [
        [
            row["format"], row["to"], row["source_bytes"] / 1e9, row["seconds"], row["mb_per_second"],
            row["copy_mb_per_second"], row["mb_per_second"] / row["copy_mb_per_second"],
            row["peak_rss_bytes"] / 1e9, row["output_bytes"] / 1e9,
        ]
        for row in rows
    ]  # fmt: skip
    print(f"{config.name}: the transformer, synthetic weights\n")
    print(report.table(header, lines))
    report.finish("convert", {"model": config.name, "cores": os.cpu_count(), "rows": rows}, save=args.save)


def run(config: FluxConfig, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of both formats. UserError where the disk has no room."""
    formats = FORMATS["transformer"]
    needed = ROOM * 2 * sum(int(np.prod(shape)) for shape in tensors(formats[0], config).values())
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=args.dir) as folder:
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(f"{needed / 1e9:.0f} GB are needed in {folder}, {free / 1e9:.0f} GB are free; pass --dir.")
        return [row for fmt in formats for row in measure(Path(folder), fmt, config, args.seed)]


if __name__ == "__main__":
    raise SystemExit(report.run(main))
