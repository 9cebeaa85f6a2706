"""
Sequences per step and learning rate, for the same 0.6 million tokens.

    python -m tools.experiment experiments/batch_and_rate.py
"""

setup = ("python prepare.py",)
base = {"data_dir": "data/stdlib"}
variants = {
    f"{batch}_at_{rate}": {
        "batch_size": batch,
        "learning_rate": rate,
        "max_steps": 2400 // batch,
        "eval_interval": 600 // batch,
    }
    for batch in (8, 4, 16)
    for rate in (0.01, 0.005, 0.02)
}
seeds = (1, 2, 3)
