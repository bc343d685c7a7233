"""The pictures of a run: what each is made of, and where it goes; nothing here computes or imports JAX.

In: arguments (`flux_jax.cli.arguments`), a prompts file, the record of an earlier picture, the model's config. Out:
`Request`s, one picture each, with every number decided and an output path that is free. Every mistake raises UserError
before the model is loaded.
"""

import argparse
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_jax import validation
from flux_jax.cli.arguments import ANY_SEED, aspect_size, parse_size
from flux_jax.cli.output_paths import OutputPaths
from flux_jax.config import FluxConfig
from flux_jax.errors import UserError, shortened
from flux_jax.io.places import check_writable
from flux_jax.io.png import read_record
from flux_jax.io.prompts import read_rows

if TYPE_CHECKING:
    from flux_jax.sampling.request import SamplingRequest


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
    """The rows of a prompts file as objects with at least `prompt`, `id` and `where` it stands, and the keys that mean
    nothing here."""
    rows, unknown = read_rows(path)
    return [
        {"id": f"{i:05d}", "prompt": row.prompt, "where": f"{path}, line {row.line}: ", **row.fields}
        for i, row in enumerate(rows)
    ], unknown


def plan_requests(
    args: argparse.Namespace, config: FluxConfig, record: dict[str, Any] | None, say: Callable[[str], None]
) -> tuple[list[Request], set[int]]:
    """All pictures of the run, and the indices of those whose seeds were asked for (not drawn at random). `say` gets
    each notice."""
    record = record or {}
    rows = _rows(args, record, say)
    defaults = _defaults(args, config, record, say)
    seeds = Seeds.chosen(args, record)
    if (count := len(rows) * seeds.per_prompt) > validation.MAX_PICTURES:
        raise UserError(f"{count} pictures are too many for one run: {validation.MAX_PICTURES} are the most.")
    paths = OutputPaths(args.output, args.prompts_file, len(rows), seeds.per_prompt)
    requests: list[Request] = []
    asked: set[int] = set()
    notices: dict[str, None] = {}
    for row in rows:
        id_ = str(row["id"]) if "id" in row else None
        try:
            settings, changes = _settings(row, defaults, config, strict=args.strict_size)
            chosen = [seeds.of(row, k, len(requests) + k) for k in range(seeds.per_prompt)]
        except UserError as error:
            own = row.keys() & {"seed", *defaults}
            raise UserError(f"{row['where'] if own else ''}{error}") from error
        notices |= dict.fromkeys(changes)
        for k, (seed, given) in enumerate(chosen):
            i = len(requests)
            output = paths.path(row, index=i, k=k, seed=seed)
            check_writable(output)
            requests.append(Request(i, id_, row["prompt"], seed=seed, output=output, **settings))
            asked |= {i} if given else set()
    for notice in notices:
        say(f"{notice.removesuffix('.')} (--strict-size to fail).")
    places = Counter(os.path.realpath(request.output) for request in requests)
    if twice := [request.output for request in requests if places[os.path.realpath(request.output)] > 1]:
        raise UserError(f"Two pictures would be written to {twice[0]}; put {{i}} or {{seed}} into -o.")
    return requests, asked


def _rows(args: argparse.Namespace, record: dict[str, Any], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """What is to be drawn: an object with at least `prompt` for each prompt of the file, the command line or the
    record."""
    if args.prompts_file:
        rows, ignored = read_prompts(args.prompts_file)
        if ignored:
            say(f"{args.prompts_file}: ignoring the keys {shortened(', '.join(ignored), 200, quote=False)}.")
        return rows
    prompts = args.prompts or ([record["prompt"]] if record else [])
    if not prompts:
        raise UserError('No prompt; say what to draw, as in: python -m flux_jax.generate "a red circle".')
    return [{"prompt": validation.check_prompt(prompt)} for prompt in prompts]


def _defaults(
    args: argparse.Namespace, config: FluxConfig, record: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """The settings of every picture whose row says nothing else: from the command line, the record, the model."""
    own = config.sampling
    if args.guidance is not None and not config.transformer.guidance_embeds:
        say(f"{shortened(config.name, quote=False)} embeds no guidance: --guidance has no effect.")
    width, height = _size(args, config, record)
    validation.check_text(args.negative_prompt or "", "negative prompt")
    return {
        "negative_prompt": _first(args.negative_prompt, record.get("negative_prompt")),
        "height": height,
        "width": width,
        "steps": _first(args.steps, record.get("steps"), own.num_inference_steps),
        "guidance": float(_first(args.guidance, record.get("guidance"), own.guidance_scale)),
        "true_cfg": float(_first(args.true_cfg, record.get("true_cfg"), 1.0)),
        "max_sequence_length": _first(
            args.max_sequence_length, record.get("max_sequence_length"), own.max_sequence_length
        ),
    }


def _settings(
    row: dict[str, Any], defaults: dict[str, Any], config: FluxConfig, *, strict: bool
) -> tuple[dict[str, Any], list[str]]:
    """A row's own settings over the defaults, checked, its size fitted to whole tokens; and a notice for each edge that
    changed."""
    settings = {**defaults, **{key: value for key, value in row.items() if key in defaults}}
    if settings["negative_prompt"] is not None and settings["true_cfg"] == 1:
        raise UserError("--negative-prompt has no effect while --true-cfg is 1; try --true-cfg 3 (2x slower).")
    numbers = ("steps", "guidance", "true_cfg", "max_sequence_length")
    validation.check_numbers(config, **{key: settings[key] for key in numbers})
    height, width, notices = validation.fit_size(config, settings["height"], settings["width"], strict=strict)
    return settings | {"height": height, "width": width}, notices


@dataclasses.dataclass(frozen=True)
class Seeds:
    """Which seed each picture has. values: one to count up from, or one for each picture of a prompt, where ANY_SEED
    stands for a random one; those count up from `random`."""

    values: list[int]
    per_prompt: int
    random: int

    @classmethod
    def chosen(cls, args: argparse.Namespace, record: dict[str, Any]) -> "Seeds":
        values = args.seed or [record.get("seed", ANY_SEED)]
        return cls(values, len(values) if len(values) > 1 else args.num_images or 1, validation.random_seed())

    def of(self, row: dict[str, Any], k: int, i: int) -> tuple[int, bool]:
        """Of the k-th picture of a row, which is picture i of the run; and whether it was asked for. UserError where
        there is no such seed."""
        if "seed" in row:
            seed, later = row["seed"], k
        elif len(self.values) > 1:
            seed, later = self.values[k], 0
        else:
            seed, later = self.values[0], i
        if seed == ANY_SEED:
            return (self.random + i) % validation.SEED_LIMIT, False
        return validation.check_seeds([seed + later])[0], True


def _first(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)


def _size(args, config: FluxConfig, record: dict[str, Any]) -> tuple[int, int]:
    width = record.get("width", config.sampling.width)
    height = record.get("height", config.sampling.height)
    if args.size:
        return parse_size(args.size)
    if args.aspect:
        area = config.sampling.width * config.sampling.height
        return aspect_size(args.aspect, area, config.pixels_per_token)
    return _first(args.width, width), _first(args.height, height)


def batches(requests: list[Request], most: int) -> list[list[Request]]:
    """Neighbours that one call can draw, at most so many together: they differ in prompt and seed only."""
    groups: list[list[Request]] = []
    for request in requests:
        same = {k: v for k, v in request.settings().items() if k not in ("prompt", "seed")}
        if groups and len(groups[-1]) < most and all(groups[-1][0].settings()[k] == v for k, v in same.items()):
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


def sampling_request(group: Sequence[Request]) -> "SamplingRequest":
    """Pictures of one of `batches` as a call of the pipeline."""
    from flux_jax.sampling.request import SamplingRequest

    first = group[0]
    return SamplingRequest(
        prompts=tuple(request.prompt for request in group),
        seeds=tuple(request.seed for request in group),
        height=first.height,
        width=first.width,
        steps=first.steps,
        guidance=first.guidance,
        true_cfg=first.true_cfg,
        max_sequence_length=first.max_sequence_length,
        negative_prompts=(first.negative_prompt or "",) * len(group) if first.true_cfg > 1 else (),
    )


def skip_done(
    jobs: list[Request], args: argparse.Namespace, asked: set[int], model: dict[str, Any], dtype: str
) -> list[Request]:
    """The jobs still to do. Of a prompts file, those whose picture exists already, made the same way, are left out;
    any other file in the way raises UserError. model, dtype: what would draw them, as in `differences`."""
    if args.overwrite:
        return jobs
    left = []
    for job in jobs:
        if not os.path.exists(job.output):
            left.append(job)
            continue
        if not args.prompts_file:
            raise UserError(f"{job.output} exists; choose another -o, or pass --overwrite to replace it.")
        try:
            differs = differences(job, job.index in asked, model, dtype)
        except UserError as error:
            sentence = str(error).removesuffix(".")
            raise UserError(f"{sentence}; choose another -o, or pass --overwrite to replace it.") from error
        if differs:
            raise UserError(
                f"{job.output} exists and was made with another {' and '.join(differs)}; "
                "choose another -o, or pass --overwrite to replace it."
            )
    return left


def differences(job: Request, seeded: bool, model: dict[str, Any], dtype: str) -> list[str]:
    """In what the picture at a job's output differs from the one that the job would make, in words. seeded: its seed
    was asked for; model: as in the record; dtype: "auto" where any will do. UserError where it holds no record."""
    unknown: list[str] = []
    there = read_record(job.output, unknown.append)
    wanted = {k: v for k, v in job.settings().items() if k != "seed" or seeded}
    differs = [k for k, v in wanted.items() if there[k] != v]
    compared = {"sha256": "model", "activations": "activations"}
    differs += [word for key, word in compared.items() if there["model"].get(key) != model.get(key)]
    differs += ["dtype"] if dtype not in ("auto", there["dtype"]) else []
    return differs + (["version of this program"] if unknown else [])
