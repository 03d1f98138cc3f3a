"""Layers that start as the identity, and random ones that do not."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from otnn.errors import InputError
from otnn.manifold import constrained_parameters, keep_on_manifold, retract_parameters
from otnn.nn import MaxMin, OrthoConv1d, OrthoConv2d, OrthoConvTranspose2d, OrthoLinear

SAME = [
    (lambda init: OrthoLinear(6, 6, init=init), (6,)),
    (lambda init: OrthoConv1d(4, 4, 3, padding=1, init=init), (4, 9)),
    (lambda init: OrthoConv1d(5, 5, 7, padding=3, init=init), (5, 9)),
    (lambda init: OrthoConv2d(1, 1, 3, padding=1, init=init), (1, 6, 7)),
    (lambda init: OrthoConv2d(4, 4, 1, init=init), (4, 6, 7)),
    (lambda init: OrthoConv2d(6, 6, 3, padding=1, init=init), (6, 6, 7)),
    (lambda init: OrthoConv2d(3, 3, 5, padding=2, padding_mode="circular", init=init), (3, 6, 7)),
    (lambda init: OrthoConv2d(6, 6, 3, padding=4, dilation=4, groups=3, init=init), (6, 6, 7)),
    (lambda init: OrthoConvTranspose2d(4, 4, 3, padding=1, init=init), (4, 5, 6)),
]


@pytest.mark.parametrize(("make", "shape"), SAME)
def test_a_layer_of_equal_sides_starts_as_the_identity(make, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(3, *shape)
    assert torch.allclose(make("identity")(x), x, atol=5e-6)
    assert not torch.allclose(make("orthogonal")(x), x, atol=0.1) or sum(shape) == 14  # one channel: shifts only


@pytest.mark.parametrize("make", [make for make, _ in SAME] + [
    lambda init: OrthoConv1d(2, 4, 2, init=init),  # an unpaired filter
    lambda init: OrthoConv1d(1, 9, 2, 2, init=init),  # a basis between two factors
])  # fmt: skip
def test_it_starts_on_the_manifold_to_the_accuracy_of_its_dtype(make) -> None:  # type: ignore[no-untyped-def]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        layer = make("identity")
    finally:
        torch.set_default_dtype(default)
    for name, parameter, manifold in constrained_parameters(layer):
        assert parameter.dtype == torch.float64
        assert not parameter.numel() or manifold.distance(parameter.detach()).max() < 1e-14, name


@pytest.mark.parametrize(("fan_in", "fan_out"), [(3, 8), (8, 3)])
def test_wide_and_tall_layers_cut_or_fill_with_zeros(fan_in: int, fan_out: int) -> None:
    x, kept = torch.randn(2, fan_in, 6, 6), min(fan_in, fan_out)
    for outputs, inputs in (
        (OrthoLinear(fan_in, fan_out, init="identity")(x[..., 0, 0]), x[..., 0, 0]),
        (OrthoConv1d(fan_in, fan_out, 5, padding=2, init="identity")(x[..., 0]), x[..., 0]),
        (OrthoConv2d(fan_in, fan_out, 3, padding=1, init="identity")(x), x),
        (OrthoConvTranspose2d(fan_in, fan_out, 3, padding=1, init="identity")(x), x),
    ):
        assert torch.allclose(outputs[:, :kept], inputs[:, :kept], atol=5e-6)
        assert outputs[:, kept:].abs().max() < 5e-6 if kept < fan_out else True


@pytest.mark.parametrize(("taps", "padding"), [(2, 0), (4, 1), (6, 2)])
def test_strides_take_the_pixels_of_all_channels_and_then_their_neighbours(taps: int, padding: int) -> None:
    x = torch.randn(2, 3, 8, 8)
    outputs = OrthoConv2d(3, 12, taps, 2, padding, init="identity")(x)
    expected = torch.cat([x[:, :, i::2, j::2] for i in range(2) for j in range(2)], dim=1)
    inside = slice(0, outputs.shape[-1] - padding)
    assert torch.allclose(outputs[..., inside, inside], expected[..., inside, inside], atol=1e-5)
    # the transpose puts them back
    back = OrthoConvTranspose2d(3, 3, taps, 2, padding, init="identity")(x)
    assert torch.allclose(back[..., ::2, ::2], x, atol=1e-5)
    assert float(back.detach().norm()) == pytest.approx(float(x.norm()), rel=1e-5)


@pytest.mark.parametrize(("taps", "stride", "padding"), [(2, 1, 0), (4, 1, 1), (3, 2, 1)])
def test_an_unpaired_filter_moves_every_other_channel_by_one_pixel(taps: int, stride: int, padding: int) -> None:
    weight = OrthoConv2d(4, 4, taps, stride, padding, init="identity").weight.detach()
    place = weight[range(4), range(4)].flatten(1).argmax(dim=1)
    assert (weight.abs() > 0.5).sum() == 4
    corners = torch.stack([place // taps, place % taps], dim=1)
    middle = (taps - stride - 1) // 2
    assert corners.tolist() == [[middle + 1] * 2, [middle] * 2, [middle + 1] * 2, [middle] * 2]


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("fan_in", "fan_out"), [(4, 4), (2, 12), (9, 2), (1, 20), (6, 9)])
def test_no_weight_is_without_a_gradient(fan_in: int, fan_out: int, stride: int, taps: int) -> None:
    if taps < stride:
        return
    for layer in (
        OrthoConv1d(fan_in, fan_out, taps, stride, init="identity"),
        OrthoConv2d(fan_in, fan_out, taps, stride, init="identity"),
        OrthoConv2d(2 * fan_in, 2 * fan_out, taps, stride, groups=2, init="identity"),
    ):
        layer = layer.double()
        retract_parameters(layer)
        x = torch.randn(4, layer.in_channels, *[9] * layer.dims, dtype=torch.float64)
        outputs = layer(x)
        (outputs * torch.randn_like(outputs)).sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            # a random output gives every single number a gradient, none of them a rounding error
            assert parameter.grad.abs().min() > 1e-6 * parameter.grad.abs().max(), name
            assert bool((parameter.grad != 0).all()), name


@pytest.mark.parametrize("taps", [3, 5])
def test_equal_projectors_move_apart_in_training(taps: int) -> None:
    layer = OrthoConv1d(4, 4, taps, padding=taps // 2, init="identity")
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    keep_on_manifold(optimizer, layer)
    x, wanted = torch.randn(16, 4, 8), OrthoConv1d(4, 4, taps, padding=taps // 2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), wanted(x).detach())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    assert layer.projectors is not None
    projectors = layer.projectors.detach() @ layer.projectors.detach().mT
    # all tell each other apart: none is bound to its partner, from which it started
    gaps = torch.stack([(one - projectors).flatten(1).norm(dim=1) for one in projectors])
    assert (gaps + torch.eye(len(gaps))).min() > 0.01


def test_a_deep_network_starts_as_an_isometry_of_its_inputs() -> None:
    net = nn.Sequential(*[OrthoConv2d(4, 4, 3, padding=1, init="identity") for _ in range(20)])
    x = torch.randn(2, 4, 5, 5)
    assert torch.allclose(net(x), x, atol=1e-4)  # zero padding takes nothing at the borders
    assert float(net.append(MaxMin())(x).detach().norm()) == pytest.approx(float(x.norm()), rel=1e-5)


def layers_of(init: str) -> list[nn.Module]:
    return [
        OrthoLinear(5, 3, init=init),
        OrthoConv1d(2, 4, 4, 2, init=init),
        OrthoConv2d(4, 8, 3, groups=2, init=init),
        OrthoConvTranspose2d(4, 2, 4, 2, init=init),
    ]


@pytest.mark.parametrize("init", ["orthogonal", "identity"])
def test_reset_parameters_starts_again_the_same_way(init: str) -> None:
    for layer in layers_of(init):
        before: Tensor = layer.weight.detach().clone()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(9.0)
        layer.reset_parameters()  # type: ignore[operator]
        assert torch.allclose(layer.weight, before, atol=1e-5) == (init == "identity")
        for _, parameter, manifold in constrained_parameters(layer):
            assert manifold.distance(parameter.detach()).max() < 5e-6


def test_random_starts_follow_the_seed() -> None:
    for init in ("orthogonal", "identity"):
        torch.manual_seed(5)
        first = layers_of(init)
        torch.manual_seed(5)
        second = layers_of(init)
        for one, other in zip(first, second, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_other_starts_are_refused() -> None:
    with pytest.raises(InputError) as caught:
        OrthoLinear(2, 2, init="eye")
    assert str(caught.value) == 'init: expected "orthogonal" or "identity", got \'eye\''
