"""What may be asked of a model, checked before anything is computed; shared by the pipeline and the command line.

In: the numbers of a request and a `FluxConfig`. Out: the same numbers, sizes fitted to whole tokens, or a UserError of
one sentence. Pure Python: a wrong flag is answered before JAX is imported.
"""

import math
import secrets
from collections.abc import Sequence

from flux_jax.config import FluxConfig
from flux_jax.errors import UserError

MAX_EDGE = 16_384  # pixels
MAX_IMAGE_TOKENS = 65_536  # 4096 x 4096 pixels of FLUX; its attention is quadratic in this
MAX_STEPS = 1000  # the training schedule has no more noise levels
ACTIVATIONS = ("bf16", "int8")  # of ternary layers; the same as `pallas_kernels.dispatch.ACTIVATIONS`, without JAX
# none: all components stay on the device. model: each is there while it works. layers: so, and T5 one layer at a time.
OFFLOAD_MODES = ("none", "model", "layers")
MESH_AXES = ("data", "model")  # pictures side by side; one transformer over several devices
SEED_LIMIT = 2**32  # what a 32-bit random key distinguishes


def random_seed() -> int:
    """A seed nobody chose, in [0, 2**32)."""
    return secrets.randbelow(SEED_LIMIT)


def nearest_multiple(edge: int | float, multiple: int) -> int:
    return max(1, math.floor(edge / multiple + 0.5)) * multiple


def fit_size(config: FluxConfig, height: int, width: int, *, strict: bool = False) -> tuple[int, int, list[str]]:
    """(height, width, notices): each edge rounded to whole tokens, with a sentence for each that changed.

    Raises UserError for a size no model can draw, and under `strict` for one that would have to be rounded.
    """
    multiple, notices, edges = config.pixels_per_token, [], []
    for name, edge in (("height", height), ("width", width)):
        if not isinstance(edge, int) or not 1 <= edge <= MAX_EDGE:
            raise UserError(f"{name} must be between {multiple} and {MAX_EDGE} pixels, not {edge!r}.")
        fitted = min(nearest_multiple(edge, multiple), MAX_EDGE)
        if fitted != edge and strict:
            raise UserError(f"{name} {edge} is not a multiple of {multiple}; the nearest is {fitted}.")
        if fitted != edge:
            notices.append(f"{name} {edge} is not a multiple of {multiple}; using {fitted}.")
        edges.append(fitted)
    tokens = edges[0] * edges[1] // multiple**2
    if tokens > MAX_IMAGE_TOKENS:
        raise UserError(
            f"{edges[1]}x{edges[0]} pixels are {tokens} image tokens, more than the {MAX_IMAGE_TOKENS} allowed; "
            "choose a smaller size."
        )
    return edges[0], edges[1], notices


def check_prompt(prompt: str) -> str:
    """The prompt, if it has a word in it."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("The prompt is empty; say what to draw.")
    return prompt


def seeds_of(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """A seed for each of `count` pictures: those given, or counted up from one, given or drawn at random."""
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise UserError(f"{len(seed)} seeds for {count} pictures; pass one for each, or one for all.")
        return check_seeds(list(seed))
    first = random_seed() if seed is None else seed
    return check_seeds([first + i if seed is not None else (first + i) % SEED_LIMIT for i in range(count)])


def check_seeds(seeds: list[int]) -> list[int]:
    """The seeds, if each is in [0, 2**32)."""
    for seed in seeds:
        if not isinstance(seed, int) or not 0 <= seed < SEED_LIMIT:
            raise UserError(f"A seed must be a whole number from 0 to {SEED_LIMIT - 1}, not {seed!r}.")
    return seeds


def check_numbers(
    config: FluxConfig, *, steps: int, guidance: int | float, true_cfg: int | float, max_sequence_length: int
) -> None:
    """Raises UserError unless each number is one that the model can use."""
    if not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise UserError(f"The number of steps must be from 1 to {MAX_STEPS}, not {steps!r}.")
    if not (math.isfinite(guidance) and 0 <= guidance <= 100):
        raise UserError(f"Guidance must be between 0 and 100, not {guidance!r}.")
    if not (math.isfinite(true_cfg) and 1 <= true_cfg <= 100):
        raise UserError(f"True guidance must be between 1 (off) and 100, not {true_cfg!r}.")
    longest = config.sampling.max_sequence_length
    if not isinstance(max_sequence_length, int) or not 1 <= max_sequence_length <= longest:
        raise UserError(
            f"max_sequence_length must be from 1 to {longest} for {config.name}, not {max_sequence_length!r}."
        )
