"""
Six sizes of GPT-2, from 0.15 to 5 million parameters, after the same 0.6 million tokens, and what
their losses promise for 124 million.

    python -m tools.experiment experiments/size.py
"""

import textwrap

setup = ("python prepare.py",)
base = {"data_dir": "data/stdlib", "max_steps": 300, "eval_interval": 75}
variants = {  # layers × width
    "1x32": {"n_layer": 1, "n_head": 1, "n_embd": 32},
    "1x64": {"n_layer": 1, "n_head": 1, "n_embd": 64},
    "2x96": {"n_layer": 2, "n_head": 2, "n_embd": 96},
    "3x128": {"n_layer": 3, "n_head": 2, "n_embd": 128},
    "4x192": {"n_layer": 4, "n_head": 3, "n_embd": 192},
    "5x256": {"n_layer": 5, "n_head": 4, "n_embd": 256},
}
seeds = (1, 2, 3)


def summary(results):
    """The law L = E + A / N^a, where N counts all parameters, fitted to the runs of each seed."""
    fits = []
    for seed in seeds:
        points = [(run.parameters, run.loss) for run in results if run.seed == seed]
        fits.append(_fit(*zip(*points)))
    limits, factors, powers, errors = zip(*fits)
    at_124m = [e + f * 124e6**-p for e, f, p in zip(limits, factors, powers)]
    beyond = 124e6 / max(run.parameters for run in results)
    text = (
        f"L = E + A / N^a, fitted to the sizes of each seed: E = {_range(limits, 2)}, "
        f"A = {_range(factors, 1)}, a = {_range(powers, 2)}; no loss is further than "
        f"{max(errors):.3f} from its curve. After the same tokens, 124 million parameters would "
        f"reach {_range(at_124m, 2)}, an extrapolation to {beyond:.0f} times the largest size."
    )
    return textwrap.fill(text, 100)


def _fit(sizes, losses):
    """E, A and a with the least squares, and the largest error: for every a, a line in N^-a."""
    import numpy as np

    sizes, losses = np.array(sizes, float), np.array(losses)
    best = None
    for power in np.linspace(0.02, 1.5, 149):
        terms = np.stack([np.ones_like(sizes), sizes**-power], axis=1)
        solution = np.linalg.lstsq(terms, losses, rcond=None)[0]
        errors = np.abs(terms @ solution - losses)
        if best is None or (errors**2).sum() < best[0]:
            best = (errors**2).sum(), (*solution, power, errors.max())
    return best[1]


def _range(values, digits):
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
