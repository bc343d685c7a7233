"""Configs: JSON and back, what is refused, and FLUX.1's published sizes."""

import json

import pytest

from flux_jax import config

PRESETS = [config.dev(), config.schnell(), config.nano()]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda c: c.name)
def test_json_round_trip(preset):
    assert config.FluxConfig.from_json(json.loads(json.dumps(preset.to_json()))) == preset


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("vae"), "vae"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d["t5"].update(d_model="big"), "d_model"),
        (lambda d: d["t5"].update(d_model=True), "d_model"),
        (lambda d: d["clip"].update(activation="relu"), "activation"),
        (lambda d: d["transformer"].update(axes_dim=[1, 2.5]), "axes_dim"),
        (lambda d: d["transformer"].update(axes_dim=[1, 2]), "axes_dim"),
        (lambda d: d.update(vae=[]), "vae"),
    ],
)
def test_bad_json_is_refused_by_name(change, message):
    data = config.dev().to_json()
    change(data)
    with pytest.raises(ValueError, match=message):
        config.FluxConfig.from_json(data)


@pytest.mark.parametrize(("preset", "parameters"), [(config.dev(), 11_901_408_320), (config.schnell(), 11_891_178_560)])
def test_transformer_has_the_published_number_of_parameters(preset, parameters):
    import math

    from flux_jax.models.params import abstract_component, leaf_table

    table = leaf_table(abstract_component("transformer", preset))
    assert sum(math.prod(shape) for shape in table.values()) == parameters


def test_pixels_behind_a_token():
    assert config.dev().pixels_per_token == 16 and config.dev().default_grid == (64, 64)
