"""What may be asked of a model, checked before anything is computed; shared by the pipeline and the command line.

In: the numbers of a request and a `FluxConfig`. Out: the same numbers, sizes fitted to whole tokens, or a UserError of
one sentence. Pure Python: a wrong flag is answered before JAX is imported.
"""

import math
import secrets
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from flux_jax.config import FluxConfig
from flux_jax.errors import UserError, shortened

MAX_EDGE = 16_384  # pixels
MAX_IMAGE_TOKENS = 65_536  # 4096 x 4096 pixels of FLUX; its attention is quadratic in this
MAX_STEPS = 1000  # the training schedule has no more noise levels
ACTIVATIONS = ("bf16", "int8")  # of ternary layers; the same as `pallas_kernels.dispatch.ACTIVATIONS`, without JAX
# none: all components stay on the device. model: each is there while it works. layers: so, and T5 one layer at a time.
OFFLOAD_MODES = ("none", "model", "layers")
MESH_AXES = ("data", "model")  # pictures side by side; one transformer over several devices
SEED_LIMIT = 2**32  # what a 32-bit random key distinguishes
MAX_PICTURES = 100_000  # of one run or call
MAX_PROMPT = 100_000  # characters; T5 reads some 2,500 of them
RANGES: dict[str, tuple[int, int]] = {  # of what decides a picture, whatever the model
    "seed": (0, SEED_LIMIT - 1),
    "height": (1, MAX_EDGE),
    "width": (1, MAX_EDGE),
    "steps": (1, MAX_STEPS),
    "guidance": (0, 100),
    "true_cfg": (1, 100),
    "max_sequence_length": (1, MAX_PROMPT),
}


def is_whole(value: Any, least: int | float, most: int | float) -> bool:
    """Whether it is a whole number in that range, of Python's or numpy's; true and false are none."""
    return isinstance(value, Integral) and is_number(value, least, most)


def is_number(value: Any, least: int | float, most: int | float) -> bool:
    """Whether it is a number in that range, of Python's or numpy's; true, false and NaN are none."""
    number: Any = value  # what a checker knows of Real has no order
    return isinstance(value, Real) and not isinstance(value, bool) and bool(least <= number <= most)


def random_seed() -> int:
    """A seed nobody chose, in [0, 2**32)."""
    return secrets.randbelow(SEED_LIMIT)


def nearest_multiple(edge: int | float, multiple: int) -> int:
    return max(1, math.floor(edge / multiple + 0.5)) * multiple


def fit_size(config: FluxConfig, height: Any, width: Any, *, strict: bool = False) -> tuple[int, int, list[str]]:
    """(height, width, notices): each edge rounded to whole tokens, with a sentence for each that changed.

    Raises UserError for a size no model can draw, and under `strict` for one that would have to be rounded.
    """
    multiple, notices, edges = config.pixels_per_token, [], []
    for name, edge in (("height", height), ("width", width)):
        if not is_whole(edge, *RANGES[name]):
            raise UserError(f"{name} must be between {multiple} and {MAX_EDGE} pixels, not {shortened(edge)}.")
        fitted = min(nearest_multiple(int(edge), multiple), MAX_EDGE)
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


def check_prompt(prompt: Any) -> str:
    """The prompt, if it has a word in it, and `check_text` takes it."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("The prompt is empty; say what to draw.")
    return check_text(prompt)


def check_text(text: Any, name: str = "prompt") -> str:
    """A text that steers a picture, if it can be tokenized and written down."""
    if not isinstance(text, str):
        raise UserError(f"The {name} must be text, not {shortened(text)}.")
    if len(text) > MAX_PROMPT:
        raise UserError(f"The {name} has {len(text)} characters, and {MAX_PROMPT} are the most; shorten it.")
    if "\0" in text:
        raise UserError(f"The {name} holds a zero byte; leave it out.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = shortened(text[max(0, error.start - 10) : error.end + 10])
        raise UserError(f"The {name} holds what is no UTF-8 text ({half}); write it in a UTF-8 terminal.") from error
    return text


def seeds_of(seed: Any, count: int) -> list[int]:
    """A seed for each of `count` pictures: those given, or counted up from one, given or drawn at random."""
    if seed is None:
        first = random_seed()
        return [(first + i) % SEED_LIMIT for i in range(count)]
    if isinstance(seed, str | bytes) or (seeds := listed(seed)) is None:
        (first,) = check_seeds([seed])
        return check_seeds([first + i for i in range(count)])
    if len(seeds) != count:
        raise UserError(f"{len(seeds)} seeds for {count} pictures; pass one for each, or one for all.")
    return check_seeds(seeds)


def listed(given: Any) -> list[Any] | None:
    """The members of a list, an array or the like; None for what has none."""
    try:
        return list(given)
    except TypeError:
        return None


def check_seeds(seeds: Sequence[Any]) -> list[int]:
    """The seeds, if each is in [0, 2**32)."""
    for seed in seeds:
        if not is_whole(seed, *RANGES["seed"]):
            raise UserError(
                f"A seed must be a whole number from 0 to {SEED_LIMIT - 1}, not {shortened(seed)}{_way_out(seed)}."
            )
    return [int(seed) for seed in seeds]


def _way_out(seed: Any) -> str:
    """For seeds as other programs have them: of 64 bits, or below zero for any."""
    if not is_whole(seed, -math.inf, math.inf):
        return ""
    if seed < 0:
        return "; leave it out for a random one"
    reduced = int(seed) % SEED_LIMIT
    return (
        f"; a larger one of another program means another picture here anyway: its remainder modulo 2**32 is {reduced}"
    )


def check_numbers(config: FluxConfig, *, steps: Any, guidance: Any, true_cfg: Any, max_sequence_length: Any) -> None:
    """Raises UserError unless each number is one that the model can use."""
    if not is_whole(steps, *RANGES["steps"]):
        raise UserError(f"The number of steps must be from 1 to {MAX_STEPS}, not {shortened(steps)}.")
    if not is_number(guidance, *RANGES["guidance"]):
        raise UserError(f"Guidance must be between 0 and 100, not {shortened(guidance)}.")
    if not is_number(true_cfg, *RANGES["true_cfg"]):
        raise UserError(f"True guidance must be between 1 (off) and 100, not {shortened(true_cfg)}.")
    longest = config.sampling.max_sequence_length
    if not is_whole(max_sequence_length, 1, longest):
        raise UserError(
            f"max_sequence_length must be from 1 to {longest} for {shortened(config.name, quote=False)}, "
            f"not {shortened(max_sequence_length)}."
        )
