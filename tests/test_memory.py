import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from otnn.errors import InputError
from otnn.memory import chunk_size, keep_freed_memory


def test_activations_are_counted_where_they_live() -> None:
    """A copy, its mask and its filling of 4 float32 each, then 100 values beside the 2 that follow them."""
    model = nn.Sequential(nn.Linear(4, 100), nn.Linear(100, 2)).eval()
    x = torch.rand(1, 4)
    each = 4 * (3 * 4 + 100 + 2)
    assert chunk_size(x, each, model) == 1
    assert chunk_size(x, 7 * each + 1, model) == 7
    with pytest.raises(InputError, match=f"at least {each} bytes, which one perturbed sample needs, got {each - 1}"):
        chunk_size(x, each - 1, model)
    # an activation that is dropped makes room for the next: the peak is of two, not of five
    deep = nn.Sequential(*[nn.Linear(50, 50) for _ in range(5)]).eval()
    assert chunk_size(torch.rand(1, 50), 4 * (3 * 50 + 2 * 50), deep) == 1
    # a backward keeps them all, and gradients beside them
    smooth = nn.Sequential(*[nn.Sequential(nn.Linear(50, 50), nn.Tanh()) for _ in range(5)]).eval()
    with pytest.raises(InputError, match="memory_budget"):
        chunk_size(torch.rand(1, 50), 4 * (3 * 50 + 5 * 50), smooth, gradient=True)
    assert chunk_size(torch.rand(1, 50), 4 * (3 * 50 + 4 * 50), smooth) == 1


# 20 times 64 MiB, more than glibc ever keeps of itself: 16,384 pages each, or 32 where pages are huge
FAULTS = """
import resource, sys
import torch
from otnn.memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
for step in range(40):
    if step == 20:  # by now small objects have found their places between the large ones
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    chosen = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS, how]
    found = subprocess.run(command, env=chosen, capture_output=True, text=True, check=True, timeout=120)
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_kept_memory_is_not_faulted_in_again() -> None:
    given_back, kept = faults("given back"), faults("kept")
    assert given_back >= 20 * 32
    assert kept < 20  # less than a page for each tensor: what Python itself touches


def test_an_allocator_that_the_user_chose_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_freed_memory()
