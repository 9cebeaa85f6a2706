"""
Continue pretraining GPT-2 on one text: tiny Shakespeare.

    python prepare.py config/data_shakespeare_gpt2.py
    python train.py config/finetune_shakespeare.py
    python sample.py --checkpoint=out/shakespeare_gpt2 --start "ROMEO:"

Text: as in config/shakespeare_cpu.py. Hardware: one GPU with 16 GB, or a CPU and patience.
Tokens: 3 epochs over 0.3 million tokens.
Expect: not run with OpenAI's weights yet; nanoGPT reports a validation loss of 2.8 to 2.9 when it
starts from gpt2-xl.
"""

data_dir = "data/shakespeare_gpt2"
out_dir = "out/shakespeare_gpt2"
init_from = "gpt2"

micro_batch_size = 2
epochs = 3
optimizer = "adamw"
learning_rate = 3e-5
schedule = "cosine"
dropout = 0.1

eval_interval = 40
log_interval = 5
