"""
TinyStories: short stories in a small child's vocabulary, simple enough for small models.

    python prepare.py config/data_tinystories.py
    python train.py --data_dir=data/tinystories --out_dir=out/tinystories --plan

2.1 million stories by GPT-3.5 and GPT-4, 1.9 GB, about 0.5 billion tokens, with a validation split.
Licence: CDLA-Sharing 1.0. Download: 1.0 GB, streamed. Disk: about 1 GB of shards.
Time: a few minutes on two cores, or as long as the download.
"""

_stories = "hf:roneneldan/TinyStories@f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"

data_dir = "data/tinystories"
sources = (_stories,)
val_sources = (_stories + "#validation",)
bad_records = "skip"  # some stories are empty
