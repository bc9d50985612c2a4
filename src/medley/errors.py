"""Errors that are the user's to mend. Programs print them as one line, without a traceback."""


class UserError(ValueError):
    """Bad input: the message gives the value, the limit, the place and what to do next."""


class PartialFailure(UserError):
    """Work that ended, but not with all of its rows; programs exit with status 3."""
