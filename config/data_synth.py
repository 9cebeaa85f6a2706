"""
SYNTH: questions, reasoning and answers that models wrote from Wikipedia's vital articles.

    python prepare.py config/data_synth.py
    python prepare.py config/data_synth.py --max_tokens=100_000_000_000  # all of it
    python train.py config/gpt2_124m.py --data_dir=data/synth --plan

78 million records in 8 languages, mostly English, about 85 billion tokens; this config takes the
first 10 billion. An answer starts with its reasoning in <think>…</think>, and all of it counts in
the loss.
Licence: CC-BY 4.0. Download: 236 GB for all of it, a ninth of that for these 10 billion tokens,
streamed and not kept. Disk: 30 GB of shards and masks.
Time: as long as the download, or several hours on two cores.
"""

data_dir = "data/synth"
sources = ("hf:PleIAs/SYNTH@0d6813a2966662c39f22f0b9af28a0c1c9f7a437",)
template = "synth"
tokenizer = "gpt2"
bad_records = "skip"  # some answers are empty
max_tokens = 10_000_000_000
val_fraction = 0.01
val_tokens = 10_000_000
