"""The benchmark of kept memory, on one small measurement of each kind."""

import json
import platform
from pathlib import Path

import pytest

from benchmarks.freed_memory import freed_memory
from benchmarks.layers.nets import OTNN


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_both_ways_are_measured_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    freed_memory(rounds=1, steps=1, samples=64, thread=[1], network=[OTNN], out=tmp_path / "report.json")
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert (row["network"], row["threads"]) == (OTNN, 1)
    kept, returned = row["kept"], row["returned"]
    ratio = kept["seconds"]["median"] / returned["seconds"]["median"]
    assert row["kept over returned"]["median"] == pytest.approx(ratio)
    # 64 images are 6.4 MB behind the first convolution alone, 1,568 pages where pages are not huge
    assert kept["page faults"]["median"] <= returned["page faults"]["median"]
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == str(tmp_path / "report.json")
    assert shown[0].startswith(f"{OTNN}, 1 threads: ")
