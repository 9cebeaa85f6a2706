"""--help answers at once: it does not import torch, which takes a second."""

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("prepare.py", "  --data_dir "),
        ("train.py", "  --plan "),
        ("sample.py", "  --temperature "),
        ("-m tools.eval", "  --limit "),
        ("-m tools.serve", "  --port "),
        ("-m tools.export", "  --push_to_hub "),
        ("-m tools.bench", "    python -m tools.bench train "),
        ("-m tools.bench prepare", "  --corpus_mb "),
        ("-m tools.bench train", "  --nanogpt "),
        ("-m tools.bench train --repeats=2", "  --nanogpt "),
        ("-m tools.bench --repeats=2", "    python -m tools.bench train "),
        ("examples/hf_trainer.py", "    python examples/hf_trainer.py "),
        ("examples/to_gguf.py", "    python examples/to_gguf.py "),
    ],
)
def test_help_is_printed_without_torch(command, line):
    arguments = [sys.executable, "-X", "importtime", *command.split(), "--help"]
    done = subprocess.run(arguments, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and f"\n{line}" in done.stdout
    imported = {entry.rpartition("|")[2].strip() for entry in done.stderr.splitlines()}
    assert len(imported) > 20 and not {"torch", "transformers"} & imported
