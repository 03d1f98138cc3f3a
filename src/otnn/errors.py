"""The one error that a user's input can cause, told in one sentence with its mend."""


class InputError(ValueError):
    """Something that was given to otnn cannot be used.

    The message says what was expected, what came, and how to mend it. The command line prints it as one
    sentence on stderr and exits with code 2; in Python it is an ordinary `ValueError`.
    """
