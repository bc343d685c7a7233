"""What strangers' files are given to: checkpoints, safetensors files, PNG records, prompts, configs.

Each target makes sound inputs in a folder once, then, by number, one that is wrong, and reads it as the programs do. It
says "refused" (a UserError, whose words are looked at), "equal" (what was read is what was written) or "other" (a
consistent input that says something else). Everything that must never be is a `Fault`: any other exception is one, too.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import safetensors.numpy
import tiny_model
from flax import nnx
from PIL import Image, PngImagePlugin

from convert import run, sources
from convert.export import export
from flux_jax.checkpoints import checksums, writer
from flux_jax.checkpoints.checkpoint import Checkpoint
from flux_jax.checkpoints.tokenizers import Tokenizers
from flux_jax.cli import arguments, requests
from flux_jax.config import FluxConfig, nano
from flux_jax.errors import LONGEST, UserError
from flux_jax.io import png, prompts
from flux_jax.io.places import remove
from flux_jax.io.safetensors import FLOATS, Source, file_header
from flux_jax.models.params import leaves
from tests.fuzz import cases, mutations

# What no input may have opened, or done.
KEYS = re.escape(str(Path.home() / ".ssh"))
ELSEWHERE = re.compile(rf"/etc/|/dev/(?!null|urandom|fd)|/home/|{KEYS}|socket|subprocess|os\.system|pickle")
LINES = 45  # of a message: one for each fault of a conversion, and a few more
PROMPT = "a red circle to the left of two blue squares"


class Fault(Exception):
    """What no input may bring about."""


def check_words(error: UserError) -> None:
    """A message is short lines of printable text."""
    lines = str(error).split("\n")
    if len(lines) > LINES or any(len(line) > LONGEST for line in lines):
        raise Fault(f"a message of {len(lines)} lines, {max(map(len, lines))} characters: {str(error)[:200]}")
    if any(not line.replace("\t", " ").isprintable() for line in lines):
        raise Fault(f"a message that cannot be printed: {str(error)[:200]!r}")


class Opened:
    """The files that this process opens, while it is switched on: a stranger's input names none of them."""

    def __init__(self):
        self.paths: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, words: tuple) -> None:
        if self.paths is None:
            return
        if event == "open" and isinstance(words[0], str | bytes | os.PathLike):
            self.paths.append(os.fsdecode(words[0]))
        elif event in ("socket.connect", "subprocess.Popen", "os.system", "pickle.find_class"):
            self.paths.append(f"{event} {words}"[:200])


class Target:
    """folder: where the inputs are made, one after the other, each in place of the one before."""

    def __init__(self, folder: Path):
        self.folder, self.opened = folder, Opened()
        folder.mkdir(parents=True, exist_ok=True)
        self.setup()

    def setup(self) -> None:
        """Makes the sound inputs."""

    def cases(self) -> list[Callable[[], str]]:
        """Makers of inputs that went wrong once; each says what it makes."""
        return []

    def make(self, random: Random) -> str:
        """Makes a wrong input and says what is wrong with it."""
        raise NotImplementedError

    def read(self) -> str:
        """Reads it: "equal" or "other". UserError where it is refused, Fault where it should have been."""
        raise NotImplementedError

    def run(self, random: Random, number: int | None = None) -> str:
        """Makes an input, notes in `done` what was done to it, and returns what came of it. number: of one of `cases`,
        if there are so many."""
        self.done, known = "", self.cases()
        known_one = number is not None and number < len(known)
        self.done = known[number]() if known_one else self.make(random)
        self.opened.paths = []
        try:
            result = self.read()
        except UserError as error:
            check_words(error)
            result = "refused"
        finally:
            paths, self.opened.paths = self.opened.paths, None
        for path in paths:
            if ELSEWHERE.match(path):
                raise Fault(f"opened {path}")
        return result


def digest_of(weights: dict[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name in sorted(weights):
        value = np.ascontiguousarray(weights[name])
        found.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return found.hexdigest()


class CheckpointTarget(Target):
    """A ternary checkpoint, every component of it; half of the inputs bring hashes that fit what was done."""

    COMPONENTS = ("transformer", "transformer", "t5", "clip")

    def setup(self) -> None:
        self.base, self.input = self.folder / "base", self.folder / "input"
        config = tiny_model.config()
        modules = tiny_model.modules(config)
        modules["transformer"] = tiny_model.quantized(modules["transformer"])
        quantization = {"layout": 1, "method": "absmean", "distilled": True, "activations": "bf16"}
        writer.save(
            self.base,
            config,
            {name: modules[name] for name in ("transformer", "t5", "clip")},
            tokenizers=tiny_model.tokenizers(self.folder / "tokenizers", config),
            quantization=quantization,
        )
        self.files = sorted(path.relative_to(self.base) for path in self.base.rglob("*") if path.is_file())
        self.expected = self._everything(self.base)

    def _everything(self, folder: Path, only: str | None = None) -> dict[str, Any]:
        stored = Checkpoint.open(folder)
        found: dict[str, Any] = {"config": stored.config, "quantization": stored.quantization}
        tokenizers = Tokenizers.load(stored.tokenizers, stored.config)
        found["tokens"] = tokenizers.t5([PROMPT]).tolist(), tokenizers.clip([PROMPT]).tolist()
        for component in [only] if only else set(self.COMPONENTS):
            found[component] = digest_of(dict(leaves(stored.load(component))))
        return found

    def cases(self) -> list[Callable[[], str]]:
        asked = itertools.product(range(len(cases.CHECKPOINT)), ("t5", "clip"), (False, True))
        return [functools.partial(self._known, *each) for each in asked]

    def _known(self, number: int, component: str, hashed: bool) -> str:
        remove(self.input)
        shutil.copytree(self.base, self.input)
        cases.CHECKPOINT[number](self.input)
        self.component, self.rehashed = component, hashed
        if hashed:
            self._hash_again()
        return f"case {number}, of the {component}{', hashed again' if hashed else ''}"

    def make(self, random: Random) -> str:
        remove(self.input)
        shutil.copytree(self.base, self.input)
        self.component, done = random.choice(self.COMPONENTS), []
        near = [f for f in self.files if f.parts[0] in (self.component, "tokenizers") or len(f.parts) == 1]
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            file = self.input / random.choice(near)
            kind = random.random()
            if not file.is_file() or file.stat().st_size > 2**24 or kind < 0.1:
                done.append(mutations.replaced(random, file))
            elif file.suffix == ".json" or (file.name == "_METADATA" and kind < 0.6):
                try:
                    text, words = mutations.edited(random, json.loads(file.read_bytes()))
                except ValueError:  # it was damaged before
                    text, words = "", "emptied"
                file.write_text(text, "utf-8", errors="surrogatepass")
                done.append(f"{file.name}: {words}")
            else:
                data, words = mutations.damaged(random, file.read_bytes())
                file.write_bytes(data)
                done.append(f"{file.relative_to(self.input)}: {words}")
        self.rehashed = random.random() < 0.5
        if self.rehashed and (self.input / "SHA256SUMS").is_file():
            self._hash_again()
            done.append("hashed again")
        return "; ".join(done)

    def _hash_again(self) -> None:
        """As a stranger would who wants it to be believed."""
        remove(self.input / "crc32.json")
        lines = []
        for path in sorted(self.input.rglob("*")):
            if path.is_file() and not path.is_symlink() and path.name != "SHA256SUMS" and path.stat().st_size < 2**24:
                lines.append(
                    f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(self.input).as_posix()}\n"
                )
        remove(self.input / "SHA256SUMS")
        (self.input / "SHA256SUMS").write_text("".join(lines))

    def read(self) -> str:
        try:
            checksums.check(self.input)
            verified = True
        except UserError as error:
            check_words(error)
            verified = False
        found = self._everything(self.input, self.component)
        same = all(found[key] == self.expected[key] for key in found)
        protected = (self.input / "SHA256SUMS").is_file() and not self.rehashed
        if not same and protected:
            raise Fault(f"loads other {[key for key in found if found[key] != self.expected[key]]}, and says nothing")
        if not same and verified and protected:
            raise Fault("is verified, and is another")
        return "equal" if same else "other"


class SafetensorsTarget(Target):
    """A safetensors file, or shards with an index; the library safetensors says what is right."""

    def setup(self) -> None:
        numbers = np.random.default_rng(0)
        self.tensors = {
            "a.weight": numbers.standard_normal((4, 6)).astype(np.float32),
            "a.bias": numbers.standard_normal(4).astype(np.float16),
            "empty": np.zeros((0, 3), np.float32),
            "scalar": np.float32(1.5).reshape(()),
            "b.weight": numbers.standard_normal((3, 5)).astype(FLOATS["BF16"]),
            "c": numbers.standard_normal((2, 2, 2)).astype(np.float64),
        }
        self.input = self.folder / "input"

    def _file(self, names: list[str]) -> tuple[dict[str, Any], bytes]:
        raw = file_header({name: (self.tensors[name].dtype, self.tensors[name].shape) for name in names})
        body = b"".join(np.ascontiguousarray(self.tensors[name]).tobytes() for name in names)
        return json.loads(raw[8:]), body

    def cases(self) -> list[Callable[[], str]]:
        return [functools.partial(self._known, number) for number in range(len(cases.SAFETENSORS))]

    def _known(self, number: int) -> str:
        remove(self.input)
        self.input.mkdir()
        header, body = self._file(list(self.tensors))
        text = json.dumps(header).encode()
        (self.input / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
        cases.SAFETENSORS[number](self.input)
        return f"case {number}"

    def make(self, random: Random) -> str:
        remove(self.input)
        self.input.mkdir()
        names, shards = list(self.tensors), random.randrange(1, 4)
        files = {}
        for i in range(shards):
            name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
            files[name] = self._file(names[i::shards])
        chosen, done = random.choice(list(files)), ""
        for name, (header, body) in files.items():
            text = json.dumps(header)
            if name == chosen and random.random() < 0.5:
                text, done = mutations.edited(random, header)
            text_bytes = text.encode("utf-8", "surrogatepass")
            data = len(text_bytes).to_bytes(8, "little") + text_bytes + body
            if name == chosen and not done:
                data, done = mutations.damaged(random, data)
            (self.input / name).write_bytes(data)
        if shards > 1:
            index = {"metadata": {}, "weight_map": {n: name for name, (header, _) in files.items() for n in header}}
            text = json.dumps(index)
            if random.random() < 0.3:
                text, words = mutations.edited(random, index)
                done += f"; index: {words}"
            (self.input / "model.safetensors.index.json").write_text(text, "utf-8", errors="surrogatepass")
        if random.random() < 0.05:
            done += f"; {mutations.replaced(random, self.input / chosen)}"
        return f"{chosen}: {done}"

    def read(self) -> str:
        index = self.input / "model.safetensors.index.json"
        shards = sorted(self.input.glob("*.safetensors"))
        source = Source.of_index(self.input, index) if os.path.lexists(index) else Source.of(self.input, shards)
        if source.faults:
            for fault in source.faults[:LINES]:
                if len(fault) > LONGEST:
                    raise Fault(f"a fault of {len(fault)} characters: {fault[:200]}")
            return "refused"
        found = {name: source.read(name) for name, entry in source.entries.items() if entry.dtype in FLOATS}
        for file in source.files:
            try:
                there = safetensors.deserialize(file.read_bytes())
            except safetensors.SafetensorError as error:
                raise Fault(f"reads what the reference refuses: {error}") from error
            for name, entry in there:
                ours = found[name].tobytes() if name in found else b"nothing"
                if entry["dtype"] in FLOATS and ours != bytes(entry["data"]):
                    raise Fault(f"{name} is another tensor than the reference reads")
        same = found.keys() == self.tensors.keys() and all(
            np.array_equal(found[name], self.tensors[name], equal_nan=False) for name in found
        )
        return "equal" if same else "other"


class ConverterTarget(Target):
    """A published CLIP with its config and tokenizer, through the whole converter."""

    def setup(self) -> None:
        config = tiny_model.published_config()
        words = tiny_model.tokenizers(self.folder / "words", config)
        made = writer.save(self.folder / "made", config, tiny_model.modules(config), tokenizers=words)
        export(made, self.folder / "published", quiet=True)
        self.base, self.input, self.out = self.folder / "base", self.folder / "input", self.folder / "out"
        for name in ("text_encoder", "tokenizer", "tokenizer_2", "scheduler"):
            shutil.copytree(self.folder / "published" / name, self.base / name)
        shutil.copy(self.folder / "published" / "model_index.json", self.base)
        self.files = sorted(path.relative_to(self.base) for path in self.base.rglob("*") if path.is_file())
        self.config = config

    def make(self, random: Random) -> str:
        remove(self.out)
        remove(self.input)
        shutil.copytree(self.base, self.input)
        file = self.input / random.choice(self.files)
        if random.random() < 0.1:
            return mutations.replaced(random, file)
        if file.suffix == ".json" and random.random() < 0.8:
            text, done = mutations.edited(random, json.loads(file.read_bytes()))
            file.write_text(text, "utf-8", errors="surrogatepass")
        else:
            data, done = mutations.damaged(random, file.read_bytes())
            file.write_bytes(data)
        return f"{file.relative_to(self.input)}: {done}"

    def read(self) -> str:
        model = sources.find(self.input, components=("clip",))
        run.convert(model, self.out, quiet=True)
        stored = Checkpoint.open(self.out)
        found = stored.read("clip", stored.table("clip"))
        (file,) = model.sources["clip"].files
        there = safetensors.numpy.load_file(file)
        right = sorted((value.size, value.tobytes()) for value in there.values())
        if right != sorted((value.size, value.tobytes()) for value in found.values()):
            raise Fault("writes other weights than the reference reads")
        Tokenizers.load(stored.tokenizers, stored.config)
        checksums.check(self.out)
        return "equal" if stored.config.clip == self.config.clip else "other"


class PictureTarget(Target):
    """A PNG with a record, and what generate makes of it."""

    def setup(self) -> None:
        self.record = png.Record(
            dtype="float32", model={"id": "nano", "name": "FLUX-nano", "sha256": "0" * 64}, device="cpu cpu",
            versions={"flux_jax": "0", "jax": "0", "python": "3"}, prompt=PROMPT, seed=7, height=64, width=64, steps=4,
            guidance=3.5, true_cfg=1.0, max_sequence_length=16,
        ).to_json()  # fmt: skip
        self.input = self.folder / "input.png"
        self.consistent = False

    def cases(self) -> list[Callable[[], str]]:
        records = [(where, text) for where, texts in cases.RECORDS.items() for text in texts]
        known = [functools.partial(self._known_record, *each) for each in records]
        return known + [functools.partial(self._known_chunk, name) for name in mutations.HARM]

    def _known_record(self, where: str, text: str) -> str:
        remove(self.input)
        self.consistent = True
        self.input.write_text(json.dumps(self.record))
        cases.written(self.input, where.split("/"), text)
        record = self.input.read_text("utf-8", errors="surrogatepass")
        self.input.write_bytes(self._png(Random(0), record))
        return f"{where} is {text[:40]}"

    def _known_chunk(self, name: str) -> str:
        remove(self.input)
        self.consistent = True
        self.input.write_bytes(mutations.with_chunk(self._png(Random(0), json.dumps(self.record)), name))
        return name

    def make(self, random: Random) -> str:
        remove(self.input)
        kind = random.choice(["damaged", "damaged", "record", "record", "record", "chunks", "replaced"])
        self.consistent = kind != "damaged"
        if kind == "replaced":
            return mutations.replaced(random, self.input)
        text, done = json.dumps(self.record, ensure_ascii=False), ""
        if kind == "record":
            text, done = mutations.edited(random, self.record)
        data = self._png(random, text)
        if kind == "damaged":
            data, done = mutations.damaged(random, data)
        if kind == "chunks":
            done = random.choice(mutations.HARM)
            data = mutations.with_chunk(data, done)
        self.input.write_bytes(data)
        return done

    def _png(self, random: Random, text: str) -> bytes:
        info = PngImagePlugin.PngInfo()
        raw = text.encode("utf-8", "surrogatepass")
        info.add(b"iTXt", b"flux_jax\0\0\0\0\0" + raw)
        image = Image.frombytes("RGB", (8, 8), random.randbytes(192))
        image.save(buffer := io.BytesIO(), format="png", pnginfo=info)
        return buffer.getvalue()

    def read(self) -> str:
        record = png.read_record(self.input)
        args = arguments.parse(["-C", str(self.input), "-o", str(self.folder / "out.png"), "--model", "nano"])
        said: list[str] = []
        planned, _ = requests.plan_requests(args, nano(), record, said.append)
        if any(not each.replace("\n", "").isprintable() for each in said):
            raise Fault(f"says what cannot be printed: {said}")
        (request,) = planned
        wanted = {key: self.record[key] for key in request.settings()}
        same = request.settings() == wanted
        if not same and not self.consistent:
            raise Fault("is damaged, and gives another picture")
        return "equal" if same else "other"


class PromptsTarget(Target):
    """Files of prompts of every kind."""

    def make(self, random: Random) -> str:
        for left in self.folder.iterdir():
            remove(left)
        kind = random.choice([".txt", ".jsonl", ".JSONL", ".tsv", "", ".json", ".csv", ".md"])
        row = {"prompt": PROMPT, "id": "a", "seed": 7, "width": 64, "height": 64, "steps": 3, "guidance": 2.5}
        rows = [json.dumps(row), json.dumps({"prompt": "é猫\u2028"}, ensure_ascii=False)]
        done = ""
        if "json" in kind.lower() and random.random() < 0.7:
            rows[0], done = mutations.edited(random, row)
        texts = {".tsv": ["Prompt\tCategory", f"{PROMPT}\tx", "猫\ty"], ".txt": ["# mine", PROMPT, "", "猫"]}
        text = random.choice(["\n", "\r\n", "\r"]).join(texts.get(kind, rows)) + "\n"
        encoding = random.choice(["utf-8"] * 4 + ["utf-8-sig", "utf-16", "utf-32", "utf-16-le"])
        data = text.encode(encoding, "surrogatepass")
        if random.random() < 0.4:
            data, words = mutations.damaged(random, data)
            done += f"; {words}"
        self.input = self.folder / f"prompts{kind}"
        self.input.write_bytes(data)
        if random.random() < 0.05:
            done += mutations.replaced(random, self.input)
        return f"{kind} in {encoding}: {done}"

    def read(self) -> str:
        prompts.read_rows(self.input)
        args = arguments.parse(["--prompts-file", str(self.input), "-o", str(self.folder / "out") + "/", "--seed", "1"])
        said: list[str] = []
        planned, _ = requests.plan_requests(args, nano(), None, said.append)
        for request in planned:
            if len(request.output.name.encode()) > 255 or not request.prompt.strip():
                raise Fault(f"draws {request.prompt[:50]!r} at {request.output}")
        return "other"


class ConfigTarget(Target):
    """The numbers of a model: what passes can be built."""

    def make(self, random: Random) -> str:
        self.text, done = mutations.edited(random, dataclasses.asdict(tiny_model.config()))
        return done

    def read(self) -> str:
        from flux_jax.io import reading
        from flux_jax.models.params import abstract_component
        from flux_jax.sampling import schedule

        try:
            config = FluxConfig.from_json(reading.parse_json(self.text, "config"))
        except ValueError as error:
            raise UserError(str(error)) from error
        if config == tiny_model.config():
            return "equal"
        schedule.sigmas(config.sampling, config.sampling.num_inference_steps, 64)
        for component in ("transformer", "t5", "clip", "vae"):
            nnx.state(abstract_component(component, config))
        return "other"


TARGETS = {
    "checkpoint": CheckpointTarget,
    "safetensors": SafetensorsTarget,
    "png": PictureTarget,
    "converter": ConverterTarget,
    "prompts": PromptsTarget,
    "config": ConfigTarget,
}
