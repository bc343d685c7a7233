"""CLIP score and LPIPS against transformers and a restatement in torch, by way of the files that users bring."""

import json

import numpy as np
import parity
import pytest
from PIL import Image

from flux_jax.compare import clip, lpips, towers
from flux_jax.errors import UserError

PROMPTS = ["a red circle", "b", "two blue squares and " * 9]  # the last is longer than the tower


def picture(height, width, seed):
    """A smooth random picture uint8 [h, w, 3]."""
    rough = np.random.default_rng(seed).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def reference():
    return pytest.importorskip("torch_judges")


@pytest.mark.parametrize(("eos_token_id", "activation"), [(2, "quick_gelu"), (95, "gelu")])
def test_clip_score_equals_transformers(reference, tmp_path, eos_token_id, activation):
    model = reference.clip(eos_token_id, activation)
    tokenizer = reference.save_clip(model, tmp_path)
    sizes = ((48, 64), (100, 37), (32, 32))
    a, b = ([picture(*size, seed + i) for i, size in enumerate(sizes)] for seed in (0, 5))
    measure = clip.judge(tmp_path, PROMPTS)()
    found = [measure(i, *pair) for i, pair in enumerate(zip(a, b, strict=True))]
    for key, shown in (("clip_a", a), ("clip_b", b)):
        expected = reference.clip_scores(model, tokenizer, PROMPTS, shown)
        assert np.ptp(expected) > 1  # prompts and pictures matter
        parity.check("CLIP score", [row[key] for row in found], expected)


@pytest.mark.parametrize("size", [(64, 64), (91, 50), (37, 224), (16, 20)])
def test_pictures_are_prepared_as_by_transformers(reference, size):
    shown = picture(*size, 0)
    expected = reference.prepare([shown])[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(clip.prepare(shown, reference.IMAGE_SIZE), expected, atol=1e-6)


def test_lpips_equals_its_restatement(reference, tmp_path):
    model, file = reference.LPIPS(), tmp_path / "lpips-alex.safetensors"
    reference.save_lpips(model, file)
    a, b = picture(70, 93, 0), picture(70, 93, 1)
    measure = lpips.judge(file, 70, 93)()
    near = np.clip(a.astype(int) + 9, 0, 255).astype(np.uint8)
    expected = [reference.lpips_distance(model, a, other) for other in (b, near)]
    assert expected[0] > 2 * expected[1] > 0
    parity.check("LPIPS", [measure(0, a, other)["lpips"] for other in (b, near)], expected)
    assert measure(0, a, a)["lpips"] < 1e-12


def test_config_of_a_published_clip(tmp_path):
    """openai/clip-vit-large-patch14 in the fields that differ from the defaults; and what may be left out."""
    path = tmp_path / "config.json"
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": 2}
    image = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    data = {"model_type": "clip", "projection_dim": 768, "text_config": text}
    path.write_text(json.dumps(data | {"vision_config": image | {"patch_size": 14}}))
    found = towers.read_config(path)
    assert (found.text.hidden_size, found.text.eos_token_id, found.text.vocab_size) == (768, 2, 49408)
    assert (found.image.num_layers, found.image.max_positions, found.projection) == (24, 257, 768)
    path.write_text(json.dumps({"model_type": "clip"}))  # transformers' defaults are clip-vit-base-patch32
    found = towers.read_config(path)
    assert (found.size, found.patch, found.text.hidden_size, found.image.hidden_size) == (224, 32, 512, 768)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "does not describe a CLIP model"),
        ('{"model_type": "siglip"}', "'siglip', not 'clip'"),
        ('{"model_type": "clip", "vision_config": {"hidden_act": "relu"}}', "'relu'"),
        ('{"model_type": "clip", "text_config": 3}', "does not describe"),
        (None, "config.json"),
    ],
)
def test_other_configs_are_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=words):
        towers.read_config(tmp_path / "config.json")


def test_small_pictures_have_no_lpips(tmp_path):
    with pytest.raises(UserError, match="at least 31 x 31 pixels, not 64 x 16"):
        lpips.judge(tmp_path / "any", 16, 64)
