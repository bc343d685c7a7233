"""Two models from the same noise: metrics against formulas, a page that loads nothing, runs that go on."""

import html.parser
import json
import pickle
import re
import shutil
import subprocess
from typing import ClassVar

import crash_windows
import jax
import numpy as np
import pytest
import tiny_judges
import tiny_model
from PIL import Image

from flux_jax.checkpoints import writer
from flux_jax.cli.compare import main
from flux_jax.compare import clip, drawing, lpips, metrics, report
from flux_jax.errors import UserError
from flux_jax.evaluate import image_folders, nano
from flux_jax.evaluate.models import Variant
from flux_jax.io import atomic, locks
from flux_jax.io.pictures import read_picture
from flux_jax.sampling.pipeline import FluxPipeline
from pallas_kernels import LAYOUT_VERSION

pytest.importorskip("skimage", reason="needs the extra `evaluate`")
pytest.importorskip("jinja2", reason="needs the extra `evaluate`")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = '<script>document.title = "broken"</script> & "a circle"'


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A tiny model, and one with other weights."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "other")):
        tiny_model.save(root / name, tiny_model.config(), seed)
    return {name: str(root / name) for name in ("one", "other")}


@pytest.fixture
def ternary(tmp_path) -> str:
    """A tiny model with ternary weights."""
    config = tiny_model.config()
    parts = tiny_model.modules(config)
    parts["transformer"] = tiny_model.quantized(parts["transformer"], method="least-squares")
    how = {"layout": LAYOUT_VERSION, "method": "least-squares", "distilled": True, "activations": "bf16"}
    words = tiny_model.tokenizers(tmp_path / "words", config)
    return str(writer.save(tmp_path / "ternary", config, parts, tokenizers=words, quantization=how))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a red circle"}, {"prompt": HOSTILE, "seed": 9}, {"prompt": "two blue squares"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(a, b, prompts, out, *more):
    return main([a, b, "--prompts", str(prompts), "--out", str(out), "--steps", "2", *more])


def test_metrics_against_their_formulas():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (32, 48, 3)).astype(np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-6, 7, a.shape), 0, 255).astype(np.uint8)
    found = metrics.picture_metrics(a, b)
    difference = a.astype(np.float64) - b
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / np.mean(difference**2)))
    assert found["largest"] == np.abs(difference).max()
    assert found["apart"] == np.mean(np.abs(difference) > 1)
    assert found["ssim"] == pytest.approx(ssim(a, b), abs=1e-6)
    assert metrics.picture_metrics(a, a) == {"psnr": None, "ssim": 1.0, "largest": 0, "apart": 0.0, "same": True}


def ssim(a, b):
    """Wang et al. (2004), equation 13, written out: an 11 x 11 Gaussian window of sigma 1.5, the border left out."""
    from scipy.ndimage import correlate1d

    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / 4.5) / np.exp(-(offsets**2) / 4.5).sum()

    def blur(x):
        return correlate1d(correlate1d(x, window, axis=0), window, axis=1)[5:-5, 5:-5]

    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b, both = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    numerator = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return (numerator / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))).mean()


def test_latent_errors_and_summary():
    a = np.ones((2, 3, 4), np.float32)
    np.testing.assert_allclose(metrics.latent_errors(a, a * np.array([1, 1.5], np.float32)[:, None, None]), [0, 0.5])
    same = {"psnr": None, "ssim": 1.0, "largest": 0, "apart": 0.0, "same": True, "latent_errors": [0.0, 0.0]}
    near = {"psnr": 40.0, "ssim": 0.9, "largest": 9, "apart": 0.2, "same": False, "latent_errors": [0.1, 0.3]}
    found = metrics.summary([same, near, near])
    assert found["psnr"] == pytest.approx(40 + 10 * np.log10(3 / 2))  # of the mean squared error
    assert (found["identical"], found["same"], found["psnr_least"], found["psnr_median"]) == (1, 1, 40.0, 40.0)
    assert found["latent_errors_median"] == [0.1, 0.3]
    assert metrics.verdict(found).startswith("1 of 3 pictures are the same up to rounding")
    assert metrics.verdict(metrics.summary([same])) == "All 1 pictures are identical to the last bit."
    assert metrics.summary([same, same, near])["psnr_median"] is None  # infinite, which JSON cannot say


def test_comparison_of_two_models(models, prompts, tmp_path, capsys, snapshot_message):
    out = tmp_path / "out"
    assert run(models["one"], models["other"], prompts, out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["seed"] for row in found["pictures"]] == [0, 9, 2]
    assert found["a"] == "one"  # the folder it lies in is nobody's business
    paths = {}
    for side, model in (("a", "one"), ("b", "other")):
        paths[side] = []

        def keep(pipe, step, timestep, tensors, steps=paths[side]):
            steps.append(tensors["latents"])

        pipe = FluxPipeline.from_pretrained(models[model])
        image = pipe("two blue squares", seed=2, num_inference_steps=2, callback_on_step_end=keep).images[0]
        with Image.open(out / side / "00002.png") as file:
            np.testing.assert_array_equal(np.asarray(file), np.asarray(image))
    expected = [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in zip(paths["a"], paths["b"], strict=True)]
    np.testing.assert_allclose(found["pictures"][2]["latent_errors"], expected, rtol=1e-5)
    assert json.loads((out / "report.json").read_text()) == found
    assert not (out / "latents").exists()
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 3 * 64 and grid.height > 2 * 32

    times = {path: path.stat().st_mtime_ns for side in "ab" for path in (out / side).iterdir()}
    (out / "b" / "00001.json").unlink()  # as if killed while the second model drew
    assert run(models["one"], models["other"], prompts, out, "--json") == 0
    assert json.loads(capsys.readouterr().out) == found
    assert {path for path, time in times.items() if path.stat().st_mtime_ns != time} == {
        out / "a" / "00001.png", out / "b" / "00001.png", out / "b" / "00001.json",
    }  # fmt: skip
    assert run(models["one"], models["other"], prompts, out, "--guidance", "1") == 2
    snapshot_message(capsys.readouterr().err, out, "sampling")


DAMAGE = [
    ("a/00001.png", lambda path: path.write_bytes(path.read_bytes()[:99])),
    ("b/00001.png", lambda path: path.write_text("<html>")),
    ("b/00001.png", lambda path: Image.new("RGB", (8, 8)).save(path)),
    ("b/00001.json", lambda path: path.write_text("[]")),
    ("b/00001.json", lambda path: path.write_text(path.read_text().replace("psnr", "other"))),
    ("b/00001.json", lambda path: path.write_text(path.read_text().replace('errors": [', 'errors": [0, '))),
    ("b/00001.json", lambda path: shutil.copy(path.with_name("00000.json"), path)),
]


def test_what_was_damaged_or_replaced_is_named_and_made_again_once_it_is_deleted(drawn, tmp_path, monkeypatch):
    tasks, rows, sampling = drawn
    for task, row in zip(tasks, rows, strict=True):
        task.result(tmp_path).write_text(json.dumps(row))
    about = {"a": "one", "b": "two", "models": {}, "sampling": sampling, "networks": []}

    def again():
        report.write(tmp_path, tasks, drawing.run(tasks, Variant("one"), Variant("two"), sampling, tmp_path), about)

    asked = []
    monkeypatch.setattr(drawing, "_draw", lambda tasks, *_: asked.append([task.index for task in tasks]) or [])
    for name, spoil in DAMAGE:
        kept = (tmp_path / name).read_bytes()
        spoil(tmp_path / name)
        with pytest.raises(UserError, match=f"{tmp_path / name}.*delete it, and the same command makes it again"):
            again()
        assert asked.pop() == asked.pop() == []
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match=f"{tmp_path / name}: No such file"):
            again()
        assert asked.pop() == asked.pop() == [1]
        (tmp_path / name).write_bytes(kept)
    again()


class Comparison:
    """A whole one, of models that draw one colour each."""

    TASKS = tuple(drawing.ComparisonTask(i, f"prompt {i}", i) for i in range(3))
    SAMPLING: ClassVar = {"num_inference_steps": 2, "height": 40, "width": 64, "guidance_scale": 1.0}

    @staticmethod
    def draw(tasks, variant, side, sampling, out):
        for task in tasks:
            shown = np.full((40, 64, 3), 50 * task.index + 20 * (side == "b"), np.uint8)
            atomic.write_whole(task.picture(side, out), nano.png(Image.fromarray(shown)), overwrite=True)
            yield task, np.full((2, 3, 4), 1 + task.index + (side == "b"), np.float32)

    @staticmethod
    def work(folder):
        drawing._draw = Comparison.draw
        with locks.alone(out := folder / "out"):
            image_folders.stamp(out, {"sampling": Comparison.SAMPLING})
            rows = drawing.run(Comparison.TASKS, Variant("one"), Variant("two"), Comparison.SAMPLING, out)
            about = {"a": "one", "b": "two", "models": {}, "sampling": Comparison.SAMPLING, "networks": []}
            report.write(out, Comparison.TASKS, rows, about)

    @staticmethod
    def whole(folder):
        for path in folder.rglob("*.png"):
            Image.open(path).load()
        if not (folder / "out" / "index.html").exists():
            return "nothing"
        found = json.loads((folder / "out" / "report.json").read_text())["pictures"]
        assert [row["latent_errors"] for row in found] == [[1 / (1 + i)] * 2 for i in range(3)]
        assert not (folder / "out" / "latents").exists()
        return "new"


@pytest.mark.slow
def test_killed_between_its_steps_a_comparison_goes_on(tmp_path):
    assert crash_windows.survive(__file__, "Comparison", tmp_path, every=7) >= 56


def test_latents_that_wait_are_data_alone(tmp_path):
    latents = np.zeros((2, 3, 4), np.float32)
    for damage in (b"", b"PK\x03\x04", pickle.dumps(latents)):
        (tmp_path / "x.npy").write_bytes(damage)
        with pytest.raises(UserError, match="not what was written; delete it"):
            drawing.read_latents(tmp_path / "x.npy", latents)
    for other in (latents[:1], latents.astype(np.float64), np.array([None], object)):
        np.save(tmp_path / "x.npy", other)
        with pytest.raises(UserError, match="not what was written; delete it"):
            drawing.read_latents(tmp_path / "x.npy", latents)
    np.save(tmp_path / "x.npy", latents)
    np.testing.assert_array_equal(drawing.read_latents(tmp_path / "x.npy", latents), latents)


def test_two_comparisons_in_one_folder_are_one_too_many(models, prompts, tmp_path, capsys):
    with locks.alone(tmp_path / "out"):
        assert run(models["one"], models["other"], prompts, tmp_path / "out") == 2
    assert f"{tmp_path / 'out'} is being written by another process" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_prompts_flux_nanos_captions_are_drawn(models, tmp_path, monkeypatch, capsys):
    """With the seeds that its own evaluation draws them with, so that both show the same pictures."""
    seen = []

    def stop(tasks, *_):
        seen.extend(tasks)
        raise KeyboardInterrupt

    monkeypatch.setattr(drawing, "run", stop)
    assert main([models["one"], models["other"], "--out", str(tmp_path / "out"), "--seed", "7"]) == 130
    assert [(task.prompt, task.seed) for task in seen] == [(e.caption.text, e.index + 7) for e in nano.examples(4)]
    assert "Interrupted" in capsys.readouterr().err


@pytest.mark.slow
def test_kernel_and_no_kernel_draw_the_same_up_to_rounding(ternary, prompts, tmp_path, capsys):
    """The Triton kernel, interpreted, against XLA; then floating activations against int8, which are not the same."""
    assert run(f"{ternary}@kernel=xla", f"{ternary}@kernel=interpret", prompts, tmp_path / "kernel", "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)["summary"]
    assert found["same"] == found["pictures"] == 3
    assert max(found["latent_errors_largest"]) < 1e-4
    assert "the same up to rounding" in err or "identical" in err
    assert run(f"{ternary}@kernel=xla", f"{ternary}@activations=int8", prompts, tmp_path / "int8", "--json") == 0
    assert max(json.loads(capsys.readouterr().out)["summary"]["latent_errors_largest"]) > 1e-3


@pytest.mark.slow
def test_networks_judge_finished_pictures(models, prompts, tmp_path, capsys):
    """CLIP score and LPIPS join a comparison that is there already, in the report, in the summary, on the page."""
    out = tmp_path / "out"
    assert run(models["one"], models["other"], prompts, out, "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["networks"] == [] and "LPIPS" not in (out / "index.html").read_text()
    times = {path: path.stat().st_mtime_ns for side in "ab" for path in (out / side).iterdir()}
    folder, file = tiny_judges.clip(tmp_path / "tiny-clip"), tiny_judges.alexnet(tmp_path / "alex.safetensors")
    judges = ["--clip", str(folder), "--lpips", str(file)]
    assert run(models["one"], models["other"], prompts, out, "--json", *judges) == 0
    shown, said = capsys.readouterr()
    found = json.loads(shown)
    assert {path: path.stat().st_mtime_ns for side in "ab" for path in (out / side).iterdir()} == times
    assert found["networks"] == ["CLIP score by tiny-clip", "LPIPS by alex.safetensors"]
    texts = [row["prompt"] for row in found["pictures"]]
    by_clip, by_lpips = clip.judge(folder, texts)(), lpips.judge(file, 32, 64)()
    pair = [np.asarray(read_picture(out / side / "00002.png")) for side in "ab"]
    for name, value in (by_clip(2, *pair) | by_lpips(2, *pair)).items():
        assert found["pictures"][2][name] == pytest.approx(value, rel=1e-5)
    rows = [{key: value for key, value in row.items() if key in plain["pictures"][0]} for row in found["pictures"]]
    assert rows == plain["pictures"]  # what was measured without networks stays
    values = np.array([row["clip_b"] - row["clip_a"] for row in found["pictures"]])
    summary, half = found["summary"], 4.302653 * values.std(ddof=1) / np.sqrt(3)  # Student's t of 2 degrees of freedom
    assert summary["clip_b_minus_a"]["mean"] == pytest.approx(values.mean())
    assert summary["clip_b_minus_a"]["interval"] == pytest.approx(
        [values.mean() - half, values.mean() + half], rel=1e-5
    )
    assert summary["lpips"]["largest"] == max(row["lpips"] for row in found["pictures"]) > 0
    page = (out / "index.html").read_text("utf-8")
    for number in (summary["lpips"]["mean"], found["pictures"][1]["lpips"], summary["lpips"]["largest"]):
        assert f"{number:.4f}" in page
    for number in (summary["clip_a"]["mean"], found["pictures"][1]["clip_b"], values.mean()):
        assert f"{number:.2f}" in page
    assert f"LPIPS {summary['lpips']['mean']:.4f} [" in said and f"CLIP score {summary['clip_a']['mean']:.2f} [" in said


def cut(folder, name):
    """A copy of the file without its end."""
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda root: (root / "alex.safetensors").unlink(), "alex.safetensors"),
        (lambda root: shutil.rmtree(root / "tiny-clip"), "tiny-clip"),
        (lambda root: cut(root, "alex.safetensors"), "alex.safetensors"),
        (lambda root: shutil.copy(root / "tiny-clip/model.safetensors", root / "alex.safetensors"), "slice1.0.bias"),
        (lambda root: cut(root, "tiny-clip/model.safetensors"), "tiny-clip"),
        (lambda root: (root / "tiny-clip/model.safetensors").unlink(), "tiny-clip"),
        (lambda root: shutil.copy(root / "alex.safetensors", root / "tiny-clip/model.safetensors"), "tiny-clip"),
        (
            lambda root: [(root / "tiny-clip" / name).unlink() for name in ("tokenizer.json", "merges.txt")],
            "tiny-clip",
        ),
        (lambda root: (root / "tiny-clip/config.json").write_text("[]"), "config.json"),
        (lambda root: (root / "tiny-clip/config.json").write_text('{"model_type": "clip"}'), "tiny-clip"),
    ],
)
def test_wrong_judges_are_named_before_anything_is_drawn(
    models, prompts, tmp_path, capsys, spoil, named, snapshot_message
):
    folder, file = tiny_judges.clip(tmp_path / "tiny-clip"), tiny_judges.alexnet(tmp_path / "alex.safetensors")
    spoil(tmp_path)
    judges = ["--clip", str(folder), "--lpips", str(file)]
    assert run(models["one"], models["other"], prompts, tmp_path / "out", *judges) == 2
    (err,) = capsys.readouterr().err.splitlines()
    snapshot_message(err, named, volatile=r"(?<=\()(?!No such).*(?=\))")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def drawn(tmp_path):
    """Three pictures of known distances: far, identical, near. (tasks, rows, sampling)"""
    tasks, rows = (
        [drawing.ComparisonTask(i, prompt, i) for i, prompt in enumerate((HOSTILE, "a blue square", "a cross"))],
        [],
    )
    for task, shift in zip(tasks, (0, 90, 2), strict=True):
        shown = np.full((40, 64, 3), 100, np.uint8)
        for side, value in (("a", 0), ("b", shift)):
            path = task.picture(side, tmp_path)
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(shown + np.uint8(value)).save(path)
        row = metrics.picture_metrics(*drawing.pair(task, tmp_path))
        rows.append({"index": task.index, "prompt": task.prompt, "seed": task.seed, "latent_errors": [0.1, 0.2]} | row)
    return tasks, rows, {"num_inference_steps": 2, "guidance_scale": 3.5, "width": 64, "height": 40}


@pytest.fixture
def page(drawn, tmp_path):
    tasks, rows, sampling = drawn
    report.write(
        tmp_path, tasks, rows, {"a": "one", "b": "two@kernel=xla", "models": {}, "sampling": sampling, "networks": []}
    )
    return tmp_path / "index.html"


class Tags(html.parser.HTMLParser):
    """Collects whatever an element could load something by."""

    def __init__(self):
        super().__init__()
        self.sources = []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]


def test_page_is_self_contained_and_worst_come_first(page):
    text = page.read_text("utf-8")
    tags = Tags()
    tags.feed(text)
    assert len(tags.sources) == 1 + 2 * 3  # the curve, and each picture once
    assert all(source.startswith("data:image/") for source in tags.sources)
    assert "url(" not in text
    assert not re.search(r"https?://|//\w|@import", re.sub(r"data:image/\w+;base64,[\w+/=]*", "", text))
    assert "default-src 'none'" in text
    assert re.findall(r"<h2>(.*?)</h2>", text)[:2] == ["a blue square", "a cross"]  # and identical pictures last
    assert HOSTILE not in text


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to open the page with")
def test_page_in_a_browser(page, tmp_path):
    """Opened without a network: the script fills the sliders, hostile prompts are only text, pictures are seen."""
    shot = tmp_path / "page.png"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=2000",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,1300",
               "--proxy-server=127.0.0.1:9"]  # fmt: skip
    dom = subprocess.run([BROWSER, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert dom.stdout.count("<img") == 1 + 6 * 3, dom.stderr[-500:]
    assert "<title>one and two@kernel=xla</title>" in dom.stdout
    subprocess.run([BROWSER, *options, f"--screenshot={shot}", page.as_uri()], capture_output=True, timeout=120)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for gray in (100, 190):  # the worst pair's two pictures
        assert (pixels == gray).all(-1).mean() > 0.01


@pytest.mark.parametrize(
    ("a", "b", "more", "code", "named"),
    [
        ("one", "nowhere", [], 3, "nowhere"),
        ("one", "one@kernel=cuda", [], 2, "kernel=cuda"),
        ("one", "one@kernel=xla", [], 2, "one"),
        ("one", "nano@kernel=triton", [], 2, "kernel=interpret"),
        ("one", "other", ["--steps", "0"], 2, "0"),
        ("one", "other", ["--seed", "-4"], 2, "-4"),
    ],
)
def test_bad_input_is_one_sentence(
    models, prompts, tmp_path, capsys, monkeypatch, a, b, more, code, named, snapshot_message
):
    if "triton" in b and jax.default_backend() != "cpu":
        pytest.skip("this device runs the kernels")
    monkeypatch.chdir(tmp_path)
    spelt = []
    for name, at, options in (spelling.partition("@") for spelling in (a, b)):
        spelt.append(models.get(name, name) + at + options)
    assert run(*spelt, prompts, tmp_path / "out", *more) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    snapshot_message(err.splitlines()[-1], named)
    assert not list(tmp_path.rglob("*.png"))


def test_missing_libraries_are_named_before_anything_is_drawn(
    models, prompts, tmp_path, capsys, monkeypatch, snapshot_message
):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "skimage" else real(name, *a))
    assert run(models["one"], models["other"], prompts, tmp_path / "out") == 2
    snapshot_message(capsys.readouterr().err, "scikit-image", "[evaluate]")
    assert not (tmp_path / "out").exists()
