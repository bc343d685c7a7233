"""The one door for files from outside: text and JSON of bounded size and depth, in any of the usual encodings.

In: a path that a user or a stranger's file names. Out: bytes, text, JSON values; or UserError, one sentence with the
file and what is wrong with it, whatever the system, the decoder or the parser raises. Nothing waits: named pipes and
devices are refused before they are opened. A pipe that the user's shell made, /dev/stdin or /dev/fd/63, is read where
`pipes` allow it: what it waits for is the user's own command.

JSON is taken strictly, because every reader of it decides what is computed: no NaN, no key twice, no half of a
character, no more than DEPTH levels.
"""

import codecs
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flux_jax.errors import UserError, shortened

DEPTH = 64  # levels of a JSON value; ours have six
SMALL = 2**24  # bytes of a config, a record, a list of hashes
LARGE = 2**28  # bytes of a tokenizer, a list of prompts, a table of weights
ENCODINGS = {  # byte order mark -> encoding that reads it; the longer ones first, for UTF-32's begins like UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_bytes(path: Path, *, most: int = SMALL, remedy: str = "", pipes: bool = False) -> bytes:
    """All of a file of at most `most` bytes. remedy: the end of the sentence, such as "copy the checkpoint again"."""
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind) and not (pipes and stat.S_ISFIFO(kind) and is_anonymous(path)):
            raise unreadable(path, kind_of(kind), remedy)
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise unreadable(path, reason(error), remedy) from error
    if len(data) > most:
        raise unreadable(path, f"it has more than {most // 2**20} MiB", remedy)
    return data


def read_text(path: Path, *, most: int = SMALL, remedy: str = "", pipes: bool = False) -> str:
    """The text of a file: UTF-8, or what its byte order mark says, which is no part of it. Line ends stay as they are.
    UserError where it is no text, with the line."""
    return as_text(read_bytes(path, most=most, remedy=remedy, pipes=pipes), path, remedy)


def as_text(data: bytes, path: Path | str, remedy: str = "") -> str:
    """The text that the bytes of a file, or of what is called so, stand for, as `read_text` gives it."""
    encoding = next((name for mark, name in ENCODINGS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
        zero = text.find("\0")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        name = encoding.removesuffix("-sig").upper()
        raise unreadable(path, f"it is not {name} text (line {line})", remedy or "save it as UTF-8") from error
    if zero >= 0:
        raise unreadable(path, f"it is not text: line {text[:zero].count(chr(10)) + 1} holds a zero byte", remedy)
    return text


def entries(folder: Path, remedy: str = "") -> list[Path]:
    """What is in a folder, in the order of names."""
    try:
        return sorted(folder.iterdir())
    except (OSError, ValueError) as error:
        raise unreadable(folder, reason(error), remedy) from error


def read_json(path: Path, *, most: int = SMALL, remedy: str = "") -> Any:
    """The JSON value in a file."""
    return parse_json(read_text(path, most=most, remedy=remedy), str(path), remedy)


def read_object(path: Path, *, most: int = SMALL, remedy: str = "") -> dict[str, Any]:
    """The JSON object in a file; UserError where it is another value."""
    value = read_json(path, most=most, remedy=remedy)
    if not isinstance(value, dict):
        raise UserError(_sentence(f"{path} does not hold a JSON object", remedy))
    return value


def parse_json(text: str | bytes, where: str, remedy: str = "") -> Any:
    """The value that a JSON text stands for; `where` it stands begins the sentence of a UserError."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
        if is_deep(value):
            raise RecursionError
        json.dumps(value, ensure_ascii=False).encode()  # an escape such as \ud800 alone is half a character
    except RecursionError:
        wrong = f"more than {DEPTH} levels deep"
    except UnicodeEncodeError as error:
        wrong = f"{error.object[error.start]!r} is half a character"
    except (ValueError, MemoryError) as error:
        wrong = "a number has thousands of digits" if "integer string" in str(error) else reason(error)
    else:
        return value
    raise UserError(_sentence(f"{where}: not valid JSON ({wrong})", remedy))


def is_deep(value: Any, levels: int = DEPTH) -> bool:
    """Whether lists and objects lie in one another more than `levels` deep."""
    if not isinstance(value, dict | list):
        return False
    return levels == 0 or any(
        is_deep(each, levels - 1) for each in (value.values() if isinstance(value, dict) else value)
    )


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shortened(name)} stands there twice")
        found[name] = value
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def check_regular(path: Path, *, remedy: str = "") -> os.stat_result:
    """What the system says of a file that something else will open: it is there, and no pipe, device or folder."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise unreadable(path, kind_of(found.st_mode), remedy)
        if not os.access(path, os.R_OK):
            raise unreadable(path, "Permission denied", remedy)
    except (OSError, ValueError) as error:
        raise unreadable(path, reason(error), remedy) from error
    return found


def leads_out(root: Path, path: Path) -> bool:
    """Whether what lies at `path` lies outside the folder `root`, every link followed. A hub's cache makes the folder
    `snapshots/REVISION` of links into the `blobs` of its repository: those are no way out of it."""
    try:
        home, real = Path(os.path.realpath(root)), Path(os.path.realpath(path))
    except (OSError, ValueError):  # ValueError: no such path can be
        return True
    stores = [each.parents[1] / "blobs" for each in (home, *home.parents) if each.parent.name == "snapshots"]
    return not any(real.is_relative_to(each) for each in (home, *stores))


def is_anonymous(path: Path) -> bool:
    """Whether a pipe has no name of its own: the shell's, for `<(command)` or `command |`."""
    return not os.path.exists(os.path.realpath(path))


def kind_of(mode: int) -> str:
    """What is there in place of a file, for a sentence."""
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return f"it is {next((name for test, name in kinds.items() if test(mode)), 'a device')}, not a file"


def reason(error: BaseException) -> str:
    """What an error says, as a part of one sentence: the system's words, or one shortened line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return shortened(" ".join(str(error).split()) or type(error).__name__, 160, quote=False)


def unreadable(path: Path | str, wrong: str, remedy: str = "") -> UserError:
    """The error of a file that cannot be read."""
    return UserError(_sentence(f"Cannot read {path}: {wrong}", remedy))


def _sentence(text: str, remedy: str) -> str:
    return f"{text}; {remedy}." if remedy else f"{text}."
