"""
GPT-2 124M from scratch, with the batch, schedule and learning rate of llm.c's reproduction.

    python train.py config/gpt2_124m.py --plan
    python train.py config/gpt2_124m.py
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py

Hardware: GPUs with 24 GB or more (the plan's estimate); any number that divides the batch. With
less memory, halve micro_batch_size until it fits.
Tokens: 19,073 steps of 524,288 = 10.0 billion, one pass over 10B tokens of FineWeb in data/fineweb.
Expect: llm.c reports a validation loss of 3.28 to 3.29 after about 90 minutes on 8 A100s; this file
has not been run to the end. OpenAI's own weights score 3.425 on the same data.
"""

data_dir = "data/fineweb"
out_dir = "out/gpt2_124m"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_multiple = 64

batch_size = 512
micro_batch_size = 16
max_steps = 19_073
optimizer = "adamw"
learning_rate = 6e-4
warmup_steps = 700
schedule = "cosine"
weight_decay = 0.1
beta2 = 0.95

eval_interval = 250
eval_tokens = 20 * 524_288
save_interval = 1000
log_interval = 1
