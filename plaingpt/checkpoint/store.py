"""Checkpoints: saved and loaded."""

import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from configurator import UserError
from model import GPT, GPTConfig
from plaingpt import lora
from plaingpt.checkpoint.adapters import base_of, read_adapter
from plaingpt.checkpoint.folders import ADAPTER_FILES, find, is_adapter
from plaingpt.checkpoint.hugging_face import (
    config_from_hugging_face,
    config_to_hugging_face,
    from_hugging_face,
    read_weights,
    to_hugging_face,
)
from plaingpt.files import remove_leftovers, whole_or_not_at_all, write_json
from plaingpt.text.tokenizer import Tokenizer

BIAS = re.compile(r"(ln_1|ln_2|ln_f|c_attn|c_proj|c_fc)\.bias$")


def save(
    out_dir: Path,
    step: int,
    config: GPTConfig,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer,
    optimizer: dict[str, Any],
    state: dict[str, Any],
    adapter: lora.Adapter | None = None,
) -> Path:
    """Write `out_dir/step_<step>`, a new folder; return its path.

    `weights` are a model's state_dict, `optimizer` holds tensors by parameter name, `state` what
    JSON can carry. With `adapter`, `weights` are only those of its layers.
    Raises OSError where the disk does not take it all, and leaves nothing of it.
    """
    remove_leftovers(out_dir)
    folder = out_dir / f"step_{step:06d}"
    if folder.exists():  # two renames would leave a moment with neither
        raise OSError(f"{folder} is in the way of a checkpoint")
    with whole_or_not_at_all(folder) as partial:
        write_model(partial, config, weights, tokenizer, adapter)
        torch.save(optimizer, partial / "optimizer.pt")
        write_json(partial / "state.json", state)
    return folder


def write_model(
    folder: Path,
    config: GPTConfig,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer,
    adapter: lora.Adapter | None = None,
) -> None:
    """Write what `transformers` needs, or with `adapter` what peft does, into an empty folder."""
    tokenizer.save(folder)
    ids = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    metadata = {"format": "pt"}
    if adapter:
        about, file = (folder / name for name in ADAPTER_FILES)
        write_json(about, lora.to_peft(adapter))
        metadata["base_fingerprint"] = adapter.base_fingerprint or ""
        weights = {lora.PREFIX + name: tensor for name, tensor in weights.items()}
    else:
        about, file = folder / "config.json", folder / "model.safetensors"
        write_json(about, {**config_to_hugging_face(config), **ids})
        weights = to_hugging_face(weights, config)
    safetensors.torch.save_file(weights, file, metadata)
    shutil.copymode(about, file)  # else 0600
    # Without these, transformers takes the likeliest token always, and 256 of them whatever fits.
    how = {"do_sample": True, "max_new_tokens": max(config.block_size // 2, 1)}
    ids |= {"pad_token_id": tokenizer.eot_id}
    write_json(folder / "generation_config.json", ids | how)


def load(
    where: Path | str, *, block_size: int | None = None, dropout: float = 0.0, merged: bool = True
) -> tuple[GPT, Tokenizer]:
    """As `load_model`, and the tokenizer; that of its model for an adapter that comes without.

    Raises UserError, too, where the tokenizer is missing or has ids that the model has not.
    """
    folder = tokenizer_folder = find(where)
    if is_adapter(folder) and not (folder / "tokenizer.json").exists():
        tokenizer_folder = find(base_of(folder, read_adapter(folder)[0]))
    tokenizer = Tokenizer.load(tokenizer_folder)
    model = load_model(folder, block_size=block_size, dropout=dropout, merged=merged)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} ids, the model only "
            f"{model.config.vocab_size:,}"
        )
    return model, tokenizer


def load_model(
    where: Path | str, *, block_size: int | None = None, dropout: float = 0.0, merged: bool = True
) -> GPT:
    """Open a checkpoint of ours or a Hugging Face GPT-2 folder as a float32 GPT on the CPU.

    `block_size` may be shorter than the checkpoint's; the later positions are not read. The model
    of a folder with an adapter has it `merged`, or added to its layers.
    Raises UserError for a folder that is no GPT-2, or whose weights are damaged or do not match.
    """
    folder = find(where)
    if is_adapter(folder):
        return load_adapted(folder, block_size, dropout, merged)
    config = config_from_hugging_face(folder, block_size, dropout)
    saved = read_weights(folder)
    if not config.bias and any(saved[name].any() for name in saved if BIAS.search(name)):
        config = replace(config, bias=True)  # trained elsewhere since, where biases always are
    weights = from_hugging_face(saved, config, folder)
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"{folder} holds weights that are not finite numbers")
    return with_weights(config, weights)


def with_weights(config: GPTConfig, weights: dict[str, Tensor]) -> GPT:
    """A model that has these tensors as its own, without a copy."""
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(weights, assign=True)
    if config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def load_adapted(folder: Path, block_size: int | None, dropout: float, merged: bool) -> GPT:
    """The model that an adapter is for, with the adapter."""
    adapter, tensors = read_adapter(folder)
    base = find(base_of(folder, adapter))
    if is_adapter(base):
        raise UserError(f"{folder} is an adapter for another adapter, {base}")
    model = load_model(base, block_size=block_size, dropout=dropout)
    if adapter.base_fingerprint not in (None, lora.fingerprint(model)):
        raise UserError(f"{folder} is an adapter for other weights than those of {base}")
    try:
        lora.add(model, adapter.config, seed=0)
        lora.load(model, tensors)
    except ValueError as error:
        raise UserError(f"{folder} is no adapter for {base}: {error}") from None
    if merged:
        lora.merge(model)
    return model


def read_optimizer(folder: Path) -> dict[str, Any]:
    """Raises UserError for a file that is damaged, or that a pickle with code was put into."""
    path = folder / "optimizer.pt"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no optimizer.pt: it can start a run, not resume one"
        ) from None
    except Exception as error:  # what a damaged pickle raises is anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0].partition(". ")[0]
        raise UserError(f"{path} is damaged, or holds code: not loaded ({reason})") from None
    if not isinstance(saved, dict) or not {"parameters", "scaler"} <= saved.keys():
        raise UserError(f"{path} is no optimizer file of train.py")
    return saved
