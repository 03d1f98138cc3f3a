"""How orthogonal layers start."""

from otnn.errors import InputError

INITS = ("orthogonal", "identity")


def checked_init(init: str) -> str:
    """Return the name of an initialisation.

    Raises:
        InputError: another name.

    Example:
        >>> checked_init("identity")
        'identity'
    """
    if init not in INITS:
        raise InputError(f'init: expected "orthogonal" or "identity", got {init!r}')
    return init
