"""`python -m bench.nano_latents`: FLUX-nano's latents on this device, in numbers, beside those of a CPU.

In: the packed FLUX-nano, of each kind of weights, and captions; the latents that a CPU found in float32, as
`--reference` wrote them (without: what this device finds in float32 itself). Out, for float32 and bfloat16: whether all
is finite, the largest difference over the largest value, and 20 log10(range / root mean square of the difference), dB.
"""

import argparse
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import report
from bench.summary import is_problem
from flux_jax import FluxPipeline
from flux_jax.errors import UserError
from flux_jax.io.atomic import write_whole

PROMPTS = (
    "a red circle to the left of a blue square",
    "a green cross",
    "two yellow stars",
    "a purple triangle above an orange circle",
)
STEPS = 8
TINY = "one picture of two steps by one model in float32, compared with itself"
MODELS = {
    "nano-bf16": ("nano-bf16", {}),
    "nano-1.58bit A16": ("nano-1.58bit", {"activations": "bf16"}),
    "nano-1.58bit A8": ("nano-1.58bit", {"activations": "int8"}),
}
# The least that rounding alone leaves. Seen on a CPU: bfloat16 62 to 66 dB, and int8's rounding, which turns a small
# difference into a step, 69 dB; a wrong kernel paints another picture, below 30 dB.
LEAST_DECIBELS = {"float32": 55.0, "bfloat16": 45.0}


def latents(name: str, dtype: str, prompts: Sequence[str], steps: int) -> np.ndarray:
    """Of one picture for each prompt, [picture, token, channel] float32."""
    model, options = MODELS[name]
    pipe = FluxPipeline.from_pretrained(model, dtype=dtype, **options)
    how = {"num_inference_steps": steps, "output_type": "latent"}
    with jax.default_matmul_precision("highest"):  # or a GPU rounds float32 to 10 bits
        return np.concatenate([np.asarray(pipe(prompt, seed=7 + i, **how).images) for i, prompt in enumerate(prompts)])


def compare(found: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Largest difference over the largest value, and decibels. ValueError for latents of other pictures."""
    if found.shape != right.shape:
        raise ValueError(f"latents {list(found.shape)} cannot be compared with {list(right.shape)}")
    off, largest = found.astype(np.float64) - right, np.abs(right).max()
    noise = max(float(np.sqrt(np.mean(off**2))), 1e-12)
    return {"error": float(np.abs(off).max() / largest), "decibels": float(20 * np.log10(2 * largest / noise))}


def row(found: np.ndarray, right: np.ndarray, dtype: str) -> dict[str, Any]:
    """What is said of one model: "wrong" where it is not finite, or further off than rounding can be."""
    if not np.isfinite(found).all():
        return {"wrong": "not finite"}
    far = compare(found, right)
    return far | ({} if far["decibels"] >= LEAST_DECIBELS[dtype] else {"wrong": "another picture"})


def read(path: Path) -> dict[str, np.ndarray]:
    """The carried latents; none where there is no such file. UserError where it is damaged."""
    try:
        with open(path, "rb") as file, np.load(file) as held:
            return {name: held[name] for name in MODELS}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no latents of FLUX-nano: {error}") from None


def main(argv: Sequence[str]) -> None:
    args = options(argv)
    prompts, steps = (PROMPTS[:1], 2) if args.tiny else (PROMPTS, STEPS)
    if args.reference:
        held = io.BytesIO()
        np.savez(held, **{name: latents(name, "float32", prompts, steps) for name in MODELS})
        write_whole(args.reference, held.getvalue(), overwrite=True)
        report.say(f"written: {args.reference}")
        return
    right, journal = {} if args.tiny else read(args.against), report.journal(args)
    models = list(MODELS)[-1:] if args.tiny else MODELS
    dtypes = ["float32"] if args.tiny else LEAST_DECIBELS
    beside = "a CPU's" if right else "this device's float32"
    for dtype in dtypes:
        for name in models:

            def job(name: str = name, dtype: str = dtype) -> dict[str, Any]:
                found = latents(name, dtype, prompts, steps)
                if dtype == "float32":
                    right.setdefault(name, found)
                if name not in right:
                    raise ValueError("there are no latents to compare with")
                return row(found, right[name], dtype)

            journal.attempt({"model": name, "dtype": dtype, "beside": beside}, job, least=3.0)
    print(report.table(list(journal.rows[0]), [[row.get(key) for key in journal.rows[0]] for row in journal.rows]))
    report.finish("nano_latents", {"tiny": args.tiny, "rows": journal.rows}, save=args.save)
    if bad := sum(map(is_problem, journal.rows)):
        raise UserError(f"{bad} of {len(journal.rows)} are wrong or failed", 1)


def options(argv: Sequence[str]) -> argparse.Namespace:
    parser = report.parser("nano_latents", __doc__, tiny=TINY)
    add = parser.add_argument
    add("--reference", type=Path, metavar="FILE", help="write the float32 latents of this device, and no more")
    where = report.ROOT / ".gpu" / "nano_cpu.npz"
    add(
        "--against",
        type=Path,
        default=where,
        metavar="FILE",
        help="latents to compare with (default: .gpu/nano_cpu.npz)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(report.run(main))
