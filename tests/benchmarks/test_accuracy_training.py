"""One run of the benchmark of accuracy on small synthetic clothes: its data, network, loss and figures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.accuracy import training
from benchmarks.accuracy.training import LIBRARIES, RADII, ReleasedHKR, Run
from benchmarks.layers.nets import FAMILIES, OTNN, TORCHLIP, Plan, build, layers_of
from otnn.errors import InputError
from otnn.models import Classifier
from tests.data.image_makers import idx_bytes

RUN = Run(OTNN, 1e-2, 0.25, 10.0, 0)


def test_the_radius_is_that_of_the_geometry_of_the_head(clothes: Path) -> None:
    given = training.data(clothes)
    net = build(FAMILIES[OTNN], Plan(((8, 2),), (16,), 8))
    training.train(net, given, RUN, 20)
    plain: Any = LIBRARIES[OTNN].plain(net, Plan((), (), 8)).double()
    found = training.figures(Classifier(plain[:-1], plain[-1], (1, 8, 8)).eval(), given.test_images, given.test_labels)
    with torch.no_grad():
        scores = plain(given.test_images.double())
    rows = plain[-1].weight.detach()
    radii = []
    for score, label in zip(scores, given.test_labels, strict=True):
        own = int(score.argmax())
        quotients = [
            float((score[own] - score[j]) / (found["constant"] * (rows[own] - rows[j]).norm()))
            for j in range(10)
            if j != own
        ]
        radii.append(min(quotients) if own == int(label) else -1.0)
    assert found["mean radius"] == pytest.approx(sum(max(radius, 0) for radius in radii) / 100, rel=1e-9)
    assert found["clean"] == sum(radius >= 0 for radius in radii) / 100
    for name, radius in RADII.items():
        assert found["certified"][name] == sum(each >= radius for each in radii) / 100
    assert found["clean"] > 0.8  # by chance .1
    assert 1 - 1e-5 < found["constant"] <= 1
    assert [float(row.norm()) for row in rows] == pytest.approx([1] * 10, abs=1e-6)


def test_a_loss_that_is_not_finite_is_told(clothes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite(self: ReleasedHKR, scores: Tensor, labels: Tensor) -> Tensor:
        return scores.sum() / 0

    monkeypatch.setattr(ReleasedHKR, "forward", infinite)
    row = training.measured(RUN, clothes, 1)
    assert "at step 1" in row["diverged"]
    assert "clean" not in row


def test_scores_that_are_not_finite_are_told(clothes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(family: Any, plan: Plan, seed: int) -> nn.Sequential:
        net = build(family, plan, seed)
        with torch.no_grad():
            list(layers_of(net))[-1].bias.fill_(torch.nan)  # type: ignore[operator]
        return net

    monkeypatch.setattr(training, "build", broken)
    row = training.measured(RUN, clothes, 1)
    assert row["diverged"] == "scores became NaN or infinite at step 1"


def test_a_plain_network_that_computes_something_else_is_refused(
    clothes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(net: nn.Sequential, plan: Plan) -> Any:
        plain: Any = LIBRARIES[OTNN].plain(net, plan)
        with torch.no_grad():
            plain[-1].bias += 1e-3
        return plain

    wrong = training.Library("otnn", LIBRARIES[OTNN].family, shifted)
    monkeypatch.setattr(training, "LIBRARIES", {OTNN: wrong})
    with pytest.raises(ArithmeticError, match="scores differ by 1"):
        training.measured(RUN, clothes, 1)


def test_too_few_images(tmp_path: Path) -> None:
    path = tmp_path / "fashion-mnist"
    path.mkdir()
    for stem, count in (("train", 100), ("t10k", 20)):
        (path / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((count, 8, 8), dtype=np.uint8)))
        (path / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(count, dtype=np.uint8) % 10))
    with pytest.raises(InputError, match="at least the 256 training images of a batch, got 100"):
        training.data(tmp_path)


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_library_has_the_same_network_and_is_read_out_exactly(name: str) -> None:
    pytest.importorskip(LIBRARIES[name].module)
    plan = Plan(((4, 1), (6, 2)), (8,), 8, classes=3)
    net = build(LIBRARIES[name].family(), plan)
    kinds = ["MaxMin" if type(layer).__name__ == "MaxMin" else "" for layer in net]
    assert kinds == ["", "MaxMin", "", "MaxMin", "", "", "MaxMin", ""]
    generator = torch.Generator().manual_seed(0)
    given = training.Data(
        torch.rand(512, 1, 8, 8, generator=generator), torch.arange(512) % 3, torch.empty(0), torch.empty(0), 3
    )
    training.train(net, given, Run(name, 1e-2, 0.5, 10.0, 0), 2)
    plain: Any = LIBRARIES[name].plain(net, plan)
    assert {type(layer).__name__ for layer in plain} == {"Conv2d", "MaxMin", "Flatten", "Linear"}
    assert all(layer.padding_mode == "zeros" for layer in plain if isinstance(layer, nn.Conv2d))
    images = torch.rand(20, 1, 8, 8, generator=generator)
    with torch.no_grad():
        assert torch.allclose(plain(images), net(images), atol=1e-5)
    rows = list(layers_of(plain))[-1].weight.detach()  # type: ignore[operator]
    assert rows.norm(dim=1).tolist() == pytest.approx([1] * 3, abs=1e-5)


def test_the_weights_of_torchlip_are_those_after_the_last_step() -> None:
    pytest.importorskip("deel.torchlip")
    from deel.torchlip.normalizers import bjorck_normalization

    net: Any = build(LIBRARIES[TORCHLIP].family(), Plan((), (4,), 4, classes=3))
    dense = net[1]
    for _ in range(20):
        net(torch.rand(2, 1, 4, 4))
    with torch.no_grad():
        dense.parametrizations.weight.original.add_(torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) / 8)
    stale = net.eval()[1].weight.detach().clone()
    fresh = LIBRARIES[TORCHLIP].plain(net, Plan((), (4,), 4))[1].weight.detach()  # type: ignore[index]
    original = dense.parametrizations.weight.original.detach()
    wanted = bjorck_normalization(original / torch.linalg.matrix_norm(original, 2), 1e-6)
    # 15 steps of either do not reach the polar factor to the last digit
    assert (fresh - wanted).abs().max() < 0.02
    assert (stale - wanted).abs().max() > 0.1


@pytest.mark.parametrize(("margin", "temperature"), [(1.0, 10.0), (0.5, 20.0), (2.0, 5.0)])
def test_the_loss_is_that_of_torchlip_over_many_batches(margin: float, temperature: float) -> None:
    released = pytest.importorskip("deel.torchlip").SoftHKRMulticlassLoss(
        alpha=0.98, min_margin=margin, temperature=temperature
    )
    ours = ReleasedHKR(margin, temperature, 10)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        # scores that grow beyond the margin, so that the running mean counts
        scores = 4 * torch.randn(32, 10, generator=generator)
        labels = torch.randint(10, (32,), generator=generator)
        one, other = (scores.clone().requires_grad_() for _ in range(2))
        signs = 2.0 * nn.functional.one_hot(labels, 10) - 1
        first, second = ours(one, labels), released(other, signs)
        assert first.item() == pytest.approx(second.item(), rel=1e-5)
        first.backward()
        second.backward()
        assert torch.allclose(one.grad, other.grad, atol=1e-6)  # type: ignore[arg-type]


def test_the_loss_of_a_score_by_hand() -> None:
    # equal rivals: weights 1/2; own 1, rivals 0, half margin 1: KR -1 - 0, hinges 0 and 1
    loss = ReleasedHKR(2.0, 10.0, 3)(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0]))
    assert loss.item() == pytest.approx(0.02 * -1 + 0.98 * 1)
