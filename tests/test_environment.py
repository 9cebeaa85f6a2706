"""Settings that are made before torch is loaded."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "program, given, expected",
    [
        (["train.py", "--data_dir=missing"], {}, "2000"),
        (["-m", "tools.eval", "--checkpoint=missing"], {"GOMP_SPINCOUNT": "17"}, "17"),
        (["sample.py", "--checkpoint=missing"], {"OMP_WAIT_POLICY": "passive"}, "0"),
    ],
)
def test_threads_wait_briefly_unless_the_user_decides(program, given, expected):
    """GNU OpenMP prints the settings that it read."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))
    }
    run = subprocess.run(
        [sys.executable, *program],
        cwd=REPO,
        env=inherited | given | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
    )
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", run.stderr)
    if found is None:
        pytest.skip("this build of torch does not use GNU OpenMP")
    assert found[1] == expected


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LARGE = """
from plaingpt import environment
environment.use_huge_pages()
import torch
kept = torch.ones(2**25)
print(open("/proc/self/smaps_rollup").read().partition("AnonHugePages:")[2].split()[0])
"""


@pytest.mark.parametrize("given, expected", [({}, True), ({"THP_MEM_ALLOC_ENABLE": "0"}, False)])
def test_large_tensors_have_huge_pages_unless_the_user_decides(given, expected):
    if not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text():
        pytest.skip("needs a Linux that gives huge pages where they are asked for")
    run = subprocess.run(
        [sys.executable, "-c", LARGE], cwd=REPO, env=os.environ | given, capture_output=True
    )
    assert run.returncode == 0, run.stderr
    assert (int(run.stdout) > 60_000) == expected  # KiB
