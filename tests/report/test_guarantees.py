"""The guarantees on the page: what is proven of each picture, and of how many pictures."""

import html
import re
from pathlib import Path

import numpy as np

from otnn.report.guarantees import MEANINGS, SHORT, promise_table
from otnn.report.load import load_run
from tests.report.synthetic import make_run, write_page


def part(page: str, start: str, end: str) -> str:
    found = re.search(re.escape(start) + r"(.*?)" + re.escape(end), page, re.S)
    assert found, start
    return html.unescape(found[1])


def test_the_two_sentences_stand_under_the_map_and_all_fold_out(run: Path) -> None:
    arrays = load_run(run).explanations
    page = write_page(run).read_text()
    assert "<none>" not in page
    for k in range(4):
        card = page[page.index(f'id="card-{k + 1}"') :]
        short = part(card, '<div class="promises">', "</div>")
        folded = part(card, '<details class="all-promises">', "</details>")
        sentences = arrays["guarantee_sentence"][k].tolist()
        assert [sentence in short for sentence in sentences] == [True, True, False]
        assert all(sentence in folded for sentence in sentences)
        assert all(domain in folded for domain in arrays["guarantee_domain"])
        assert folded.count("says nothing here") == arrays["guarantee_vacuous"][k].sum()


def test_the_table_counts_what_is_not_vacuous(run: Path) -> None:
    table = promise_table(load_run(run).explanations)
    assert (table.images, table.random) == (4, False)
    rows = {row[0]: row[2:5] for row in table.rows}
    assert rows[MEANINGS["boundary_bracket"][0]] == ("4 of 4", "0.600 (L2 norm of the change)", "90 %")
    assert rows[MEANINGS["path_stability"][0]] == ("2 of 4", "50 % in root mean square", "–")
    assert rows[MEANINGS["constant_saliency"][0]] == ("0 of 4", "1.00 × 10⁻⁷ (L2 norm of the change)", "–")
    text = html.unescape(write_page(run).read_text())
    assert "the 4 pictures of this gallery, which are no random sample" in text
    assert all(meaning in text for meaning in (MEANINGS[name][1] for name in SHORT))


def test_counted_over_random_pictures_or_never_known(run: Path) -> None:
    with np.load(run / "explanations.npz") as archive:
        arrays = dict(archive) | {
            "guarantee_samples": np.array(200),
            "guarantee_share": np.array([1.0, 0.995, 0.0]),
            "guarantee_median": np.array([0.5, np.nan, np.inf]),
        }
    np.savez(run / "explanations.npz", **arrays)
    table = promise_table(load_run(run).explanations)
    assert [row[2:4] for row in table.rows] == [
        ("200 of 200", "0.500 (L2 norm of the change)"),
        ("199 of 200", "none"),
        ("0 of 200", "any change"),
    ]
    assert "200 test pictures drawn at random" in write_page(run).read_text()


def test_a_single_picture_has_its_guarantees(tmp_path: Path) -> None:
    page = write_page(make_run(tmp_path / "run", gallery=1)).read_text()
    assert page.count('<div class="promises">') == 1
