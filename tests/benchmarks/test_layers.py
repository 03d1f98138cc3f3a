"""The benchmark of layers, at sizes that take no time: what is timed is the same work, and what is told is true."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.layers import __main__ as command_line
from benchmarks.layers import measure, nets, peers
from benchmarks.layers.nets import CIRCULAR, FAMILIES, MAXMIN, OTNN, RELU, TORCHLIP, ZEROS, Plan, build, families
from otnn.lipschitz import bound
from otnn.manifold import constrained_parameters
from otnn.nn import MaxMin

SMALL = Plan(((4, 1), (4, 2)), (6,), 8, classes=3)
PEERS = {TORCHLIP: peers.has_torchlip, CIRCULAR: peers.has_orthogonium, ZEROS: peers.has_orthogonium}


def available(name: str) -> nets.Family:
    if name in PEERS and not PEERS[name]():
        pytest.skip(f"{name.split(',')[0]} is not installed; benchmarks/layers/peers.py tells how")
    return families()[name]


def sizes(net: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(layer.weight.shape) for layer in nets.layers_of(net)]


@pytest.mark.parametrize("name", [*FAMILIES, *PEERS])
def test_every_family_has_the_same_sizes(name: str) -> None:
    net = build(available(name), SMALL)
    assert sizes(net) == [(4, 1, 3, 3), (4, 4, 3, 3), (6, 64), (3, 6)]
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    assert sum(isinstance(layer, MaxMin) for layer in net) == (3 if name in (MAXMIN, OTNN, ZEROS) else 0)


def test_the_plan_is_that_of_the_figures() -> None:
    net = build(FAMILIES[MAXMIN], nets.PLAN)
    assert sizes(net) == [(32, 1, 3, 3), (32, 32, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3), (128, 3136), (10, 128)]


@pytest.mark.parametrize("memory_format", measure.FORMATS.values())
@pytest.mark.parametrize("name", [*FAMILIES, *PEERS])
def test_a_step_trains(name: str, memory_format: torch.memory_format) -> None:
    net = nets.to_format(build(available(name), SMALL), memory_format)
    batch = nets.Batch(SMALL, 8)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    step = measure.training_step(net, batch.images[memory_format], batch.labels)
    step()
    after = list(net.parameters())
    # a projection of one channel to rank 0, or a bias that no score depends on, would not move
    assert sum(not torch.equal(one, other) for one, other in zip(before, after, strict=True)) >= len(after) - 1
    for parameter_name, parameter, manifold in constrained_parameters(net):
        assert not parameter.numel() or manifold.distance(parameter.detach()).max() < 5e-6, parameter_name
    assert all(parameter.isfinite().all() for parameter in after)


def test_both_formats_of_a_batch_are_the_same_images() -> None:
    batch = nets.Batch(Plan(((4, 1),), (), 4, channels=2), 3)
    plain, last = (batch.images[kind] for kind in measure.FORMATS.values())
    first = plain.clone()
    batch.draw()
    assert torch.equal(plain, last)
    assert not torch.equal(plain, first)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()


@pytest.mark.parametrize("name", [OTNN, *PEERS])
def test_the_constraint_is_timed_in_its_parts(name: str) -> None:
    timer = measure.Constraint(build(available(name), SMALL))
    for _ in range(3):
        timer()
    assert len(timer.kernels) == len(timer.hooks) == 3
    assert min(timer.kernels) > 0
    assert min(timer.hooks) > 0


def test_the_constraint_holds_while_it_is_timed() -> None:
    net = build(FAMILIES[OTNN], SMALL)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    timer = measure.Constraint(net)
    timer()
    assert bound(net[:-1].eval()).constant < 1 + 1e-4
    moved = [not torch.equal(one, other) for one, other in zip(before, net.parameters(), strict=True)]
    assert sum(moved) >= 5  # mix or expand, and projectors, of two convolutions, and the dense layers


def test_a_plain_network_has_no_constraint() -> None:
    timer = measure.Constraint(build(FAMILIES[MAXMIN], SMALL))
    timer()
    assert timer.kernels == [0.0]


def test_peak_memory_is_that_of_the_tensors_that_live_together() -> None:
    def job() -> None:
        for _ in range(3):
            one = torch.ones(1000, dtype=torch.float64)  # 8,000 bytes
            other = one + 1  # and 8,000 more at the same time
            del one, other

    assert 16000 <= measure._peak(job) < 16100  # and the scalars 1 that are filled in


def test_memory_holds_the_parameters_their_gradients_and_the_state() -> None:
    plan = Plan((), (64,), 16)
    found = measure.memories(FAMILIES, plan, 2)
    count = 256 * 64 + 64 + 64 * 10 + 10
    # weight, gradient and two moments of Adam; a copy of the weight beside them in otnn
    assert 4 * 4 * count < found[RELU] < 8 * 4 * count
    assert found[OTNN] >= found[MAXMIN] + 4 * count / 2


def test_exported_networks_compute_the_same() -> None:
    images = torch.rand(2, 1, 8, 8)
    for name, convert in measure.EXPORTS.items():
        if name in PEERS and not PEERS[name]():
            continue
        net = build(families()[name], SMALL)
        for _ in range(3):
            net(images)  # deel-torchlip's weights settle in training
        net.eval()
        assert torch.allclose(convert(net)(images), net(images), atol=1e-5), name


def test_growth_is_of_the_sizes_that_it_tells() -> None:
    for kind in ("conv", "dense"):
        for name in (OTNN, MAXMIN):
            plan = measure.deep(kind, 6, 3)
            net = build(FAMILIES[name], plan)
            assert len(sizes(net)) == 3 + 1
            assert {shape[:2] for shape in sizes(net)[:3]} == {(6, 6)}
    calls: list[None] = []
    rows = measure.growth("dense", [(4, 1), (8, 1)], 2, 2, lambda: calls.append(None))
    assert [(row["width"], row["depth"], row["rounds"]) for row in rows] == [(4, 1, 2), (8, 1, 2)]
    assert len(calls) == 2


def grown(ratios: list[float]) -> list[dict[str, object]]:
    rows = zip((64, 128, 256), ratios, strict=True)
    return [
        {"along": "width", "layers": "conv", "width": w, "otnn over MaxMin": {"median": r}, "seconds": {}}
        for w, r in rows
    ]


@pytest.mark.parametrize(("ratios", "expected"), [([2.0, 1.5, 1.2], 0.75), ([1.0, 1.1, 3.0], 3.0)])
def test_growth_is_judged_by_the_largest_ratio(ratios: list[float], expected: float) -> None:
    assert command_line.rise(grown(ratios), "conv", "width") == pytest.approx(expected)


def test_bars_are_judged_by_their_sense() -> None:
    most, least = (command_line.Bar("", lambda r: 1.0, 2.0, least=least) for least in (False, True))
    assert [most.met(figure) for figure in (1.9, 2.0, 2.1)] == [True, True, False]
    assert [least.met(figure) for figure in (1.9, 2.0, 2.1)] == [False, True, True]


def test_report_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command_line, "PLAN", SMALL)
    monkeypatch.setattr(command_line, "WIDTH", 4)
    monkeypatch.setattr(command_line, "DEPTH", 1)
    out = tmp_path / "layers.json"
    arguments = ["--rounds", "2", "--samples", "4", "--growth-rounds", "1", "--growth-samples", "2", "--threads", "1"]
    arguments += ["--width", "4", "--width", "8", "--depth", "1", "--depth", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["layers", *arguments])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as left:
        command_line.main()
    torch.set_num_threads(threads)
    assert not left.value.code
    assert sorted(file.name for file in tmp_path.iterdir()) == ["layers.json", "layers.png"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(out.read_text())
    assert {"otnn", "torch"} <= report["versions"].keys()
    assert report["step"]["ratio to ReLU"].keys() == families().keys()
    assert report["step"]["ratio to ReLU"][RELU] == {"median": 1.0, "min": 1.0, "max": 1.0}
    best = report["step"]["best format"]
    for name, of in report["step"]["seconds"].items():
        assert of[best[name]]["median"] == min(spread["median"] for spread in of.values())
    assert [(row["layers"], row["along"], row["width"], row["depth"]) for row in report["growth"]] == [
        (kind, along, width, depth)
        for kind in ("conv", "dense")
        for along, points in (("width", [(4, 1), (8, 1)]), ("depth", [(4, 1), (4, 2)]))
        for width, depth in points
    ]
    told = capsys.readouterr().out
    expected = len(command_line.BARS) - 2 * (not peers.has_orthogonium()) - (not peers.has_torchlip())
    assert len(report["bars"]) == expected
    assert told.count("met: ") + told.count("MISSED: ") == expected
    for bar in report["bars"]:
        assert math.isfinite(bar["figure"])
        assert ("met" if bar["met"] else "MISSED") + f": {bar['what']}: {bar['figure']:.3g}" in told
