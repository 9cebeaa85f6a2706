"""
Orca AgentInstruct: a million conversations that turn a pretrained model into a chat model.

    python prepare.py config/data_agentinstruct.py

15 splits, one per kind of task (writing, reading, code, …), 1.05 million records, about 1 billion
tokens. `messages` is a JSON string, which template=chat accepts.
Licence: CDLA-Permissive 2.0. Download: 2.4 GB, streamed. Disk: about 3 GB of shards and masks.
Time: about ten minutes on two cores, or as long as the download.
"""

data_dir = "data/agentinstruct"
sources = ("hf:microsoft/orca-agentinstruct-1M-v1",)
template = "chat"
tokenizer = "gpt2"
bad_records = "skip"
val_fraction = 0.01
