"""The one exception that reaches a user as a message instead of a traceback."""


class UserError(Exception):
    """A mistake that the user can repair.

    The message names the file and the trial or key, what was found, what was expected and what
    to do. Commands print it alone and leave with exit status 2.
    """
