"""
Dropout on little text: 2 and 8 epochs of 200,000 tokens.

    python -m tools.experiment experiments/dropout_epochs.py
"""

setup = (
    "python prepare.py",
    "python prepare.py --tokenizer=data/stdlib --data_dir=data/stdlib_small --max_tokens=250_000 "
    "--val_fraction=0.2",
)
base = {"data_dir": "data/stdlib_small"}
variants = {
    f"{epochs}_epochs,dropout={dropout}": {
        "dropout": dropout,
        "max_steps": 98 * epochs,  # of 2,048 tokens
        "eval_interval": 98 * epochs // 4,
    }
    for epochs in (2, 8)
    for dropout in (0.0, 0.1, 0.2)
}
seeds = (1, 2, 3)
