"""GNU OpenMP prints the settings that it read when torch was loaded."""

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
