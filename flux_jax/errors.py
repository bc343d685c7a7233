"""The one exception that stands for a user's mistake: a sentence to print and the process's exit code."""


class UserError(Exception):
    """Something that the user can mend. `exit_code`: 2 bad input, 3 missing or gated weights, 4 out of memory."""

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code
