"""The report as a reader meets it: in headless Chromium."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.report.synthetic import NASTY, STEPS, make_run, write_page

pytestmark = pytest.mark.browser


def explanations(run: Path) -> dict[str, Any]:
    with np.load(run / "explanations.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def classes(run: Path) -> list[str]:
    names: list[str] = json.loads((run / "results.json").read_text())["data"]["classes"]
    return names


def shown_frame(card: Any, part: str = "frame") -> np.ndarray[Any, Any]:
    """The pixels inside the window of a card's frame, as the page would draw them."""
    window = card.locator(f"[data-part={part}]")
    x, y, width, height = map(int, window.get_attribute("viewBox").split())
    store = card.locator(window.locator("use").get_attribute("href"))
    data = base64.b64decode(store.get_attribute("href").split(",", 1)[1])
    picture = Image.open(io.BytesIO(data))
    assert picture.size == (int(store.get_attribute("width")), int(store.get_attribute("height")))
    return np.asarray(picture.convert("RGB"))[y : y + height, x : x + width].astype(int)


def expected_frame(image: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    pixels = (np.clip(image, 0, 1) * 255).round().astype(int)
    pixels = pixels.repeat(size // image.shape[1], axis=1).repeat(size // image.shape[2], axis=2)
    return np.broadcast_to(pixels, (3, size, size)).transpose(1, 2, 0)


def set_slider(card: Any, value: int) -> None:
    card.locator("input[type=range]").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})); }",
        str(value),
    )


def place(card: Any) -> tuple[float, float]:
    marker = card.locator("[data-part=marker]")
    return float(marker.get_attribute("cx")), float(marker.get_attribute("cy"))


def test_the_slider_by_keyboard_moves_frame_text_and_marker(written: Path, open_page: Any) -> None:
    arrays, names = explanations(written), classes(written)
    opened = open_page(written / "report.html")
    card = opened.page.locator(".card").first
    slider, state = card.locator("input[type=range]"), card.locator("[data-part=state]")
    assert slider.get_attribute("max") == str(STEPS - 1)
    assert state.inner_text() == f"Not moved yet: the network says “{names[0]}”."
    start = place(card)
    zero = float(card.locator("[data-part=zero]").get_attribute("y1"))
    unit = (zero - start[1]) / arrays["potential"][0, 0]  # SVG units per unit of the lead
    assert unit > 0
    slider.focus()
    for k in range(1, STEPS):
        opened.page.keyboard.press("ArrowRight")
        label = names[int(arrays["scores"][0, k].argmax())]
        length = arrays["distances"][0, k]
        assert state.inner_text().startswith(f"Moved by {length:.3f}: the network says “{label}”")
        assert ("No change as small as this" in state.inner_text()) == (length < arrays["radius"][0])
        np.testing.assert_array_equal(shown_frame(card), expected_frame(arrays["path"][0, k], 64))
        across, up = place(card)
        assert up == pytest.approx(zero - unit * arrays["potential"][0, k], abs=0.11)
        assert across == pytest.approx(start[0] + 322 * length / arrays["distances"][0, -1], abs=0.11)
        assert label in card.locator("[data-part=frame]").get_attribute("aria-label")
    assert names[1] in state.inner_text()
    assert state.inner_text().endswith("now.")
    opened.page.keyboard.press("Home")
    assert place(card) == start
    assert opened.troubles == []


def test_setting_the_value_moves_a_colour_picture_of_one_output(tmp_path: Path, open_page: Any) -> None:
    run = make_run(tmp_path / "run", shape=(3, 16, 16), classes=("no", "yes"), one_output=True, twin=False)
    arrays = explanations(run)
    opened = open_page(write_page(run))
    card = opened.page.locator(".card").nth(1)
    for k, label in ((0, "no"), (8, "no"), (15, "yes")):
        set_slider(card, k)
        np.testing.assert_array_equal(shown_frame(card), expected_frame(arrays["path"][1, k], 64))
        assert f"“{label}”" in card.locator("[data-part=state]").inner_text()
        assert (label == "no") == (arrays["potential"][1, k] > 0)
    assert card.locator("header .verdict").inner_text() == "✗ wrong"
    assert "Ordinary network" not in opened.page.content()
    assert opened.troubles == []


def test_the_change_is_blue_where_darker_and_orange_where_brighter(written: Path, open_page: Any) -> None:
    path = np.clip(explanations(written)["path"][0], 0, 1)
    card = open_page(written / "report.html").page.locator(".card").first
    set_slider(card, 0)
    assert (shown_frame(card, "change") == 255).all()
    set_slider(card, STEPS - 1)
    change = path[-1, 0] - path[0, 0]
    row, column = np.unravel_index(np.abs(path[:, 0] - path[0, 0]).max(axis=0).argmax(), change.shape)
    colour = shown_frame(card, "change")[row * 8, column * 8].tolist()
    assert colour == ([168, 67, 0] if change[row, column] > 0 else [11, 79, 138])


def test_nothing_is_asked_for_and_nothing_is_injected(written: Path, open_page: Any) -> None:
    file = written / "report.html"
    opened = open_page(file)
    page = opened.page
    for card in page.locator(".card:has(input)").all():
        set_slider(card, 10)
    page.wait_for_timeout(200)
    assert opened.outside(file) == []
    assert opened.troubles == []
    assert page.locator("b, i").count() == 0
    assert page.title() == f"synthetic {NASTY}: what this classifier can promise"
    assert f"“{NASTY}”" in page.locator(".card h3").first.inner_text()
    assert "private-place" not in page.content()
    policy = page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    page.evaluate(
        "() => { const s = document.createElement('script'); s.text = 'window.hacked = 1'; document.body.append(s); }"
    )
    assert page.evaluate("window.hacked === undefined")


def test_figures_on_the_page_are_those_of_the_certificates(written: Path, open_page: Any) -> None:
    with np.load(written / "certificates.npz") as archive:
        right, radius = archive["label"] == archive["prediction"], archive["radius"]
    page = open_page(written / "report.html").page
    cells = page.locator("[data-certified]").all()
    assert [cell.get_attribute("data-certified") for cell in cells][:4] == ["0", "0.1", "0.25", "0.5"]
    for cell in cells:
        share = (right & (radius >= float(cell.get_attribute("data-certified")))).mean()
        assert cell.inner_text() == (f"{100 * share:.1f} %" if share else "0 %")
    assert (
        page.locator("[data-value='certified-0.25']").inner_text() == f"{100 * (right & (radius >= 0.25)).mean():.1f} %"
    )
    assert page.locator("[data-value=twin-accuracy]").inner_text() == "98.3 %"
    first = explanations(written)["radius"][0]
    said = float(page.locator(".card").first.locator("dd strong").inner_text())
    assert first - 0.001 <= said <= first  # rounded down


def test_a_card_without_a_way_says_why(written: Path, open_page: Any) -> None:
    cards = open_page(written / "report.html").page.locator(".card")
    assert cards.count() == 4
    without_boundary, without_way = cards.nth(2), cards.nth(3)
    for card in (without_boundary, without_way):
        assert "Incomplete: no boundary within 64 certified radii" in card.inner_text()
        assert "not found" in card.inner_text()
    assert without_boundary.locator("input").count() == 1
    assert without_way.locator("input").count() == 0
    assert "There is no way to show" in without_way.inner_text()


def test_every_picture_has_a_text(written: Path, open_page: Any) -> None:
    page = open_page(written / "report.html").page
    for image in page.locator("img").all():
        assert len(image.get_attribute("alt")) > 20
    named = "e => e.getAttribute('aria-hidden') || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')"
    for drawing in page.locator("svg").all():
        assert drawing.evaluate(named)
    broken = (
        "ids => ids.flatMap(e => e.getAttribute('aria-labelledby').split(' ')).filter(i => !document.getElementById(i))"
    )
    assert page.locator("[aria-labelledby]").evaluate_all(broken) == []
    ids = page.locator("[id]").evaluate_all("all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert page.locator("output[aria-live=polite]").count() == 3
    assert page.get_by_label("Move the picture along the way").count() == 3


def test_a_phone_scrolls_one_way_only(written: Path, open_page: Any) -> None:
    page = open_page(written / "report.html", viewport={"width": 360, "height": 740}).page
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("input[type=range]").first.bounding_box()["width"] > 200


@pytest.mark.parametrize("how", ["print", "without JavaScript"])
def test_the_strip_stands_in_for_the_slider(written: Path, open_page: Any, how: str) -> None:
    page = open_page(written / "report.html", java_script_enabled=how == "print").page
    if how == "print":
        assert page.locator(".strip").first.is_hidden()
        page.emulate_media(media="print")
    card = page.locator(".card").first
    assert card.locator(".strip").is_visible()
    assert card.locator("input").is_hidden()
    assert card.locator(".curve, .walk .chart").first.is_visible()
    frames = card.locator(".strip li")
    assert frames.count() == 7
    assert frames.locator("span").first.inner_text() == "0.000"
    assert f"{explanations(written)['boundary_distance'][0]:.3f}" in card.locator(".strip").inner_text()
    assert page.pdf()[:5] == b"%PDF-"


def test_twelve_colour_pictures_of_64_pixels_stay_small(tmp_path: Path, open_page: Any) -> None:
    run = make_run(tmp_path / "run", shape=(3, 64, 64), gallery=12)
    file = write_page(run)
    assert file.stat().st_size < 4_000_000
    opened = open_page(file)
    card = opened.page.locator(".card").first
    set_slider(card, 10)
    frame = shown_frame(card)
    wanted = expected_frame(explanations(run)["path"][0, 10], 64)
    assert abs(frame.mean() - wanted.mean()) < 4  # lossy: noise is what WebP keeps worst
    assert opened.troubles == []
