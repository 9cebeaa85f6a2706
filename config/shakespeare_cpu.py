"""
Tiny Shakespeare in bytes, at the size of nanoGPT's CPU recipe.

    python prepare.py config/data_shakespeare.py --sources=input.txt
    python train.py config/shakespeare_cpu.py
    python sample.py --checkpoint=out/shakespeare --start "ROMEO:"

Text: nine tenths of tiny Shakespeare; the last tenth is for validation. Hardware: a laptop.
Tokens: 225 steps of 1,536 = 0.35 million.
Expect: a validation loss of about 1.87 nats per byte; docs/benchmarks.md compares it with nanoGPT.
"""

data_dir = "data/shakespeare"
out_dir = "out/shakespeare"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False

batch_size = 24
max_steps = 225
learning_rate = 0.02
embedding_lr_scale = 0.3
momentum = 0.8
beta2 = 0.95
grad_clip = 0.0

eval_interval = 225
sample_interval = 0
