"""Checkpoints: saving and loading them."""

import re
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from configurator import UserError
from model import GPT, GPTConfig
from plaingpt import lora
from plaingpt.checkpoint import adapters
from plaingpt.checkpoint.folders import ADAPTER_WEIGHTS, State, find, is_adapter
from plaingpt.checkpoint.hugging_face import (
    check_finite,
    from_file_layout,
    read_config,
    read_weights,
    to_config_json,
    to_file_layout,
    weight_files,
    write_tensors,
)
from plaingpt.checksums import check_sum, write_sums
from plaingpt.files import as_record, atomic_folder, size_of, write_json
from plaingpt.text.tokenizer import Tokenizer

MAX_ENTRIES = 100_000  # in optimizer.pt; a model of MAX_LAYERS has fewer
BIAS = re.compile(r"(ln_1|ln_2|ln_f|c_attn|c_proj|c_fc)\.bias$")


@dataclass(frozen=True)
class Snapshot:
    """What a step folder holds."""

    config: GPTConfig
    weights: dict[str, Tensor]  # as `GPT.weights` returns them; with an adapter, only its own
    tokenizer: Tokenizer
    optimizer: dict[str, Any]  # tensors by parameter name
    state: State
    adapter: lora.Adapter | None = None


Moments = Annotated[dict[str, Tensor], msgspec.Meta(max_length=3)]


class OptimizerFile(msgspec.Struct, frozen=True):
    """The content of optimizer.pt."""

    parameters: dict[str, Moments]  # by parameter name
    scaler: dict[str, float]  # of torch.amp.GradScaler; {} except in float16


def save(out_dir: Path, snapshot: Snapshot) -> Path:
    """Write `out_dir/step_<step>`, a new folder; return its path.

    Raises OSError if the folder exists or the disk refuses the files, and leaves none of them
    behind.
    """
    folder = out_dir / f"step_{snapshot.state.step:06d}"
    if folder.exists():  # replacing it takes two renames, with a moment when neither is there
        raise OSError(f"could not save a checkpoint: {folder} already exists")
    with atomic_folder(folder) as partial:
        write_model(
            partial, snapshot.config, snapshot.weights, snapshot.tokenizer, snapshot.adapter
        )
        write_optimizer(partial, snapshot.optimizer)
        write_json(partial / "state.json", snapshot.state)
        write_sums(partial)
    return folder


def write_model(
    folder: Path,
    config: GPTConfig,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer,
    adapter: lora.Adapter | None = None,
) -> None:
    """Write the files that `transformers` needs, or with `adapter` those that peft needs, into an
    empty folder."""
    tokenizer.save(folder)
    ids = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    if adapter:
        adapters.write_adapter(folder, adapter, weights)
    else:
        write_json(folder / "config.json", to_config_json(config) | ids)
        file_weights = to_file_layout(weights, config)
        write_tensors(folder / "model.safetensors", file_weights, {"format": "pt"})
    # Without these, transformers always picks the likeliest token, and 256 of them even if the
    # context is shorter.
    defaults = {"do_sample": True, "max_new_tokens": max(config.block_size // 2, 1)}
    ids |= {"pad_token_id": tokenizer.eot_id}
    write_json(folder / "generation_config.json", ids | defaults)


def load(
    where: Path | str, *, block_size: int | None = None, dropout: float = 0.0, merged: bool = True
) -> tuple[GPT, Tokenizer]:
    """Like `load_model`, with the tokenizer.

    Also raises UserError if the tokenizer is missing or has more ids than the model.
    """
    folder = find(where)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, block_size=block_size, dropout=dropout, merged=merged)
    check_vocabulary(folder, tokenizer, model.config)
    return model, tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint; an adapter without its own uses that of its base."""
    if is_adapter(folder) and not (folder / "tokenizer.json").exists():
        folder = adapters.base_folder(folder, adapters.describe(folder))
    return Tokenizer.load(folder)


def check_vocabulary(folder: Path, tokenizer: Tokenizer, config: GPTConfig) -> None:
    """Raises UserError if a checkpoint's tokenizer has more ids than its model."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} ids, the model only "
            f"{config.vocab_size:,}"
        )


def load_model(
    where: Path | str, *, block_size: int | None = None, dropout: float = 0.0, merged: bool = True
) -> GPT:
    """Open a checkpoint or any Hugging Face GPT-2 folder as a float32 GPT on the CPU.

    `block_size` may be shorter than the checkpoint's; the later positions are left out. An adapter
    is opened with its base, `merged` into it or as separate layers.
    Raises UserError for a folder that is not a GPT-2, and for damaged or mismatched weights.
    """
    folder = find(where)
    if not is_adapter(folder):
        return load_plain(folder, block_size, dropout)
    adapter, tensors = adapters.read_adapter(folder)
    base = adapters.base_folder(folder, adapter)
    model = load_plain(base, block_size, dropout)
    if adapter.base_fingerprint not in (None, lora.fingerprint(model)):
        raise UserError(f"{folder} is an adapter for other weights than those of {base}")
    try:
        adapters.add_adapter(model, adapter, tensors)
    except UserError as error:
        file = folder / ADAPTER_WEIGHTS
        raise UserError(f"{file} is not an adapter for {base}: {error}") from None
    if merged:
        lora.merge(model)
        check_finite(model.weights(), folder / ADAPTER_WEIGHTS)
    return model


def load_plain(folder: Path, block_size: int | None, dropout: float) -> GPT:
    """The model of a folder that is not an adapter."""
    config, files = read_config(folder, block_size, dropout), weight_files(folder)
    saved = read_weights(folder)
    if not config.bias and any(saved[name].any() for name in saved if BIAS.search(name)):
        config = replace(config, bias=True)  # since trained elsewhere, where biases always train
    return GPT.from_weights(config, from_file_layout(saved, config, files[0]))


def write_optimizer(folder: Path, optimizer: dict[str, Any]) -> None:
    """Raises OSError if the disk refuses the file."""
    try:
        with (folder / "optimizer.pt").open("wb") as file:
            torch.save(optimizer, file)
    except RuntimeError as error:  # torch's, about the error of the disk
        raise OSError(str(error.__context__ or error)) from error


def read_optimizer(folder: Path) -> dict[str, Any]:
    """The content of optimizer.pt. Raises UserError if it is missing or damaged, or is a pickle
    with code in it."""
    path = folder / "optimizer.pt"
    if not path.exists():
        raise UserError(f"{folder} has no optimizer.pt: a run can start from it, but not resume it")
    size_of(path)
    check_sum(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if len(entries) > MAX_ENTRIES or any(each.compress_type for each in entries):
            raise ValueError("it has too many entries, or compressed ones")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0].partition(". ")[0][:150]
        raise UserError(
            f"{path} is damaged or contains code, and was not loaded ({reason})"
        ) from None
    as_record(saved, OptimizerFile, str(path), "a run can start from its model, but not resume it")
    return saved
