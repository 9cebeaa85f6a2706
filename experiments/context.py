"""
The length of the context: as many tokens per step in shorter or longer sequences.

    python -m tools.experiment experiments/context.py
"""

setup = ("python prepare.py",)
base = {"data_dir": "data/stdlib", "max_steps": 600, "eval_interval": 150}
variants = {
    "256": {"block_size": 256, "batch_size": 8},
    "64": {"block_size": 64, "batch_size": 32},
    "128": {"block_size": 128, "batch_size": 16},
    "512": {"block_size": 512, "batch_size": 4},
}
seeds = (1, 2, 3)
