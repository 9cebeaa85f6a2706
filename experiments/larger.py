"""
Does Muon's advantage hold for a larger model and more text? 14 million parameters, and the sources
of seven packages that requirements.txt installs, 130 MB: Muon with a third of AdamW's tokens.
Runs of 500 steps find AdamW's rate.

    python -m tools.experiment experiments/larger.py

An AdamW run takes about an hour on two cores.
"""

import sysconfig

_packages = ("torch", "sympy", "pandas", "numba", "numpy", "matplotlib", "networkx")
_sources = ",".join(f"{sysconfig.get_path('purelib')}/{name}/**/*.py" for name in _packages)
setup = (
    f"python prepare.py --sources='{_sources}' --vocab_size=8192 --val_tokens=200_000 "
    "--data_dir=data/packages",
)
base = {
    "data_dir": "data/packages",
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "batch_size": 16,
}
_adamw = {"optimizer": "adamw", "learning_rate": 0.001, "warmup_steps": 50}
_short = {**_adamw, "max_steps": 500, "eval_interval": 250}
variants = {
    "adamw": {**_adamw, "max_steps": 3000, "eval_interval": 500},
    "muon": {"max_steps": 1000, "eval_interval": 125},
    "adamw_500_steps": _short,
    "adamw_500_steps_0.0005": {**_short, "learning_rate": 0.0005},
    "adamw_500_steps_0.002": {**_short, "learning_rate": 0.002},
}
seeds = (1, 2, 3)
