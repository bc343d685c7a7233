"""The pictures of a run: what each is made of, and where it goes; nothing here computes or imports JAX.

In: arguments (`flux_jax.cli.arguments`), a prompts file, the record of an earlier picture, the model's config. Out:
`Request`s, one picture each, with every number decided and an output path that is free. Every mistake raises UserError
before the model is loaded.
"""

import argparse
import dataclasses
import datetime
import json
import re
from pathlib import Path
from typing import Any

from flux_jax import validation
from flux_jax.config import FluxConfig
from flux_jax.errors import UserError
from flux_jax.io.atomic import check_writable
from flux_jax.io.png import read_record


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture to make. `size` fields in pixels; `index` counts over the whole run."""

    index: int
    id: str | None
    prompt: str
    negative_prompt: str | None
    seed: int
    height: int
    width: int
    steps: int
    guidance: float
    true_cfg: float
    max_sequence_length: int
    output: Path

    def settings(self) -> dict[str, Any]:
        """What decides the picture, under the names of its record."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("index", "id", "output")}


def read_prompts(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of a prompts file as objects with at least `prompt` and `id`, and the keys that mean nothing here."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}.") from error
    known = {"prompt": str, "id": (str, int), "seed": int, "width": int, "height": int, "steps": int,
             "guidance": (int, float), "true_cfg": (int, float), "negative_prompt": str}  # fmt: skip
    rows, ignored = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or (path.suffix != ".jsonl" and line.startswith("#")):
            continue
        row: Any = {"prompt": line.strip()}
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error}).") from error
            if not isinstance(row, dict) or "prompt" not in row:
                raise UserError(f'{path}, line {number}: each line must be an object with a "prompt".')
        for key in [key for key in row if key not in known]:
            ignored[key] = row.pop(key)
        for key, value in row.items():
            if not isinstance(value, known[key]) or isinstance(value, bool):
                raise UserError(f"{path}, line {number}: {key} cannot be {value!r}.")
        if not row["prompt"].strip():
            raise UserError(f"{path}, line {number}: the prompt is empty.")
        row |= {key: float(row[key]) for key in ("guidance", "true_cfg") if key in row}
        rows.append({"id": f"{len(rows):05d}", **row})
    if not rows:
        raise UserError(f"{path} holds no prompt.")
    return rows, sorted(ignored)


def plan_requests(
    args: argparse.Namespace, config: FluxConfig, record: dict[str, Any] | None, say
) -> tuple[list[Request], bool]:
    """All pictures of the run, and whether their seeds were asked for (not drawn at random). `say` gets each notice."""
    record = record or {}
    if args.prompts_file:
        rows, ignored = read_prompts(args.prompts_file)
        if ignored:
            say(f"{args.prompts_file}: ignoring the keys {', '.join(ignored)}.")
    else:
        prompts = args.prompts or ([record["prompt"]] if record else [])
        if not prompts:
            raise UserError('No prompt; say what to draw, as in: python -m flux_jax.generate "a red circle".')
        rows: list[dict[str, Any]] = [{"prompt": validation.check_prompt(prompt)} for prompt in prompts]

    defaults = config.sampling
    width, height = _size(args, config, record)
    chosen: dict[str, Any] = {
        "negative_prompt": _first(args.negative_prompt, record.get("negative_prompt")),
        "steps": _first(args.steps, record.get("steps"), defaults.num_inference_steps),
        "guidance": float(_first(args.guidance, record.get("guidance"), defaults.guidance_scale)),
        "true_cfg": float(_first(args.true_cfg, record.get("true_cfg"), 1.0)),
        "max_sequence_length": _first(
            args.max_sequence_length, record.get("max_sequence_length"), defaults.max_sequence_length
        ),
    }
    if args.guidance is not None and not config.transformer.guidance_embeds:
        say(f"{config.name} embeds no guidance: --guidance has no effect.")
    seeds = args.seed or ([record["seed"]] if record else None)
    seeded = seeds is not None
    seeds = seeds or [validation.random_seed()]
    per_prompt = len(seeds) if len(seeds) > 1 else args.num_images or 1
    if not seeded:  # keep the last picture's seed in range
        seeds = [min(seeds[0], validation.SEED_LIMIT - per_prompt * len(rows))]

    names = OutputPaths(args, len(rows), per_prompt)
    jobs: list[Request] = []
    notices: dict[str, None] = {}
    for row in rows:
        settings = {**chosen, **{key: value for key, value in row.items() if key in chosen}}
        if settings["negative_prompt"] is not None and settings["true_cfg"] == 1:
            raise UserError("--negative-prompt has no effect while --true-cfg is 1; try --true-cfg 3 (2x slower).")
        validation.check_numbers(config, **{key: settings[key] for key in settings if key != "negative_prompt"})
        h, w, said = validation.fit_size(
            config, row.get("height", height), row.get("width", width), strict=args.strict_size
        )
        notices |= dict.fromkeys(said)
        for k in range(per_prompt):
            i = len(jobs)
            seed = row["seed"] + k if "seed" in row else seeds[k] if len(seeds) > 1 else seeds[0] + i
            validation.check_seeds([seed])
            id_ = str(row["id"]) if "id" in row else None
            output = names.path(row, index=i, k=k, seed=seed)
            jobs.append(Request(i, id_, row["prompt"], height=h, width=w, seed=seed, output=output, **settings))
    for notice in notices:
        say(notice)
    taken: set[Path] = set()
    for job in jobs:
        if job.output in taken:
            raise UserError(f"Two pictures would be written to {job.output}; put {{i}} or {{seed}} into -o.")
        taken.add(job.output)
    return jobs, seeded


def _first(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)


def _size(args, config: FluxConfig, record: dict[str, Any]) -> tuple[int, int]:
    width = record.get("width", config.sampling.width)
    height = record.get("height", config.sampling.height)
    if args.size:
        return validation.parse_size(args.size)
    if args.aspect:
        area = config.sampling.width * config.sampling.height
        return validation.aspect_size(args.aspect, area, config.pixels_per_token)
    return _first(args.width, width), _first(args.height, height)


class OutputPaths:
    """Output paths: `-o` with its placeholders filled, or names of our own in a folder."""

    def __init__(self, args: argparse.Namespace, prompts: int, per_prompt: int):
        self.from_file, self.prompts, self.per_prompt = args.prompts_file is not None, prompts, per_prompt
        self.stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        self.folder, self.template = Path("outputs"), args.output
        if self.template is None:
            self.folder /= args.prompts_file.stem if self.from_file else ""
        elif self.template.endswith(("/", "\\")) or Path(self.template).is_dir():
            self.folder, self.template = Path(self.template), None
        elif prompts * per_prompt > 1 and "{" not in self.template:
            path = Path(self.template)
            self.template = f"{path.with_suffix('')}-{{i}}{path.suffix}"

    def path(self, row: dict[str, Any], *, index: int, k: int, seed: int) -> Path:
        """Of picture `index` of the run, the k-th of its prompt."""
        if self.template is None:
            if self.from_file:  # neither time nor seed in it, so that the next run finds what is done
                name = slug(str(row["id"]), 120) + (f"-{k}" if self.per_prompt > 1 else "")
            else:
                name = f"flux-{self.stamp}-{seed}" + (f"-{index}" if self.prompts > 1 else "")
            return self.folder / f"{name}.png"
        values = {"seed": seed, "i": index, "id": slug(str(row.get("id", index)), 120), "prompt": slug(row["prompt"])}
        try:
            path = Path(self.template.format(**values))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise UserError(
                f"-o {self.template}: only {{seed}}, {{i}}, {{id}} and {{prompt}} can be filled in."
            ) from error
        if path.suffix.lower() not in ("", ".png"):
            raise UserError(f"-o {path}: pictures are written as PNG, which can hold their settings; name it .png.")
        return path if path.suffix else path.with_name(path.name + ".png")


def batches(jobs: list[Request], most: int) -> list[list[Request]]:
    """Neighbours that one call can draw, at most so many together: they differ in prompt and seed only."""
    groups: list[list[Request]] = []
    for job in jobs:
        same = {k: v for k, v in job.settings().items() if k not in ("prompt", "seed")}
        if groups and len(groups[-1]) < most and all(groups[-1][0].settings()[k] == v for k, v in same.items()):
            groups[-1].append(job)
        else:
            groups.append([job])
    return groups


def slug(text: str, longest: int = 60) -> str:
    """Letters and digits of a text, joined by single hyphens: safe in every file system."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:longest].rstrip("-") or "picture"


def skip_done(jobs: list[Request], args: argparse.Namespace, seeded: bool, model: dict[str, Any]) -> list[Request]:
    """The jobs still to do. Of a prompts file, those whose picture exists already, made the same way, are left out;
    any other file in the way raises UserError."""
    for job in jobs:
        check_writable(job.output)
    if args.overwrite:
        return jobs
    left = []
    for job in jobs:
        if not job.output.exists():
            left.append(job)
            continue
        if not args.prompts_file:
            raise UserError(f"{job.output} exists; choose another -o, or pass --overwrite to replace it.")
        there = read_record(job.output)
        wanted = {k: v for k, v in job.settings().items() if k != "seed" or seeded}
        differs = [k for k, v in wanted.items() if there[k] != v]
        compared = {"sha256": "model", "activations": "activations"}
        differs += [word for key, word in compared.items() if there["model"].get(key) != model.get(key)]
        if differs:
            raise UserError(
                f"{job.output} exists and was made with another {' and '.join(differs)}; "
                "choose another -o, or pass --overwrite to replace it."
            )
    return left
