"""
GPT-2 774M from scratch, with the batch and learning rate of GPT-3's model of that size
(arXiv 2005.14165, table 2.1) and 20 tokens per parameter (arXiv 2203.15556).

    python train.py config/gpt2_774m.py --plan
    python train.py config/gpt2_774m.py
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_774m.py

Hardware: GPUs with 80 GB, any number that divides the batch; with less memory, halve
micro_batch_size until it fits.
Tokens: 29,600 steps of 524,288 = 15.5 billion tokens of FineWeb in data/fineweb.
Expect: this file has not been run. OpenAI's own weights score 3.001 on FineWeb's validation split.
"""

data_dir = "data/fineweb"
out_dir = "out/gpt2_774m"

n_layer = 36
n_head = 20
n_embd = 1280
block_size = 1024
vocab_multiple = 64

batch_size = 512
micro_batch_size = 8
max_steps = 29_600
optimizer = "adamw"
learning_rate = 2.5e-4
warmup_steps = 700
schedule = "cosine"
weight_decay = 0.1
beta2 = 0.95

eval_interval = 250
eval_tokens = 20 * 524_288
save_interval = 1000
log_interval = 1
