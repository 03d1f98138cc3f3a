"""What a method must leave as it was: the global random numbers, and the model."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from otnn.errors import InputError

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed for methods that draw from global generators: from the generator, or 0 without one.

    Example:
        >>> draw_seed(None), draw_seed(torch.Generator().manual_seed(0)) == draw_seed(torch.Generator().manual_seed(0))
        (0, True)
    """
    if generator is None:
        return 0
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of torch (the CPU's and this device's) and numpy, and restore them at the end.

    Args:
        seed: non-negative.
        device: where the draws are made.

    Example:
        >>> before = torch.get_rng_state()
        >>> with seeded(5, torch.device("cpu")):
        ...     drawn = torch.rand(3)
        >>> bool(torch.equal(before, torch.get_rng_state()))
        True
    """
    cuda = [device] if device.type == "cuda" else []
    numpy_state = np.random.get_state()  # noqa: NPY002  (captum draws from it)
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put the modes, hooks and gradient flags of a model back at the end, also after an exception.

    Raises:
        InputError: a parameter was written to in between.
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    modes = [module.training for module in modules]
    hooks = [[set(getattr(module, kind)) for kind in _HOOKS] for module in modules]
    flags = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    versions = [parameter._version for parameter in parameters]
    try:
        yield
    finally:
        for module, mode, known in zip(modules, modes, hooks, strict=True):
            if module.training != mode:
                module.training = mode
            for kind, keys in zip(_HOOKS, known, strict=True):
                registered = getattr(module, kind)
                for key in set(registered) - keys:
                    del registered[key]
        for parameter, (flag, gradient) in zip(parameters, flags, strict=True):
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
            if parameter.grad is not gradient:
                parameter.grad = gradient
    if versions != [parameter._version for parameter in parameters]:
        raise InputError("method: it changed the weights of the model; give it a copy")
