"""
Tiny Shakespeare in bytes, from a local file: the training data of config/shakespeare_cpu.py.

    python prepare.py config/data_shakespeare.py --sources=input.txt
    python train.py config/shakespeare_cpu.py

The file is input.txt of Karpathy's char-rnn, 1,115,394 bytes; its last tenth is the validation
split.
Licence: public domain. Disk: 2 MB of shards. Time: a second.
"""

data_dir = "data/shakespeare"
sources = ("input.txt",)
tokenizer = "bytes"
val_fraction = 0.1
