"""
OpenWebText, the open reproduction of GPT-2's training data, from its Parquet files.

    python prepare.py config/data_openwebtext.py
    python train.py config/gpt2_124m.py --data_dir=data/openwebtext --plan

8.0 million pages that Reddit linked to, 9.0 billion GPT-2 tokens.
Licence: CC0 for the collection. Download: 24 GB, streamed and not kept. Disk: 18 GB of shards.
Time: as long as the download, or about an hour on two cores if tokenizing is slower.
"""

data_dir = "data/openwebtext"
sources = ("hf:Skylion007/openwebtext@b4325f019c648b1641a1784748667e8b74e5e064",)
tokenizer = "gpt2"
bad_records = "skip"
val_fraction = 0.0005  # as in nanoGPT
