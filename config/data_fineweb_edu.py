"""
FineWeb-Edu's random sample of 10 billion tokens: pages that a classifier rates as educational.

    python prepare.py config/data_fineweb_edu.py
    python train.py config/gpt2_124m.py --data_dir=data/fineweb_edu --plan

9.7 million documents, 10.0 billion GPT-2 tokens.
Licence: ODC-By 1.0. Download: 29 GB, streamed and not kept. Disk: 20 GB of shards.
Time: as long as the download, or about an hour on two cores if tokenizing is slower.
"""

data_dir = "data/fineweb_edu"
sources = ("hf:HuggingFaceFW/fineweb-edu:sample-10BT@87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",)
tokenizer = "gpt2"
bad_records = "skip"
val_tokens = 100_000_000
