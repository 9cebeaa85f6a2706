"""
Instructions in Alpaca's form, from a file of your own or from Stanford's.

    python prepare.py config/data_alpaca.py
    python prepare.py config/data_alpaca.py --sources=instruction-data.json --data_dir=data/mine

A record has `instruction`, `input` (may be empty) and `output`; only the output counts in the loss.
Stanford's 52,002 records were made with text-davinci-003, about 5 million tokens.
Licence: CC-BY-NC 4.0. Download: 24 MB. Disk: 20 MB, shards and masks. Time: seconds.
"""

data_dir = "data/alpaca"
sources = ("hf:tatsu-lab/alpaca@dce01c9b08f87459cf36a430d809084718273017",)
template = "alpaca"
tokenizer = "gpt2"
bad_records = "skip"  # some outputs are empty
