"""
OpenWebText, the open copy of what GPT-2 was trained on, from its parquet files.

    python prepare.py config/data_openwebtext.py
    python train.py config/gpt2_124m.py --data_dir=data/openwebtext --plan

8.0 million pages that Reddit linked to, 9.0 billion GPT-2 tokens.
Licence: CC0 for the collection. Download: 24 GB, streamed, none of it kept. Disk: 18 GB of shards.
Time: the download's, or about an hour on two cores, where tokenizing takes longer.
"""

data_dir = "data/openwebtext"
sources = ("hf:Skylion007/openwebtext@b4325f019c648b1641a1784748667e8b74e5e064",)
tokenizer = "gpt2"
bad_records = "skip"
val_fraction = 0.0005  # as nanoGPT's
