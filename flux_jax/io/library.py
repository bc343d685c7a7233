"""Other people's code over other people's files: whatever it raises there is one sentence.

In: what would be wrong, and the way out. Out: a context; UserError from it. Libraries written in Rust panic, which
Python sees as no `Exception`.
"""

import contextlib
from collections.abc import Iterator

from flux_jax.errors import UserError
from flux_jax.io.reading import reason

PASSED_ON = (UserError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit)  # these say what they are


@contextlib.contextmanager
def library(wrong: str, remedy: str) -> Iterator[None]:
    """Whatever a library, or what it is given, raises inside is a UserError: what is wrong, then why, then the
    remedy."""
    try:
        yield
    except PASSED_ON:
        raise
    except BaseException as error:
        raise UserError(f"{wrong} ({reason(error)}): {remedy}.") from error
