"""
Teach a checkpoint to follow instructions: Alpaca's form; the loss covers only the answers.

    python prepare.py config/data_alpaca.py
    python train.py config/finetune_instruct.py
    python sample.py --checkpoint=out/instruct --chat

Your own checkpoint, on data prepared with its tokenizer:

    python prepare.py config/data_alpaca.py --sources=mine.json --tokenizer=out/stdlib/step_001750 \
        --data_dir=data/mine
    python train.py config/finetune_instruct.py --init_from=out/stdlib --data_dir=data/mine \
        --learning_rate=1e-2 --epochs=10

Hardware: one GPU with 16 GB; a CPU takes hours for GPT-2, minutes for the quick start's model.
Tokens: 3 epochs over the 5 million tokens of Stanford's 52,002 records.
Expect: not run with OpenAI's weights yet; docs/finetuning.md has figures for a small model.
"""

data_dir = "data/alpaca"
out_dir = "out/instruct"
init_from = "gpt2"

batch_size = 32
micro_batch_size = 8
epochs = 3
optimizer = "adamw"
learning_rate = 5e-5  # at most a tenth of pretraining's, which would erase what the model knows
warmup_steps = 20
schedule = "cosine"
dropout = 0.1

eval_interval = 100
log_interval = 10
