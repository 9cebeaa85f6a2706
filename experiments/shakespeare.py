"""
Tiny Shakespeare with the model of config/shakespeare_cpu.py, in bytes and with a BPE of 2,048 ids.

    python -m tools.experiment experiments/shakespeare.py

train.txt and val.txt are the first 1,003,854 and the last 111,540 bytes of the text
(docs/benchmarks.md).
"""

import runpy
from pathlib import Path

setup = (
    "python prepare.py --sources=train.txt --val_sources=val.txt --tokenizer=bytes "
    "--data_dir=data/shakespeare_split",
    "python prepare.py --sources=train.txt --val_sources=val.txt --vocab_size=2048 "
    "--data_dir=data/shakespeare_bpe",
)
_config = runpy.run_path(str(Path(__file__).parents[1] / "config" / "shakespeare_cpu.py"))
base = {name: value for name, value in _config.items() if not name.startswith("_")}
del base["out_dir"]
_bpe = {"data_dir": "data/shakespeare_bpe", "max_steps": 60}
_bytes = {"data_dir": "data/shakespeare_split"}
variants = {
    "bytes": _bytes,
    "bytes_embeddings_at_1": {**_bytes, "embedding_lr_scale": 1.0},
    "bpe": {**_bpe, "embedding_lr_scale": 1.0},
    "bpe_embeddings_at_0.3": _bpe,
}
seeds = (1, 2, 3)
