"""`python -m convert --ternary`: from folders, single files and checkpoints; back to diffusers; pictures from it."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import published
import pytest
import tiny_model
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from safetensors.numpy import load_file, save_file

from convert.__main__ import main
from flux_jax.checkpoints.checkpoint import MANIFEST, Checkpoint
from flux_jax.checkpoints.checksums import CRCS, SUMS
from flux_jax.checkpoints.writer import save
from flux_jax.cli.generate import main as generate
from flux_jax.errors import UserError
from flux_jax.io import png
from flux_jax.models.params import leaves
from flux_jax.models.quantize import METHODS, quantization_report, ternarize, ternary_paths
from flux_jax.sampling.pipeline import FluxPipeline
from pallas_kernels import LAYOUT_VERSION, unpack_ternary

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
CONFIG = tiny_model.published_config()  # rows of one and of two tiles


@pytest.fixture(scope="module")
def original(tiny_published_checkpoint):
    """A float32 checkpoint of random weights."""
    return tiny_published_checkpoint


@pytest.fixture(scope="module")
def folder(tiny_published_folder):
    """The same as a diffusers folder."""
    return tiny_published_folder


@pytest.fixture(scope="module")
def pristine(original, tmp_path_factory):
    """The checkpoint, rounded."""
    out = tmp_path_factory.mktemp("rounded") / "ternary"
    assert main([str(original), str(out), "-q", "--ternary", "--dtype", "float32"]) == 0
    return out


@pytest.fixture
def saved(pristine, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(pristine, tmp_path / "ternary")


def weights(path):
    opened = Checkpoint.open(path)
    return opened.read("transformer", opened.table("transformer"))


def same(a, b):
    return a.keys() == b.keys() and all(
        x.dtype == b[name].dtype and np.array_equal(x, b[name]) for name, x in a.items()
    )


@pytest.mark.parametrize("method", [METHODS[0], *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])])
def test_what_is_stored(original, tmp_path, method, capsys, snapshot_message):
    assert main([str(original), str(tmp_path / "out"), f"--ternary={method}"]) == 0
    done = capsys.readouterr()
    assert done.out == f"{tmp_path / 'out'}\n"
    assert quantization_report(CONFIG) in done.err
    snapshot_message(done.err.splitlines()[-1], "warning")
    stored, dense, shapes = weights(tmp_path / "out"), weights(original), ternary_paths(CONFIG)
    for path, (n, k) in shapes.items():
        codes, scale = ternarize(dense.pop(f"{path}.weight"), method)
        assert np.array_equal(unpack_ternary(stored.pop(f"{path}.packed"), k), codes)
        assert np.array_equal(stored[f"{path}.scale"], scale) and stored.pop(f"{path}.scale").dtype == np.float32
        assert codes.shape == (n, k)
    assert same(stored, dense)
    manifest = Checkpoint.open(tmp_path / "out").manifest
    assert manifest["quantization"] == {
        "layout": LAYOUT_VERSION, "method": method, "distilled": False, "activations": "bf16"
    }  # fmt: skip


def test_every_source_gives_the_same(original, folder, pristine, tmp_path):
    assert main([str(folder), str(tmp_path / "diffusers"), "-q", "--ternary", "--dtype", "float32"]) == 0
    single = published.bfl_transformer(load_file(folder / TRANSFORMER), CONFIG.transformer)
    file = published.write(tmp_path / "flux1.safetensors", single)
    config = published.config_file(tmp_path / "config.json", CONFIG)
    options = ["--parts", "transformer", "--config", str(config), "--dtype", "float32", "-q"]
    assert main([str(file), str(tmp_path / "bfl"), *options, "--ternary"]) == 0
    expected = weights(pristine)
    assert same(weights(tmp_path / "diffusers"), expected)
    assert same(weights(tmp_path / "bfl"), expected)


def test_loading(original, pristine):
    """Equal to rounding the loaded transformer; a dtype that is asked for leaves codes and scales alone."""
    opened = Checkpoint.open(pristine)
    expected = dict(leaves(tiny_model.quantized(Checkpoint.open(original).load("transformer"))))
    loaded = opened.using("int8").load("transformer", dtype=jnp.bfloat16)
    assert loaded.single_blocks.linear1.activations == "int8"
    assert opened.load("transformer").double_blocks.img.qkv.activations == "bf16"
    for name, value in leaves(loaded):
        wanted = expected.pop(name)
        if name.endswith(".scale"):
            assert value.dtype == np.float32 and np.allclose(value, wanted, rtol=1e-6)
        else:
            wanted = wanted if wanted.dtype == np.uint8 else wanted.astype(jnp.bfloat16)
            assert value.dtype == wanted.dtype and np.array_equal(value, wanted), name
    assert not expected


def test_back_to_diffusers_multiplies_out(pristine, tmp_path):
    assert main(["--to", "diffusers", str(pristine), str(tmp_path / "out"), "-q"]) == 0
    stored, shapes = weights(pristine), ternary_paths(CONFIG)
    tensors = load_file(tmp_path / "out" / TRANSFORMER)

    def dense(path):
        return unpack_ternary(stored[f"{path}.packed"], shapes[path][1]) * stored[f"{path}.scale"][:, None]

    k = dense("double_blocks.0.txt.qkv").reshape(3, -1, CONFIG.transformer.hidden_size)[1]
    assert np.array_equal(tensors["transformer_blocks.0.attn.add_k_proj.weight"], k)
    assert np.array_equal(tensors["single_transformer_blocks.1.proj_out.weight"], dense("single_blocks.1.linear2"))
    assert np.array_equal(tensors["x_embedder.weight"], stored["img_in.weight"])
    # Rounding it again finds the same codes and scales.
    assert main([str(tmp_path / "out"), str(tmp_path / "again"), "-q", "--ternary", "--dtype", "float32"]) == 0
    again = weights(tmp_path / "again")
    assert all(np.array_equal(value, again[name]) for name, value in stored.items() if not name.endswith(".scale"))
    assert all(np.allclose(value, again[name]) for name, value in stored.items())


def test_a_picture(pristine, tmp_path, capsys, snapshot_message):
    assert generate(["red", "--model", str(pristine), "-o", str(tmp_path / "red.png"), "--steps", "1", "-q"]) == 0
    snapshot_message(capsys.readouterr().err.splitlines()[0], pristine)  # kernels may speak, too, once a process
    assert (tmp_path / "red.png").is_file()


@pytest.mark.slow
def test_activations_can_be_chosen_for_a_picture(pristine, original, tmp_path, capsys, snapshot_message):
    """Said in the picture's record, and followed when it is repeated; only ternary weights have the choice."""

    def draw(*words, model=pristine):
        what = [] if "-C" in words else ["red", "--seed", "3", "--steps", "1"]
        return generate([*map(str, words), *what, "--model", str(model), "--no-cache", "-q"]), capsys.readouterr().err

    def picture(path):
        record = png.read_record(path)
        with Image.open(path) as image:
            return record["model"]["activations"], np.asarray(image)

    plain, int8, again = (tmp_path / f"{name}.png" for name in ("plain", "int8", "again"))
    assert draw("-o", plain)[0] == draw("--activations", "int8", "-o", int8)[0] == draw("-C", int8, "-o", again)[0] == 0
    assert [picture(path)[0] for path in (plain, int8, again)] == ["bf16", "int8", "int8"]
    assert np.array_equal(picture(again)[1], picture(int8)[1])
    assert not np.array_equal(picture(plain)[1], picture(int8)[1])
    assert picture(plain)[1].shape == picture(int8)[1].shape

    status, said = draw("--activations", "int8", "-o", tmp_path / "none.png", model=original)
    assert (status, said.count("\n")) == (2, 1)
    snapshot_message(said, original)
    assert not (tmp_path / "none.png").exists()
    (tmp_path / "prompts.txt").write_text("red\n")
    listed = "--prompts-file", tmp_path / "prompts.txt", "--seed", 3, "--steps", 1, "-o", tmp_path / "all", "-q"
    assert generate([*map(str, listed), "--model", str(pristine), "--no-cache"]) == 0
    assert generate([*map(str, listed), "--model", str(pristine), "--no-cache", "--activations", "int8"]) == 2
    snapshot_message(capsys.readouterr().err.splitlines()[-1], "activations")
    with snapshot_message.raises(UserError, "fp8"):
        FluxPipeline.from_pretrained(pristine, activations="fp8")


def edit(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / SUMS).unlink()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layout": 99}, (99, LAYOUT_VERSION)),
        ({"activations": "fp4"}, ["activations"]),
        ({"distilled": "no"}, ["distilled"]),
    ],
)
def test_quantization_is_checked_first(saved, change, named, snapshot_message):
    edit(saved, lambda m: m["quantization"].update(change))
    shutil.rmtree(saved / "transformer")
    with snapshot_message.raises(UserError, *named):
        Checkpoint.open(saved)


@pytest.mark.parametrize(("kind", "dtype"), [("packed", "bfloat16"), ("packed", "int8"), ("scale", "bfloat16")])
def test_dtypes_of_codes_and_scales(saved, kind, dtype, snapshot_message):
    name = f"single_blocks.0.linear1.{kind}"
    edit(saved, lambda m: m["parts"]["transformer"]["weights"][name].__setitem__(0, dtype))
    with snapshot_message.raises(UserError, name, dtype):
        Checkpoint.open(saved).load("transformer")


@pytest.mark.parametrize(("kind", "value", "named"), [("packed", 0b10, "bits 10"), ("scale", np.nan, "NaN")])
def test_damaged_contents(saved, kind, value, named, snapshot_message):
    from orbax.checkpoint import v1 as ocp

    tree = flatten_dict(ocp.load(saved.absolute() / "transformer"), sep=".")
    tree[f"double_blocks.0.txt.proj.{kind}"].flat[3] = value
    shutil.rmtree(saved / "transformer")
    ocp.save(saved.absolute() / "transformer", unflatten_dict(tree, sep="."))
    (saved / CRCS).unlink()  # that would tell first, and no sums whether it is to be there
    (saved / SUMS).unlink()
    with snapshot_message.raises(UserError, "double_blocks.0.txt.proj", named):
        Checkpoint.open(saved).load("transformer")
    stored = Checkpoint.open(saved)
    with pytest.raises(UserError, match="is damaged"):  # nor is it exported
        list(stored.stream("transformer", stored.table("transformer")))


def test_what_cannot_be_rounded(folder, original, pristine, tmp_path, capsys, snapshot_message):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    tensors = load_file(damaged / TRANSFORMER)
    tensors["transformer_blocks.0.attn.to_k.weight"][3, 5] = np.nan
    save_file(tensors, damaged / TRANSFORMER)
    save(tmp_path / "few", CONFIG, {})
    for arguments, named in (
        ([damaged], "double_blocks.0.img.qkv.weight (transformer_blocks.0.attn.to_q.weight"),
        ([pristine], pristine),
        ([tmp_path / "few"], tmp_path / "few"),
        ([original, "--parts", "clip"], "--parts"),
        ([original, "--vae", folder], original),
        ([original, "--to", "diffusers"], "--to diffusers"),
    ):
        source, *options = map(str, arguments)
        assert main([source, str(tmp_path / "out"), "-q", *options, "--ternary"]) == 2
        snapshot_message(capsys.readouterr().err, named)
        assert not list(tmp_path.glob("*out*"))
