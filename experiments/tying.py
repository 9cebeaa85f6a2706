"""
One matrix for the token embedding and the head, as in GPT-2, or two.

    python -m tools.experiment experiments/tying.py
"""

setup = ("python prepare.py",)
base = {"data_dir": "data/stdlib", "max_steps": 600, "eval_interval": 150}
variants = {"tied": {"tie_weights": True}, "untied": {"tie_weights": False}}
seeds = (1, 2, 3)
