"""
AdamW's beta2, which Muon leaves to the embeddings, biases and LayerNorms: a step of the quick start
sees most tokens of the vocabulary rarely, and a longer memory averages their gradients.

    python -m tools.experiment experiments/beta2.py
"""

setup = ("python prepare.py",)
base = {"data_dir": "data/stdlib", "max_steps": 600, "eval_interval": 150}
variants = {f"{beta2}": {"beta2": beta2} for beta2 in (0.95, 0.99, 0.999)}
seeds = (1, 2, 3)
