#!/bin/sh
# From nothing to a model that answers questions about Python's standard library, on two cores and
# without a network:
#
#     sh runs/speedrun.sh
#
# It pretrains on the sources of the library, makes questions from their docstrings, trains on those
# about nine names in ten, and asks for these and for the others. An earlier run is replaced.
# docs/speedrun.md explains it.
set -eu
cd "$(dirname "$0")/.."
set -x

# pretrain on the sources of the standard library
python prepare.py
python train.py --out_dir=out/speedrun --overwrite --n_layer=4 --n_head=4 --n_embd=192 --max_steps=2800
python -m tools.eval --checkpoint=out/speedrun

# train on questions about it
python runs/make_instructions.py data/questions
python prepare.py --sources=data/questions/taught.jsonl --val_sources=data/questions/held_out.jsonl \
    --template=chat --tokenizer=out/speedrun --data_dir=data/taught --overwrite
python train.py --init_from=out/speedrun --data_dir=data/taught --out_dir=out/speedrun_chat --overwrite \
    --learning_rate=5e-3 --epochs=1

# ask the questions that were held out, then some that were taught: the splits change places
python -m tools.eval --checkpoint=out/speedrun_chat --data_dir=data/taught --tasks=perplexity,answers
python prepare.py --sources=data/questions/held_out.jsonl --val_sources=data/questions/taught.jsonl \
    --template=chat --tokenizer=out/speedrun --data_dir=data/taught_again --overwrite
python -m tools.eval --checkpoint=out/speedrun_chat --data_dir=data/taught_again --tasks=answers --limit=400

# a conversation: three questions that were taught, three that were held out
printf '%s\n' 'What does shutil.rmtree do?' 'What is the signature of textwrap.dedent?' \
    'Which module has heappush?' 'What does re.compile do?' 'What is the signature of re.compile?' \
    'Which module has deque?' |
    python sample.py --checkpoint=out/speedrun_chat --chat --temperature=0 --max_new_tokens=60
if [ -t 0 ]; then
    python sample.py --checkpoint=out/speedrun_chat --chat --temperature=0 --max_new_tokens=60
fi
