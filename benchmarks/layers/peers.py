"""Layers of deel-torchlip 1.0.5 and orthogonium 0.0.4, with their own settings.

They are timed in an environment of their own, which has everything that otnn is tested with beside them:

    python -m venv peers-env
    peers-env/bin/pip install -c constraints.txt deel-torchlip==1.0.5 orthogonium==0.0.4 -e ".[test]"
"""

import importlib.metadata
from importlib.util import find_spec

from torch import nn

PEERS = ("deel-torchlip", "orthogonium")


def installed() -> dict[str, str]:
    """Versions of the peers that are installed here."""
    found = {}
    for peer in PEERS:
        try:
            found[peer] = importlib.metadata.version(peer)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def has_torchlip() -> bool:
    """Whether deel-torchlip is installed here."""
    return find_spec("deel") is not None and find_spec("deel.torchlip") is not None


def has_orthogonium() -> bool:
    """Whether orthogonium is installed here."""
    return find_spec("orthogonium") is not None


def torchlip_conv(inputs: int, outputs: int, stride: int) -> nn.Module:
    """A strided convolution, which is faster than its poolings."""
    from deel.torchlip import SpectralConv2d

    return SpectralConv2d(inputs, outputs, 3, stride=stride, padding=1)


def torchlip_dense(inputs: int, outputs: int) -> nn.Module:
    from deel.torchlip import SpectralLinear

    return SpectralLinear(inputs, outputs)


def torchlip_head(inputs: int, outputs: int) -> nn.Module:
    """Rows of norm 1, as otnn's head."""
    from deel.torchlip import FrobeniusLinear

    return FrobeniusLinear(inputs, outputs)


def torchlip_activation() -> nn.Module:
    from deel.torchlip import GroupSort2

    return GroupSort2()


def torchlip_exported(net: nn.Module) -> nn.Module:
    """A copy in torch's layers."""
    from deel.torchlip.modules import vanilla_model

    return vanilla_model(net.eval(), in_place=False)


def orthogonium_conv(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Padding of one pixel by its default, which wraps around."""
    from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d

    return AdaptiveOrthoConv2d(inputs, outputs, 3, stride=stride, padding=1)


def orthogonium_zeros(inputs: int, outputs: int, stride: int) -> nn.Module:
    from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d

    return AdaptiveOrthoConv2d(inputs, outputs, 3, stride=stride, padding=1, padding_mode="zeros")


def orthogonium_dense(inputs: int, outputs: int) -> nn.Module:
    from orthogonium.layers import OrthoLinear

    return OrthoLinear(inputs, outputs)


def orthogonium_head(inputs: int, outputs: int) -> nn.Module:
    from orthogonium.layers import UnitNormLinear

    return UnitNormLinear(inputs, outputs)


def orthogonium_activation() -> nn.Module:
    from orthogonium.layers import MaxMin

    return MaxMin()
