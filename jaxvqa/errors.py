"""Errors whose message is one line for a user: what, where, what was expected, the remedy."""


class JaxVQAError(ValueError):
    """Something the library cannot do with what it was given."""


class UserError(JaxVQAError):
    """The request itself is wrong (exit code 2 on the command line)."""
