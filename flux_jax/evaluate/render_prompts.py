"""Draws the prompts of a benchmark with a model, and says of each picture how it was made.

In: a `Variant`, arguments of the pipeline, `Picture`s. Out: functions for `flux_jax.evaluate.image_folders.make`: one
that draws on a device, and one that gives the record of a picture.
"""

from collections.abc import Callable
from typing import Any

from flux_jax.evaluate.benchmarks import Picture
from flux_jax.evaluate.models import Variant
from flux_jax.io import png
from flux_jax.runtime.environment import provenance

# Of the keys in a file: a folder that an earlier version began is finished with the bytes that it would have had.
RECORD_ORDER = ("prompt", "seed", "format", "negative_prompt", "steps", "guidance", "true_cfg", "height", "width",
                "max_sequence_length", "dtype", "model", "device", "versions")  # fmt: skip


def painter(variant: Variant, sampling: dict[str, Any]) -> Callable[[Any], Callable[[Picture], Any]]:
    """device -> (picture -> PIL image), with a copy of the model on that device."""
    import jax

    def on(device: Any) -> Callable[[Picture], Any]:
        with jax.default_device(device):
            pipe = variant.load()

        def draw(picture: Picture) -> Any:
            with jax.default_device(device), variant.tracing():
                return pipe(picture.prompt, seed=picture.seed, **sampling).images[0]

        return draw

    return on


def recorder(variant: Variant, sampling: dict[str, Any], device: Any) -> Callable[[Picture, Any], dict[str, Any]]:
    """(picture, image) -> the record that its file holds, as `flux_jax.generate` writes it."""
    identity = variant.identity()
    common: dict[str, Any] = {
        "steps": sampling["num_inference_steps"],
        "guidance": sampling["guidance_scale"],
        "true_cfg": 1.0,
        "height": sampling["height"],
        "width": sampling["width"],
        "max_sequence_length": variant.config().sampling.max_sequence_length,
        "dtype": identity["dtype"],
        "model": {"id": variant.model} | {key: value for key, value in identity.items() if key != "dtype"},
        **provenance(device),
    }

    def record(picture: Picture, image: Any) -> dict[str, Any]:
        entry = png.Record(prompt=picture.prompt, seed=picture.seed, **common).to_json()
        return {key: entry[key] for key in RECORD_ORDER}

    return record
