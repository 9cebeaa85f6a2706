"""What commands answer before they run: help, at once, and which package is missing."""

import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
NAMES = ("eval", "export", "serve", "bench", "compare", "experiment", "pairs", "figures")
TOOLS = [f"tools/{name}" for name in NAMES]


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("prepare.py", "  --data_dir "),
        ("train.py", "  --plan "),
        ("sample.py", "  --temperature "),
        ("-m tools.eval", "  --limit "),
        ("-m tools.serve", "  --port "),
        ("-m tools.export", "  --push_to_hub "),
        ("-m tools.compare", "  --runs "),
        ("-m tools.experiment", "  --variants "),
        ("-m tools.pairs", "  --read "),
        ("-m tools.figures", "  --text "),
        ("-m tools.bench", "    python -m tools.bench train "),
        ("-m tools.bench prepare", "  --corpus_mb "),
        ("-m tools.bench train", "  --nanogpt "),
        ("-m tools.bench sample", "  --new_tokens "),
        ("-m tools.bench train --repeats=2", "  --nanogpt "),
        ("-m tools.bench --repeats=2", "    python -m tools.bench train "),
        ("tools/eval.py", "  --limit "),
        ("tools/serve.py", "  --port "),
        ("tools/export.py", "  --push_to_hub "),
        ("tools/pairs.py", "  --read "),
        ("tools/bench.py train", "  --nanogpt "),
        ("examples/hf_trainer.py", "    python examples/hf_trainer.py "),
        ("examples/to_gguf.py", "    python examples/to_gguf.py "),
        ("runs/make_instructions.py", "    python runs/make_instructions.py "),
    ],
)
def test_help_is_printed_without_torch(command, line):
    """It does not import torch, which takes a second."""
    arguments = [sys.executable, "-E", "-X", "importtime", *command.split(), "--help"]
    done = subprocess.run(arguments, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and f"\n{line}" in done.stdout
    imported = {entry.rpartition("|")[2].strip() for entry in done.stderr.splitlines()}
    assert len(imported) > 20 and not {"torch", "transformers"} & imported


@pytest.mark.parametrize(
    ("command", "package"),
    [
        ("prepare.py", "msgspec"),
        ("train.py", "torch"),
        ("sample.py", "torch"),
        ("-m tools.eval", "torch"),
        ("-m tools.pairs", "msgspec"),
        ("-m tools.bench", "numpy"),
        ("tools/export.py", "torch"),
    ],
)
def test_a_missing_package_is_one_line(command, package):
    arguments = [sys.executable, "-ES", *command.split()]  # without any packages
    done = subprocess.run(arguments, cwd=REPO, capture_output=True, text=True)
    installs = f"{sys.executable} -m pip install -r requirements.txt"
    said = f"error: {package} is not installed; {installs} installs all that plainGPT needs\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.parametrize("name", ["prepare", "train", "sample", *TOOLS])
def test_ctrl_c_ends_the_slow_imports_without_a_traceback(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            runpy.run_path(str(REPO / f"{name}.py"), run_name="__main__")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_older_python_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 6))
    with pytest.raises(SystemExit, match=r"^error: plainGPT needs Python 3\.10 or newer, not "):
        runpy.run_path(str(REPO / "plaingpt" / "__init__.py"))
