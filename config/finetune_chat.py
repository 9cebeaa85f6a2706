"""
Teach a checkpoint to hold conversations: the loss covers only the assistant's words.

    python prepare.py config/data_agentinstruct.py --max_documents=100_000
    python train.py config/finetune_chat.py
    python sample.py --checkpoint=out/chat --chat

Your own conversations, one {"messages": [{"role": …, "content": …}, …]} per line:

    python prepare.py --sources=talks.jsonl --template=chat --tokenizer=gpt2 --data_dir=data/talks
    python train.py config/finetune_chat.py --data_dir=data/talks

Hardware: one GPU with 16 GB.
Tokens: one epoch over the data that you prepared.
Expect: not run with OpenAI's weights yet.
"""

data_dir = "data/agentinstruct"
out_dir = "out/chat"
init_from = "gpt2"

batch_size = 32
micro_batch_size = 8
epochs = 1
optimizer = "adamw"
learning_rate = 5e-5
warmup_steps = 100
schedule = "cosine"

eval_interval = 250
log_interval = 10
