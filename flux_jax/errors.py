"""The one exception that stands for a user's mistake: a sentence to print and the process's exit code; how a value or a
text is shown in one, and the command that most of them end with."""

import re
from pathlib import Path
from typing import Any

DISTRIBUTION = "flux-jax-ternary"
LONGEST = 300  # characters of a line of a message


class UserError(Exception):
    """Something that the user can mend. `exit_code`: 2 bad input, 3 missing or gated weights, 4 out of memory. A line
    that a name or value made too long loses the middles of its words, but the first's, and what a terminal would act on
    is spelled out."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__("\n".join(map(_fitted, printable(message).split("\n"))))
        self.exit_code = exit_code


def _fitted(line: str) -> str:
    if len(line) > LONGEST:
        line = re.sub(r"(?<=\s)\S{61,}", lambda word: shortened(word[0], quote=False), line)
    return line if len(line) <= LONGEST else f"{line[:180]} ... {line[-115:]}"


def shortened(value: Any, most: int = 60, *, quote: bool = True) -> str:
    """A value, or with `quote` false a text, as it is shown in a sentence: its middle left out where it is long."""
    try:
        text = repr(value) if quote else printable(str(value))
    except ValueError:  # Python writes no number of more than some thousand digits
        text = "a number of thousands of digits"
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-(most // 2 - 5) :]}"


def printable(text: str) -> str:
    """A text that others wrote, safe on a terminal: control characters and halves of characters as escapes."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)


def pip_install(extra: str = "") -> str:
    """The command that installs this package, with an extra such as "cuda13": from its clone where it runs in one."""
    clone, option = Path(__file__).parents[1], f"[{extra}]" if extra else ""
    if (clone / "pyproject.toml").is_file():
        return f"pip install -e '{clone}{option}'"
    return f"pip install -U '{DISTRIBUTION}{option}'"
