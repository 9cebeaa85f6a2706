"""
Does Muon's advantage hold for a larger model and more text? 14 million parameters, and the sources
of seven packages that requirements.txt installs, 130 MB: Muon with a third of AdamW's tokens.

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
variants = {
    "adamw": {"optimizer": "adamw", "warmup_steps": 50, "max_steps": 3000, "eval_interval": 500},
    "muon": {"max_steps": 1000, "eval_interval": 125},
}
seeds = (1, 2, 3)
