"""Messages for unknown names, bare words, failing config files and missing packages, which suggest
what was meant and what helps."""

import contextlib
import difflib
import os
import re
import shlex
import sys
import traceback
from collections.abc import Collection
from pathlib import Path
from types import TracebackType

from plaingpt.wording import shorten, shown

# Our name: the names that nanoGPT, transformers' TrainingArguments and generate(), and others use
# for it (how the meaning differs). The first line whose setting the command has applies.
OTHER_NAMES = """
sources: dataset data input input_file file files text path train_file
val_sources: val_data val_file validation_file
val_fraction: val_split val_ratio test_size validation_split (a share: 0.1 is a tenth)
text_field: column text_column
workers: num_proc num_workers threads
out_dir: output_dir output out
checkpoint: out_dir init_from model model_path model_name_or_path ckpt (its folder, or gpt2)
data_dir: out_dir output_dir output out (the folder to write)
data_dir: dataset data dataset_dir (the folder that prepare.py wrote)
init_from: resume_from_checkpoint (--init_from=resume continues the run in out_dir)
init_from: checkpoint model model_name_or_path pretrained ckpt (a checkpoint's folder, or gpt2)
n_layer: layers num_layers num_hidden_layers depth
n_head: heads num_heads num_attention_heads
n_embd: hidden_size d_model embed_dim width
block_size: n_ctx n_positions context_length seq_len max_seq_len max_seq_length max_length
micro_batch_size: gradient_accumulation_steps grad_accum_steps grad_accum (batch_size counts all \
sequences of a step; accumulation follows from it and micro_batch_size)
micro_batch_size: per_device_train_batch_size device_batch_size (sequences that a device takes at \
once; batch_size counts all sequences of a step)
max_steps: max_iters iters num_iters iterations num_steps (a step is one update of the weights, \
nanoGPT's iteration)
max_steps: lr_decay_iters (the learning rate decays until the last step; see decay_fraction)
epochs: num_train_epochs num_epochs max_epochs
learning_rate: lr max_lr
schedule: decay_lr lr_scheduler lr_scheduler_type
warmup_steps: warmup_iters num_warmup_steps
warmup_steps: warmup_ratio (a number of steps, not a share of them)
beta1: adam_beta1
beta2: adam_beta2
grad_clip: max_grad_norm
optimizer: optim
eval_tokens: eval_iters eval_batches (a number of tokens, not of batches)
eval_interval: eval_steps eval_every
patience: early_stopping early_stopping_patience
log_interval: logging_steps log_every
save_interval: save_steps save_every
keep_checkpoints: save_total_limit
tracker: report_to wandb wandb_log (--tracker=wandb)
device: cuda gpu use_cpu no_cuda (--device=cuda or --device=cpu)
dtype: bf16 fp16 precision torch_dtype (--dtype=bfloat16 or --dtype=float16)
compile: torch_compile
activation_checkpointing: gradient_checkpointing
overwrite: overwrite_output_dir force
lora_rank: lora lora_r r
lora_targets: target_modules
start: prompt text input
num_samples: n num_return_sequences
max_new_tokens: max_tokens max_length num_tokens (a number of tokens, not counting the prompt)
stop: stop_strings stop_sequences stop_words
stop_tokens: eos_token_id stop_token_ids
temperature: temp
temperature: do_sample (--temperature=0 always takes the likeliest token)
seed: random_seed
shots: num_fewshot n_shot few_shot fewshot
"""
DASHES = "-–—"  # text processors turn -- into the last two


def unknown(name: str, known: Collection[str]) -> str:
    """The message for a setting that is not one of the `known`."""
    said = f"unknown setting {shown(name)}"
    if name in ("config", "config_file"):
        return f"{said}; name the config file alone, without --{name}"
    for line in OTHER_NAMES.strip().splitlines():
        ours, _, rest = line.partition(": ")
        theirs, _, note = rest.partition(" (")
        if ours in known and name in theirs.split():
            return f"{said}; use {ours!r}" + (f" ({note}" if note else "")
    close = difflib.get_close_matches(name[:50].lower(), list(known), n=1, cutoff=0.6)
    return f"{said}; did you mean {close[0]!r}?" if close else said


def unknown_in(path: str, names: list[str], known: Collection[str]) -> list[str]:
    """The messages for settings of a config file that are not `known`: a single one if the file
    begins with the line that runs another command with it."""
    usage = rf"^ *python (\w+\.py) (\S*/)?{re.escape(os.path.basename(path))}\b"
    found = names and re.search(usage, Path(path).read_text("utf-8", "replace"), re.MULTILINE)
    if found and found[1] != os.path.basename(sys.argv[0]):
        return [f"{path} is for {found[1]}: {found[0].strip()}"]
    return [f"{path}: {unknown(name, known)}" for name in names]


def unnamed(words: list[str], known: Collection[str], given: Collection[str]) -> str:
    """The message for arguments that are neither config files nor --key=value. It says what to
    write instead, unless that setting is already `given`."""
    text = " ".join(words)
    said = f"{shown(text)} is neither a config file (*.py) nor --key=value"
    configs = (f"{words[0]}.py", f"config/{words[0]}.py")
    if config := next(filter(os.path.isfile, configs), None):
        return f"{said}; did you mean {config}?"
    name, value = words[0].lstrip(DASHES).partition("=")[0].replace("-", "_"), text
    if name in known:
        return f"{said}; did you mean --{text.lstrip(DASHES)}?"
    if "sources" in known:
        name, value = "sources", ",".join(words)
    elif "start" in known and not os.path.isdir(text):
        name, value = "start", f"FILE:{text}" if os.path.isfile(text) else text
    elif "checkpoint" in known:
        name = "checkpoint"
    elif "runs" in known:
        name, value = "runs", ",".join(words)
    elif config := similar_config(words[0]):
        return f"{said}; did you mean {config}?"
    if name in given or name not in known or len(text) > 500:  # such as the many files of a pattern
        return f"{said} (quote a value that contains spaces or *)"
    written = f"--{name}={shlex.quote(value)}"
    if name == "sources" and "data_dir" not in given:
        written += f" --data_dir={shlex.quote(f'data/{Path(words[0]).stem}')}"
    return f"{said}; write {written}"


def failure(path: str, error: BaseException) -> str:
    """The message for an exception that a config file raised: its line, kind and reason."""
    where = path
    if isinstance(error, SyntaxError) and error.lineno:
        where += f":{error.lineno}"
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == path:
            where = f"{path}:{line}"
    said = f"{where}: {type(error).__name__}"
    if isinstance(error, OSError) and error.filename == path:
        similar = similar_config(path) if isinstance(error, FileNotFoundError) else None
        return f"{where}: {error.strerror}" + (f"; did you mean {similar}?" if similar else "")
    with contextlib.suppress(Exception):  # an exception of the file's own may have no str()
        said += f": {error}".removesuffix(": ")
    return said


def similar_config(path: str) -> str | None:
    """The config file with the name most like that of `path`, in the same folder (by default
    config/); None if no name is similar enough."""
    folder = os.path.dirname(path) or "config"
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    files = {name.removesuffix(".py"): f"{folder}/{name}" for name in names if name.endswith(".py")}
    wanted = os.path.basename(path).removesuffix(".py")[:100]
    likeness = {name: difflib.SequenceMatcher(None, name, wanted).ratio() for name in files}
    closest = max(files, key=likeness.__getitem__, default="")
    return files[closest] if closest and likeness[closest] > 0.4 else None


def explain_import(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """`sys.excepthook`: a package that is missing or cannot be loaded is a line, and status 2;
    anything else keeps its traceback."""
    if not isinstance(error, ImportError) or (error.name or "").startswith(("plaingpt", "model")):
        sys.__excepthook__(kind, error, trace)
        return
    installs = f"{shlex.quote(sys.executable)} -m pip install -r requirements.txt installs"
    if isinstance(error, ModuleNotFoundError):
        said = f"{error.name} is not installed; {installs} all that plainGPT needs"
    else:  # a library that does not fit into memory, or of another version
        said = f"{shorten(str(error), 500)}; memory may be short; {installs} the tested versions"
    print(f"error: {said}", file=sys.stderr)
    sys.exit(2)
