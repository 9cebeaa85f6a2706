"""
The quick start with three seeds: the figures of the README.

    python -m tools.experiment experiments/quick_start.py
"""

setup = ("python prepare.py",)
base = {"data_dir": "data/stdlib", "max_steps": 1750, "eval_interval": 250}
variants = {"quick_start": {}}
seeds = (1337, 1, 2)
