"""
FineWeb's random sample of 10 billion tokens, the training data of config/gpt2_124m.py.

    python prepare.py config/data_fineweb.py
    python train.py config/gpt2_124m.py --plan

Cleaned English web pages from Common Crawl, 14.9 million documents, 10.4 billion GPT-2 tokens.
Licence: ODC-By 1.0. Download: 31 GB, streamed and not kept. Disk: 21 GB of shards.
Time: as long as the download, or about an hour on two cores if tokenizing is slower.
"""

data_dir = "data/fineweb"
sources = ("hf:HuggingFaceFW/fineweb:sample-10BT@9bb295ddab0e05d785b879661af7260fed5140fc",)
tokenizer = "gpt2"
bad_records = "skip"
val_tokens = 100_000_000
