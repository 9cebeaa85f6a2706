"""The compiled loss in processes of their own; tests/test_cpu.py compares it with PyTorch's."""

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]


def test_code_from_the_cache_rounds_as_when_it_was_compiled(tmp_path):
    """Otherwise the first run on a machine could not be resumed exactly."""
    script = """
import hashlib
import torch
from plaingpt.cross_entropy import cross_entropy
generator = torch.Generator().manual_seed(1)
x = (3 * torch.randn(2048, 4096, generator=generator)).bfloat16().requires_grad_()
targets = torch.randint(0, 4096, (2048,), generator=generator)
cross_entropy(x * 1, targets, torch.full((2048,), 1 / 2048)).backward()
print(hashlib.sha256(x.grad.view(torch.uint16).numpy().tobytes()).hexdigest())
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", script]
    runs = [subprocess.run(command, env=environment, capture_output=True) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0]
    assert b"compiling" in runs[0].stderr and b"compiling" not in runs[1].stderr
    assert runs[0].stdout == runs[1].stdout
