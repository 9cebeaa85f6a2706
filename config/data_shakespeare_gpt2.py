"""
Tiny Shakespeare in GPT-2's tokens, from local files: the data of config/finetune_shakespeare.py.

    python prepare.py config/data_shakespeare_gpt2.py
    python train.py config/finetune_shakespeare.py

train.txt and val.txt are the first 90% and the rest of input.txt of Karpathy's char-rnn, as nanoGPT
splits it.
Licence: public domain. Disk: 1 MB of shards. Time: a second.
"""

data_dir = "data/shakespeare_gpt2"
sources = ("train.txt",)
val_sources = ("val.txt",)
tokenizer = "gpt2"
