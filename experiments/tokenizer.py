"""
Bytes, BPEs of 1,024, 4,096 and 16,384 tokens, and GPT-2's own tokenizer: the same model after the
same amount of text, about 0.9 MB, in bits per byte.

    python -m tools.experiment experiments/tokenizer.py

GPT-2's tokenizer needs the network once, or TIKTOKEN_CACHE_DIR. Its runs take some minutes each,
most of it for the probabilities of 50,257 tokens.
"""

setup = (
    "python prepare.py --tokenizer=bytes --data_dir=data/stdlib_bytes",
    "python prepare.py --vocab_size=1024 --data_dir=data/stdlib_1k",
    "python prepare.py --data_dir=data/stdlib",
    "python prepare.py --vocab_size=16384 --data_dir=data/stdlib_16k",
    "python prepare.py --tokenizer=gpt2 --data_dir=data/stdlib_gpt2",
)
_text = 0.9e6  # bytes
_step = 2048  # tokens


def _on(data_dir, bytes_per_token):
    steps = round(_text / bytes_per_token / _step)
    return {"data_dir": data_dir, "max_steps": steps, "eval_interval": -(-steps // 4)}


variants = {
    "bytes": _on("data/stdlib_bytes", 1.0),
    "bpe_1k": _on("data/stdlib_1k", 2.71),
    "bpe_4k": _on("data/stdlib", 3.60),
    "bpe_16k": _on("data/stdlib_16k", 4.15),
    "gpt2": _on("data/stdlib_gpt2", 2.22),
}
seeds = (1, 2, 3)
