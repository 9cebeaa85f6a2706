"""The notebook runs from its first cell to its last."""

import json
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tour.ipynb"
SIZES = "MAX_TOKENS, VOCAB_SIZE, MAX_STEPS = 800_000, 2048, 300"
SMALL = "MAX_TOKENS, VOCAB_SIZE, MAX_STEPS = 60_000, 300, 2"


def test_every_cell_runs_in_turn(tmp_path, monkeypatch, capsys):
    """With less data, a smaller vocabulary and fewer steps; in one namespace, as in a notebook."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum(SIZES in source for source in sources) == 1
    space: dict = {}
    for number, source in enumerate(sources):
        exec(compile(source.replace(SIZES, SMALL), f"cell {number}", "exec"), space)
    out = capsys.readouterr().out
    for said in ("bytes per token", "loss: 5.7", "step 2/2", "--- temperature 1.5"):
        assert said in out
    assert (tmp_path / "out/tour/step_000002/model.safetensors").exists()
