"""Errors caused by input. Commands print them as one line, without a traceback."""


class UserError(ValueError):
    """Invalid input. The message names the place, the value, the expected value and the fix."""


class PartialFailure(UserError):
    """A command finished, but some of its records failed. Commands exit with status 3."""
