"""
LoRA's rank: the quick start's model, which has read Python, learns the English of Python's
reference (half a megabyte, part of the interpreter) with all of its weights, or with adapters.

    python -m tools.experiment experiments/lora_rank.py
"""

_write_text = """
import json, pathlib, pydoc_data.topics as found
path = pathlib.Path('data/topics.jsonl')
lines = [json.dumps(dict(text=text)) for text in found.topics.values()]
path.write_text(chr(10).join(lines))
"""
setup = (
    "python prepare.py",
    f'python -c "{_write_text}"',
    "python prepare.py --sources=data/topics.jsonl --tokenizer=data/stdlib --data_dir=data/topics "
    "--val_fraction=0.2",
    "python train.py --out_dir=out/experiments/stdlib --keep_checkpoints=1 --max_steps=1500",
)
base = {
    "init_from": "out/experiments/stdlib",
    "data_dir": "data/topics",
    "max_steps": 200,
    "eval_interval": 50,
}
variants = {"all_weights": {"learning_rate": 0.003}} | {
    f"rank_{rank}": {"lora_rank": rank, "lora_alpha": rank, "learning_rate": 0.03}
    for rank in (1, 4, 16, 64)
}
seeds = (1, 2, 3)
