"""Commands that are killed end as if they had not been."""

import os

import kills
import pytest


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_commands_end_as_if_they_had_not_been(tmp_path):
    done = kills.kill(12, tmp_path)
    assert len(done) == 4 and sum(done.values()) >= 12
