"""Which files of a folder are the weights of a component.

In: a file or folder that a user names, or that a model's folder has. Out: a `Source` of the component's tensors, or
UserError that says what is there instead.

The standard name comes first, its variants (`.fp16`, `.bf16`) where it is not there, and any other name only for what
the file holds. A name may be one file, an index and its shards, or shards alone if all are there. What lies beside
(a LoRA, another component) does not count.
"""

import contextlib
import os
import re
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path

from convert import identify
from flux_jax.errors import UserError, shortened
from flux_jax.io import reading
from flux_jax.io.safetensors import AGAIN, Source
from flux_jax.models.params import COMPONENTS

STANDARD = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "t5": "model",
    "clip": "model",
}
VARIANTS = ("fp32", "bf16", "fp16")  # the best one first; any other comes after them
INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)(?:\.(?P<variant>[^.]+))?\.safetensors")
SINGLE = re.compile(r"(?P<stem>.+)\.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf")
SHOWN = 3  # files that a refusal names


@dataclass
class Candidate:
    """The files of one name in a folder; `variant` is "" for the name alone."""

    stem: str
    variant: str
    single: Path | None = None
    index: Path | None = None
    shards: dict[int, dict[int, Path]] = field(default_factory=dict)  # how many there are -> number -> file

    @property
    def name(self) -> str:
        return f"{self.stem}.{self.variant}" if self.variant else self.stem

    def source(self, folder: Path) -> Source:
        """All that the name holds: by the index, else the one file, else the shards alone."""
        if self.index is not None:
            found = Source.of_index(folder, self.index)
            if found.files or found.entries or self.single is None:
                return found
        if self.single is not None:
            identify.refuse_other_kinds(self.single)
            return Source.of(folder, [self.single])
        total, shards = max(self.shards.items(), key=lambda item: len(item[1]) / max(item[0], 1))
        if absent := [number for number in range(1, min(total, len(shards) + 1) + 1) if number not in shards]:
            sample = next(iter(shards.values())).name
            wrong = f"{folder}: shard {absent[0]} of {total} is missing beside {sample}, and so is the index: {AGAIN}"
            return Source(str(folder), faults=[wrong])
        return Source.of(folder, [shards[number] for number in range(1, total + 1)])


def weights(path: Path, component: str) -> Source:
    """The component's tensors in a file or folder. UserError, in words, where they are not there; what is wrong with
    the files that hold them is in `faults`."""
    if is_folder(path):
        return in_folder(path, component)
    return identify.take(in_file(path), component)


def is_folder(path: Path) -> bool:
    """Whether a path that must be there is a folder. UserError, exit code 3, where nothing is; and for a pipe or a
    device."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            raise UserError(f"{path} is a link to a file that is not there: {AGAIN}", 3) from None
        raise UserError(f"no such file or folder: {path}", 3) from None
    except (OSError, ValueError) as error:
        raise reading.unreadable(path, reading.reason(error)) from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise reading.unreadable(path, reading.kind_of(mode))
    return stat.S_ISDIR(mode)


def in_file(path: Path) -> Source:
    """All tensors of one file. UserError where it is another kind of file."""
    identify.refuse_other_kinds(path)
    return Source.of(path, [path])


def in_folder(folder: Path, component: str) -> Source:
    """As `weights`, of a folder."""
    found = candidates(folder)
    if source := _fitting(folder, component, found):
        return source
    if len(found) == 1:
        return identify.take(found[0].source(folder), component)
    if found:
        first, *others = sorted(found, key=lambda each: each.stem != STANDARD[component])
        names = ", ".join(shortened(each.name, quote=False) for each in others[:SHOWN])
        more = f"{names}{' ...' if len(others) > SHOWN else ''}"
        told = _told(first, folder, component)
        raise UserError(f"{folder} does not hold {identify.NAMES[component]}, nor does {more} in it: {told}")
    others = [path.name for path in reading.entries(folder) if path.suffix in PICKLED]
    pickled = f" (files such as {shortened(others[0])} are not read)" if others else ""
    raise UserError(f"{folder}: no .safetensors file here{pickled}")


def _told(candidate: Candidate, folder: Path, component: str) -> str:
    """What a name in the folder stands for, or why that cannot be known."""
    try:
        source = candidate.source(folder)
    except UserError as error:
        return str(error).replace(f"{folder}/", "")
    if source.faults:
        return source.faults[0].replace(f"{folder}/", "")
    return f"{shortened(candidate.name, quote=False)} {identify.what(source, component) or 'is one'}"


def search(folder: Path, component: str) -> Source | None:
    """The component's tensors in a folder where they may be under any name, beside others; None where they are not
    there. Their `where` is a file of theirs."""
    found = _fitting(folder, component, candidates(folder))
    return replace(found, where=str(found.files[0])) if found and found.files else found


def useless(folder: Path) -> list[str]:
    """In words, each name in a folder under which no component can be read."""
    told = [(each, _told(each, folder, "transformer")) for each in candidates(folder)]
    return [words for each, words in told if not any(_holds(each, folder, component) for component in COMPONENTS)]


def _holds(candidate: Candidate, folder: Path, component: str) -> bool:
    with contextlib.suppress(UserError):  # of a file that is none
        source = candidate.source(folder)
        return not source.faults and identify.what(source, component) is None
    return False


def _fitting(folder: Path, component: str, found: list[Candidate]) -> Source | None:
    named = [each for each in found if each.stem == STANDARD[component]]
    for each in sorted(named, key=_quality):
        source = each.source(folder)
        if source.faults or identify.what(source, component) is None:
            if each.variant:
                source.notes.append(f"{folder}: only a variant is there, and {shortened(each.variant)} was taken")
            return identify.take(source, component)
    fitting = [each for each in found if each not in named and _holds(each, folder, component)]
    if len(fitting) > 1:
        names = ", ".join(each.name for each in fitting[:SHOWN]) + (" ..." if len(fitting) > SHOWN else "")
        raise UserError(f"{folder} holds {identify.NAMES[component]} more than once ({names}): name one of these files")
    return identify.take(fitting[0].source(folder), component) if fitting else None


def _quality(candidate: Candidate) -> tuple[int, int, str]:
    variant = candidate.variant
    rank = VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS)
    return (1 if variant else 0, rank, variant)


def candidates(folder: Path) -> list[Candidate]:
    """The names in a folder that weights may have, in their order."""
    found: dict[tuple[str, str], Candidate] = {}

    def candidate(match: re.Match[str]) -> Candidate:
        stem, variant = match["stem"], match.groupdict().get("variant") or ""
        standard = next((name for name in STANDARD.values() if stem.startswith(f"{name}.")), None)
        if standard and not variant:  # NAME.fp16.safetensors, NAME.fp16-00001-of-00002.safetensors
            stem, variant = standard, stem.removeprefix(f"{standard}.")
        return found.setdefault((stem, variant), Candidate(stem, variant))

    for path in reading.entries(folder):
        if path.name.startswith(".") or os.path.isdir(path):  # "._NAME" is what a Mac leaves beside a copied file
            continue
        if match := INDEX.fullmatch(path.name):
            candidate(match).index = path
        elif match := SHARD.fullmatch(path.name):
            candidate(match).shards.setdefault(int(match["total"]), {})[int(match["number"])] = path
        elif match := SINGLE.fullmatch(path.name):
            candidate(match).single = path
    return list(found.values())
