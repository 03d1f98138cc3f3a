import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_two_clouds() -> None:
    figures = runpy.run_path(str(EXAMPLES / "two_clouds.py"))["main"]()
    assert figures["accuracy"] == 1.0
    assert figures["lipschitz_bound"] < 1 + 1e-5
    # the distance of a point at (1, 0) to the middle is 1: a perfect potential certifies about that on average
    assert 0.85 < figures["mean_radius"] < 1.1
