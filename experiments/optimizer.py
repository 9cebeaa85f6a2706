"""
Muon or AdamW, each at its best rate, and how much of the difference is due to the embeddings, which
AdamW trains in both: with Muon at a rate of 0.015, or here also at AdamW's own.

    python -m tools.experiment experiments/optimizer.py
"""

setup = ("python prepare.py",)
base = {"data_dir": "data/stdlib", "max_steps": 600, "eval_interval": 150}
_adamw = {"optimizer": "adamw", "learning_rate": 0.002, "warmup_steps": 20}
variants = {
    "muon": {"optimizer": "muon", "learning_rate": 0.01},
    "muon_embeddings_0.002": {
        "optimizer": "muon",
        "learning_rate": 0.01,
        "embedding_lr_scale": 0.2,
    },
    "adamw": _adamw,
    "adamw_twice_the_steps": {**_adamw, "max_steps": 1200, "eval_interval": 300},
    "adamw_beta2_0.95": {**_adamw, "beta2": 0.95},
    "adamw_0.001": {**_adamw, "learning_rate": 0.001},
    "adamw_0.004": {**_adamw, "learning_rate": 0.004},
}
seeds = (1, 2, 3)
