"""The one exception that stands for a user's mistake: a sentence to print and the process's exit code; and the command
that most of these sentences end with."""

from pathlib import Path

DISTRIBUTION = "flux-jax-ternary"


class UserError(Exception):
    """Something that the user can mend. `exit_code`: 2 bad input, 3 missing or gated weights, 4 out of memory."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def pip_install(extra: str = "") -> str:
    """The command that installs this package, with an extra such as "cuda13": from its clone where it runs in one."""
    clone, option = Path(__file__).parents[1], f"[{extra}]" if extra else ""
    if (clone / "pyproject.toml").is_file():
        return f"pip install -e '{clone}{option}'"
    return f"pip install -U '{DISTRIBUTION}{option}'"
