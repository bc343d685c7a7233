"""Prompts for a distillation: fetched, made, counted.

    python -m flux_jax.prompts fetch DIR              the 1.58-bit FLUX paper's calibration set, 7,232 prompts
    python -m flux_jax.prompts nano OUT --count N     FLUX-nano's training captions (nothing held out in them)
    python -m flux_jax.prompts count FILE...          how many prompts, how many different ones

In: a folder, a file's name, or files that `flux_jax.io.prompts` reads. Out: files; their paths, or a JSON object, on
stdout.
"""

import argparse
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from flux_jax import validation
from flux_jax.cli.main import Parser, guarded, output, output_json, path, program, say
from flux_jax.errors import UserError
from flux_jax.io.atomic import write_whole
from flux_jax.io.places import check_writable
from flux_jax.io.prompts import digest, read_all
from flux_jax.io.reading import SMALL, read_bytes, reason

PARTI = "https://raw.githubusercontent.com/google-research/parti/2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071"


T2I = "https://raw.githubusercontent.com/Karine-Huang/T2I-CompBench/1b7094991a57f3c22abdd4f6e8ba6c1a15517073"


FILES = {  # name -> address, SHA-256. PartiPrompts is Apache-2.0, T2I-CompBench MIT
    "PartiPrompts.tsv": (
        f"{PARTI}/PartiPrompts.tsv",
        "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
    )
} | {
    f"{kind}_train.txt": (f"{T2I}/examples/dataset/{kind}_train.txt", digest)
    for kind, digest in {
        "3d_spatial": "0bba7e9ad31b0ce7908f6cbf2426a4b7ef6e8b841c1b737d0ad2d5b8e688dd93",
        "color": "db5d3287027d453f8c977f0c7315f8a01a770f02f61fa54ae19406762982393f",
        "complex": "d214ac45cb3c5307dd14a144c8c69aa5ffdcc7be74ff71b5dac989f8ca9f924b",
        "non_spatial": "dbac5a9ec83204dcd0c3538a12d3212e2ce66db6f7ba45b49a1d869b2d3f2430",
        "numeracy": "f66bb8708cb0be23c0406e14d892b25661b2b71e3e72abddc79c38466ab629c6",
        "shape": "451bdfccd330d4cf979d45664817be7959e89250b93d5c591cc562b858175a87",
        "spatial": "af14cdf2320057d98f94077e6211c2ddfaabfbb9e3842873657baabb17e00de6",
        "texture": "4846315c5972f9e9cc82e4833099e8ec2c28b999ca77269512715f3f56bde54f",
    }.items()
}


def fetch(directory: Path, server: str | None = None, timeout: float = 60.0) -> list[Path]:
    """Downloads what `directory` lacks of FILES and checks every file, old or new; server: another address to take them
    from, by name. UserError (exit code 3) where the network or a digest fails; no half file is ever left."""
    paths = []
    for name, (address, expected) in FILES.items():
        file = directory / name
        if not os.path.exists(file):
            check_writable(file)
            address = address if server is None else f"{server.rstrip('/')}/{name}"
            try:
                with urllib.request.urlopen(address, timeout=timeout) as answer:
                    data = answer.read(SMALL)
            except (OSError, ValueError, http.client.HTTPException) as error:
                wrong = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else reason(error)
                raise UserError(f"Cannot fetch {address}: {wrong}; download it to {file} yourself.", 3) from error
            if (found := hashlib.sha256(data).hexdigest()) != expected:
                raise UserError(f"{address} has SHA-256 {found}, not {expected}: it is another file.", 3)
            write_whole(file, data, overwrite=False)
            say(f"{file}: {len(data)} bytes")
        elif hashlib.sha256(read_bytes(file, remedy="delete it, and fetch again")).hexdigest() != expected:
            raise UserError(f"{file} is not the published file (its SHA-256 differs): delete it, and fetch again.")
        paths.append(file)
    return paths


def nano_captions(count: int, seed: int) -> list[str]:
    """`count` different captions as FLUX-nano's training draws them; none holds a combination of its evaluation."""
    from flux_jax.nano.dataset import example

    found: dict[str, None] = {}
    index = 0
    while len(found) < count:
        found[example(seed, index)[0]] = None
        index += 1
    return list(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status; a user's mistake is one sentence on stderr."""
    return guarded(run, argv)


def run(argv: Sequence[str]) -> None:
    parser = Parser(prog=program("prompts"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sub = commands.add_parser("fetch", help="PartiPrompts and T2I-CompBench's training prompts")
    sub.add_argument("directory", type=path, metavar="DIR")
    sub.add_argument("--server", metavar="URL", help="take the files from URL/NAME, such as a mirror")
    sub.set_defaults(run=_run_fetch)
    sub = commands.add_parser("nano", help="captions for the distillation of FLUX-nano")
    sub.add_argument("out", type=path, metavar="OUT")
    sub.add_argument("--count", type=int, default=4096, help="(default: %(default)s)")
    sub.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    sub.add_argument("--overwrite", action="store_true")
    sub.set_defaults(run=_run_nano)
    sub = commands.add_parser("count", help="prompts in files")
    sub.add_argument("files", type=path, nargs="+", metavar="FILE")
    sub.set_defaults(run=_run_count)
    args = parser.parse_args(argv)
    args.run(args)


def _run_fetch(args: argparse.Namespace) -> None:
    for file in fetch(args.directory, args.server):
        output(str(file))


def _run_nano(args: argparse.Namespace) -> None:
    if not 1 <= args.count <= 20_000:  # the grammar has some ten thousands of captions
        raise UserError(f"--count must be from 1 to 20000, not {args.count}.")
    validation.check_seeds([args.seed])
    check_writable(args.out)
    captions = nano_captions(args.count, args.seed)
    write_whole(args.out, "".join(f"{caption}\n" for caption in captions).encode(), overwrite=args.overwrite)
    output(str(args.out))


def _run_count(args: argparse.Namespace) -> None:
    prompts = read_all(args.files)
    output_json({"prompts": len(prompts), "different": len(set(prompts)), "sha256": digest(prompts)})
