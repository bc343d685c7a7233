"""CLIP score and LPIPS against transformers and a restatement in torch, by way of the files that users bring."""

import json
import os

import ml_dtypes
import numpy as np
import parity
import published
import pytest
from PIL import Image
from safetensors.numpy import save_file

from flux_jax.compare import clip, lpips, networks, towers
from flux_jax.errors import UserError

THEIRS = r"(?<=\()(?!its ).*(?=\))"  # in brackets: what other libraries say
PROMPTS = ["a red circle", "b", "two blue squares and " * 9]  # the last is longer than the tower


def picture(height, width, seed):
    """A smooth random picture uint8 [h, w, 3]."""
    rough = np.random.default_rng(seed).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def reference():
    return pytest.importorskip("torch_judges")


@pytest.mark.reference
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


@pytest.mark.reference
@pytest.mark.parametrize("size", [(64, 64), (91, 50), (37, 224), (16, 20)])
def test_pictures_are_prepared_as_by_transformers(reference, size):
    shown = [picture(*size, seed) for seed in (0, 1)]
    expected = reference.prepare(shown).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(clip.prepare(shown, reference.IMAGE_SIZE), expected)


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 32), (3, 3)])
def test_pictures_are_cut_to_their_middle_square(height, width):
    """Without torch and without a reference: the edges are white, the middle is of one colour."""
    shown = np.full((height, width, 3), 255, np.uint8)
    least = min(height, width)
    top, left = (height - least) // 2, (width - least) // 2
    shown[top : top + least, left : left + least] = 0, 100, 200
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = (np.array([0, 100, 200]) / 255 - mean) / deviation
    found = clip.prepare([shown], least)
    assert found.shape == (1, least, least, 3)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1e-6)


@pytest.mark.reference
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
    # as published, it says some of it a second time, and much that is no size
    copies = {"text_config_dict": text, "vision_config_dict": image | {"patch_size": 14}}
    others = {
        "architectures": ["CLIPModel"],
        "torch_dtype": "float32",
        "transformers_version": None,
        "initializer_factor": 1.0,
    }
    path.write_text(json.dumps(data | copies | others | {"vision_config": image | {"patch_size": 14}}))
    assert towers.read_config(path) == found
    path.write_text(json.dumps({"model_type": "clip"}))  # transformers' defaults are clip-vit-base-patch32
    found = towers.read_config(path)
    assert (found.size, found.patch, found.text.hidden_size, found.image.hidden_size) == (224, 32, 512, 768)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "config.json"),
        ('{"model_type": "siglip"}', "siglip"),
        ('{"model_type": "clip", "vision_config": {"hidden_act": "relu"}}', "relu"),
        ('{"model_type": "clip", "text_config": 3}', "config.json"),
        ('{"model_type": "clip", "text_config": {"hidden_size": "a"}}', "hidden_size"),
        ('{"model_type": "clip", "text_config": {"eos_token_id": [1, 2]}}', "config.json"),
        ('{"model_type": "clip", "vision_config": {"patch_size": 0}}', "patch_size"),
        ('{"model_type": "clip", "vision_config": {"image_size": -224}}', "image_size"),
        ('{"model_type": "clip", "vision_config": {"image_size": 1000000, "patch_size": 1}}', "max_positions"),
        ('{"model_type": "clip", "text_config": {"num_attention_heads": 0}}', "config.json"),
        ('{"model_type": "clip", "projection_dim": null}', "projection_dim"),
        ('{"model_type": "clip", "quantization_config": {"quant_method": "gptq"}}', "quantized"),
        ("[" * 2000, "64 levels"),
        ("[]", "config.json"),
        (None, "config.json"),
    ],
)
def test_other_configs_are_refused(tmp_path, text, named, snapshot_message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with snapshot_message.raises(UserError, named, volatile=THEIRS) as caught:
        towers.read_config(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("preparation", "named"),
    [
        ({"size": 32, "crop_size": {"height": 32, "width": 32}, "resample": 3, "feature_extractor_type": "x"}, None),
        ({"size": {"shortest_edge": 32}, "image_mean": [0.48145466, 0.4578275, 0.40821073]}, None),
        ({"size": {"height": 32, "width": 32}}, "size"),
        ({"crop_size": 31}, "crop_size"),
        ({"image_std": [0.5, 0.5, 0.5]}, "image_std"),
        ({"do_center_crop": False}, "do_center_crop"),
        ({"resample": None}, "resample"),
        ([], "object"),
    ],
)
def test_pictures_that_a_clip_wants_otherwise(tmp_path, preparation, named, snapshot_message):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(preparation))
    if named is None:
        towers.check_preparation(path, 32)
    else:
        with snapshot_message.raises(UserError, named, path):
            towers.check_preparation(path, 32)


def test_how_pictures_are_made_is_looked_at_before_any_is(tmp_path):
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "preprocessor_config.json").write_text('{"do_resize": false}')
    with pytest.raises(UserError, match="do_resize"):
        clip.judge(tmp_path, PROMPTS)


@pytest.mark.parametrize("kind", ["pipe", "nothing", "text", "float8", "outside", "a folder of its own"])
def test_files_that_hold_no_network(tmp_path, kind, snapshot_message):
    file = tmp_path / "lpips.safetensors"
    names = {"net.slice1.0.weight": np.zeros(8, np.float32)}
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "text":
        file.write_text("<html>")
    elif kind == "float8":
        save_file({name: value.astype(ml_dtypes.float8_e4m3fn) for name, value in names.items()}, file)
    elif kind == "outside":
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
        file = tmp_path
    elif kind != "nothing":
        file.mkdir()
    with snapshot_message.raises(UserError, file) as caught:
        lpips.judge(file, 64, 64)
    assert "\n" not in str(caught.value)


def test_weights_in_shards(tmp_path, snapshot_message):
    """As in the folder of a large CLIP; bfloat16, too. A shard that lacks, and an index that is none."""
    tensors = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float32).astype(ml_dtypes.bfloat16)}
    published.write_shards(tmp_path, tensors, 2, stem="model")
    source = networks.open_tensors(tmp_path)
    assert source.entries.keys() == tensors.keys()
    assert all(np.array_equal(source.read(name), value) for name, value in tensors.items())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with snapshot_message.raises(UserError, "00002"):
        networks.open_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with snapshot_message.raises(UserError, tmp_path, volatile=THEIRS):
        networks.open_tensors(tmp_path)


def test_small_pictures_have_no_lpips(tmp_path, snapshot_message):
    with snapshot_message.raises(UserError, "31 x 31", "64 x 16"):
        lpips.judge(tmp_path / "any", 16, 64)
