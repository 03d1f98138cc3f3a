import pytest
import torch
import torch.nn.functional as F
from torch import nn

from otnn.errors import InputError
from otnn.manifold import Frobenius, Stiefel, UnitRows
from otnn.nn import Centering, FrobeniusLinear, OrthoLinear, UnitNormLinear


@pytest.mark.parametrize("kind", [OrthoLinear, UnitNormLinear, FrobeniusLinear])
def test_it_is_torch_linear_with_its_own_weight(kind: type[nn.Linear]) -> None:
    layer, x = kind(5, 3), torch.randn(2, 4, 5)
    assert isinstance(layer, nn.Linear)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.bias is not None
    assert torch.equal(layer.bias, torch.zeros(3))
    assert kind(5, 3, bias=False).bias is None
    plain = nn.Linear(5, 3)
    plain.load_state_dict(layer.state_dict())  # what is trained here is served by torch
    assert torch.equal(plain(x), layer(x))


@pytest.mark.parametrize("kind", [OrthoLinear, UnitNormLinear, FrobeniusLinear])
@pytest.mark.parametrize(("fan_in", "fan_out"), [(0, 3), (3, 0), (-1, 2)])
def test_a_side_without_features_is_refused(kind: type[nn.Linear], fan_in: int, fan_out: int) -> None:
    with pytest.raises(InputError) as caught:
        kind(fan_in, fan_out)
    assert str(caught.value) == f"expected at least one feature on each side, got {fan_in} and {fan_out}"


def test_a_square_layer_is_an_isometry() -> None:
    layer, x = OrthoLinear(16, 16, bias=False), torch.randn(8, 16)
    assert torch.allclose(layer(x).norm(dim=1), x.norm(dim=1), rtol=1e-6)


def test_seeds_repeat_and_layers_differ() -> None:
    torch.manual_seed(3)
    first, second = OrthoLinear(4, 4), OrthoLinear(4, 4)
    torch.manual_seed(3)
    again = OrthoLinear(4, 4)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, second.weight)


def test_reset_returns_to_the_manifold() -> None:
    heads = ((UnitNormLinear(4, 6), UnitRows()), (FrobeniusLinear(4, 6), Frobenius()))
    for layer, manifold in ((OrthoLinear(4, 6), Stiefel()), *heads):
        with torch.no_grad():
            layer.weight.fill_(9.0)
            layer.bias.fill_(9.0)
        layer.reset_parameters()
        assert manifold.distance(layer.weight.detach()) < 5e-6
        assert torch.equal(layer.bias, torch.zeros(6))


def test_a_float64_layer_is_orthogonal_to_float64_accuracy() -> None:
    assert Stiefel().distance(OrthoLinear(6, 6, dtype=torch.float64).weight.detach()) < 1e-14


def test_rows_of_a_head_are_independent() -> None:
    # in 512 dimensions cosines of random rows are about 1/sqrt(512) = .044; 5 sigma
    weight = UnitNormLinear(512, 10).weight.detach()
    cosines = weight @ weight.T - torch.eye(10)
    assert cosines.abs().max() < 0.22
    assert cosines.abs().max() > 0.01  # not forced to be orthogonal


def test_centering_subtracts_channel_by_channel() -> None:
    layer = Centering(torch.tensor([1.0, 2.0]))
    images = torch.zeros(3, 2, 4, 5)
    assert torch.equal(layer(images)[:, 0], torch.full((3, 4, 5), -1.0))
    assert torch.equal(layer(images)[:, 1], torch.full((3, 4, 5), -2.0))
    assert torch.equal(layer(torch.zeros(1, 2)), torch.tensor([[-1.0, -2.0]]))
    assert list(layer.state_dict()) == ["mean"]
    assert list(layer.parameters()) == []


def test_centering_keeps_its_own_copy() -> None:
    mean = torch.zeros(2)
    layer = Centering(mean)
    mean.fill_(5.0)
    assert torch.equal(layer.mean, torch.zeros(2))


@pytest.mark.parametrize("mean", [torch.zeros(2, 2), torch.tensor(0.5), torch.tensor([0.0, torch.nan])])
def test_centering_refuses_what_is_no_mean(mean: torch.Tensor) -> None:
    with pytest.raises(InputError, match="mean: expected one finite number per channel, got shape"):
        Centering(mean)


def test_centering_refuses_other_channels() -> None:
    with pytest.raises(InputError, match="channel"):
        Centering(torch.zeros(3))(torch.zeros(1, 1, 4, 4))


def test_representations_tell_the_sizes() -> None:
    assert repr(OrthoLinear(3, 4)) == "OrthoLinear(in_features=3, out_features=4, bias=True)"
    assert repr(Centering(torch.zeros(3))) == "Centering(channels=3)"
