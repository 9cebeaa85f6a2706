"""The compiled loss in processes of their own; tests/test_cpu.py compares it with PyTorch's."""

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]


def test_code_from_the_cache_rounds_as_when_it_was_compiled(tmp_path):
    """Otherwise the first run on a machine could not be resumed exactly."""
    script = """
import torch
from plaingpt.cross_entropy import cross_entropy
torch.manual_seed(1)
x = (3 * torch.randn(512, 1500)).bfloat16().requires_grad_()
cross_entropy(x * 1, torch.arange(512), torch.full((512,), 1 / 512)).backward()
print(x.grad.view(torch.uint16).long().mul(torch.arange(1500)).sum().item())
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", script]
    runs = [subprocess.run(command, env=environment, capture_output=True) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0]
    assert b"compiling" in runs[0].stderr and b"compiling" not in runs[1].stderr
    assert runs[0].stdout == runs[1].stdout
