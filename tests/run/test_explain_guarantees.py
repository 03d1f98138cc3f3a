"""What `otnn explain` tells of the guarantees: the library's sentences, its shares, and nothing of broken images."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from otnn.cli.main import main
from otnn.explain import counterfactual, saliency
from otnn.explain.scores import Scorer
from otnn.guarantees import Potential, bracket, in_words, path_stability, walk
from otnn.lipschitz import LipschitzBound, bound
from otnn.metrics import robustness_sr
from otnn.models import Classifier, predict
from otnn.report import write_report
from otnn.report.guarantees import SHORT
from otnn.run.certify import certify_run
from otnn.run.explain import explain_files, explain_gallery, explain_images
from otnn.run.folder import Run
from otnn.run.guarantees import figures, guarantee_arrays, over_samples
from otnn.run.train import load_dataset


def parts(run: Run) -> tuple[Classifier, LipschitzBound, torch.Tensor]:
    model = run.network("otnn").double()
    return model, bound(model.body, model.input_shape), load_dataset(run.config.data).test.images[:6]


def test_the_gallery_holds_the_sentences_of_the_library(run: Run) -> None:
    told = explain_gallery(run, size=5)
    arrays = dict(np.load(run.path / "explanations.npz", allow_pickle=False))
    assert set(told) == set(arrays)
    model, body, _ = parts(run)
    images = torch.tensor(arrays["images"]).double()
    way = counterfactual(model, images, body)
    potential = Potential(model, images, body, way.target)
    ends = bracket(potential, way.boundary)
    names = arrays["guarantee"].tolist()
    for found in (ends, path_stability(walk(potential, ends.details["upper"]))):
        g = names.index(found.name)
        assert arrays["guarantee_sentence"][:, g].tolist() == list(in_words(found))
        assert arrays["guarantee_bound"][:, g] == pytest.approx(found.bound.numpy())
        assert arrays["guarantee_share"][g] == pytest.approx(found.share)
    # the radius that is shown is the one of the sentence, up to its digits
    assert arrays["guarantee_bound"][:, 0] == pytest.approx(arrays["radius"], abs=1e-6)
    for name in ("boundary_bracket", "masking_deletion", "masking_insertion", "masking_mu_fidelity"):
        used = arrays["guarantee_tightness"][:, names.index(name)]
        assert ((used > 0) & (used <= 1 + 1e-9)).all()
    certify_run(run)
    write_report(run)
    page = (run.path / "report.html").read_text()
    assert all(str(sentence).replace("'", "&#39;") in page for sentence in arrays["guarantee_sentence"].ravel())


def test_robustness_is_bracketed_beside_each_map(run: Run) -> None:
    model, body, images = parts(run)
    inputs = images.double()
    found = guarantee_arrays(model, inputs, body)
    g = found["guarantee"].tolist().index("robustness_sr")
    assert len(found["guarantee"]) == 10
    own = predict(model(inputs).detach())
    thorough = robustness_sr(
        Scorer(model, inputs, own), inputs, saliency(model, inputs, own), shares=(0.05, 0.25, 0.45)
    )
    lower = torch.tensor(found["guarantee_bound"][:, g])
    assert torch.allclose(lower, Potential(model, inputs, body).radius)
    best = (lower.unsqueeze(1) / thorough.details["radius"]).mean(dim=1).numpy()
    used = found["guarantee_tightness"][:, g]
    # a short search finds what is there, up to a factor; the thorough one, of more steps, finds it nearer
    assert ((used > 0.3 * best) & (used <= best * 1.05)).all()
    assert all("on the sets attacked, one of at most" in told for told in found["guarantee_sentence"][:, g])


def test_an_image_has_the_same_guarantees_in_any_batch(run: Run) -> None:
    model, body, images = parts(run)
    together = guarantee_arrays(model, images.double(), body)
    alone = guarantee_arrays(model, images[3:4].double(), body)
    # 1e-14: some bounds are small differences of numbers of size 1, which a batch rounds otherwise
    np.testing.assert_allclose(alone["guarantee_bound"][0], together["guarantee_bound"][3], rtol=1e-9, atol=1e-14)
    assert alone["guarantee_sentence"][0].tolist() == together["guarantee_sentence"][3].tolist()


def test_a_broken_sample_does_not_break_the_rest(run: Run) -> None:
    model, body, images = parts(run)
    whole = guarantee_arrays(model, images.double(), body)
    broken = images.double().clone()
    broken[2, 0, 0, 0] = torch.nan
    found = guarantee_arrays(model, broken, body)
    assert found["guarantee_vacuous"][2].all()
    assert all("no guarantee, as the input holds NaN" in sentence for sentence in found["guarantee_sentence"][2])
    rest = [0, 1, 3, 4, 5]
    assert found["guarantee_sentence"][rest].tolist() == whole["guarantee_sentence"][rest].tolist()


def test_a_loose_bound_is_told_to_say_nothing(run: Run) -> None:
    model, _, images = parts(run)
    found = guarantee_arrays(model, images.double(), LipschitzBound(1e6, ()))
    names = found["guarantee"].tolist()
    # where the map is constant does not depend on that bound
    assert found["guarantee_vacuous"][:, [k for k, name in enumerate(names) if name != "constant_saliency"]].all()
    assert all("below one grey level" in reason for reason in found["guarantee_reason"][:, names.index(SHORT[0])])
    assert all("nothing is certain" in told for told in found["guarantee_sentence"][:, names.index(SHORT[1])])


def test_a_target_that_is_predicted_is_told_of_that_image_only(run: Run) -> None:
    _, _, images = parts(run)
    first = explain_images(run, images)
    arrays = explain_images(run, images, torch.full((6,), int(first["prediction"][0])))
    same = first["prediction"] == first["prediction"][0]
    asked = arrays["guarantee"] != "robustness_sr"  # which is about the prediction, whatever the target
    assert arrays["guarantee_vacuous"][same][:, asked].all()
    assert "the target is what is predicted already" in arrays["guarantee_sentence"][0, 0]
    assert (~arrays["guarantee_vacuous"][~same, 0]).any()


def test_shares_over_random_images(run: Run) -> None:
    model, body, _ = parts(run)
    test = load_dataset(run.config.data).test
    told = over_samples(model, body, test, 40)
    assert int(told["guarantee_samples"]) == 40
    index = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:40]
    potential = Potential(model, test.images[index].double(), body)
    ends = bracket(potential)
    assert told["guarantee_share"][0] == pytest.approx(ends.share)
    assert told["guarantee_median"][0] == pytest.approx(np.median(ends.bound.numpy()))
    assert told["guarantee_median_tightness"][0] == pytest.approx(np.median(ends.details["tightness"].numpy()))
    arrays = explain_gallery(run, size=2, samples=40)
    assert arrays["guarantee_share"] == pytest.approx(told["guarantee_share"])
    json.dumps(figures(arrays), allow_nan=False)
    # more than there are: all of them
    assert int(over_samples(model, body, test, 10**6)["guarantee_samples"]) == len(test)


def test_smoothgrad_says_something_with_enough_gradients(run: Run) -> None:
    model, body, images = parts(run)
    found = guarantee_arrays(model, images.double(), body, gradients=4000)
    g = found["guarantee"].tolist().index("certified_smoothgrad")
    assert not found["guarantee_vacuous"][:, g].all()
    assert any("With 99.9 % confidence" in told for told in found["guarantee_sentence"][:, g])


def test_the_command_tells_the_short_lines_and_all_as_json(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explain(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["otnn", "explain", str(run.path), *arguments])
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        return (int(code), *capsys.readouterr())

    _, _, images = parts(run)
    for k in range(2):
        Image.fromarray((images[k, 0] * 255).round().byte().numpy()).save(tmp_path / f"{k}.png")
    files = [str(tmp_path / f"{k}.png") for k in range(2)]
    code, out, _ = explain(*files, "--json")
    assert code == 0
    rows = json.loads(out)["images"]
    for k, row in enumerate(rows):
        assert set(row["guarantees"][SHORT[0]]) == {"sentence", "bound", "vacuous", "reason"}
        arrays = np.load(run.path / "explanations" / f"{k}.explained.npz", allow_pickle=False)
        assert [each["sentence"] for each in row["guarantees"].values()] == arrays["guarantee_sentence"][0].tolist()
        assert row["guarantees"]["boundary_bracket"]["bound"] == pytest.approx(row["radius"], abs=1e-6)
    code, out, _ = explain(*files, "--force")
    assert code == 0
    for row in rows:
        assert all(row["guarantees"][name]["sentence"] in out for name in SHORT)
        assert row["guarantees"]["masking_deletion"]["sentence"] not in out
    code, out, _ = explain("--samples", "20")
    assert code == 0
    assert "guarantees over 20 random test images" in out
    assert "certified smoothgrad" in out
    code, out, _ = explain("--json")
    told = json.loads(out)
    assert told["samples"] == 12
    assert set(told["guarantees"]["path_stability"]) == {"share", "median_bound", "median_tightness", "unit", "domain"}
    code, _, err = explain(files[0], "--samples", "5")
    assert code == 2
    assert "--samples goes with the gallery" in err


def test_the_short_lines_of_the_picture_keep_clear_of_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    plain = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), plain(self, *a, **k))[1])
    file = run.path / "one.png"
    _, _, images = parts(run)
    Image.fromarray((images[0, 0] * 255).round().byte().numpy()).save(file)
    explain_files(run, [file])
    (figure,) = drawn
    top, middle, bottom = figure.subfigs
    (text,) = middle.texts
    box = text.get_window_extent()
    assert "No change of the whole image" in text.get_text()
    assert box.x1 <= figure.bbox.x1
    assert max(axes.get_tightbbox().y1 for axes in bottom.axes) < box.y0
    assert box.y1 < min(axes.get_tightbbox().y0 for axes in top.axes)
