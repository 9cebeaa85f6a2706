"""Hugging Face's file layout of a GPT-2: config.json and safetensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from configurator import UserError
from model import EPSILON, GPT, INIT_STD, GPTConfig
from plaingpt.checksums import check_sum
from plaingpt.files import read_json, size_of
from plaingpt.wording import quantity, shown

# GPT-2's Conv1D stores these as (in, out), nn.Linear as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Weights are floats; the masks in old files are booleans or whole numbers.
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
MAX_LAYERS = 1024  # the deepest GPT-2 has 48
MAX_TENSORS = 20_000  # per file; a model of MAX_LAYERS has fewer


# --- config.json

MAX_WIDTH = (1 << 20) - 1  # and the longest context
Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_WIDTH)]


class ConfigFile(msgspec.Struct, frozen=True):
    """The fields of a GPT-2's config.json that say what it computes, with the defaults of
    `transformers`."""

    model_type: str | None = None
    n_positions: Size = 1024
    vocab_size: Size = 50257
    n_layer: Annotated[int, msgspec.Meta(ge=1, le=MAX_LAYERS)] = 12
    n_head: Size = 12
    n_embd: Size = 768
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = EPSILON
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    bias: bool = True  # plainGPT's own


class IndexFile(msgspec.Struct, frozen=True):
    """model.safetensors.index.json, for weights in several files."""

    weight_map: dict[str, str]  # tensor → file


def to_config_json(config: GPTConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": EPSILON,
        "initializer_range": INIT_STD,
        "tie_word_embeddings": config.tie_weights,
        "bias": config.bias,  # read only by plainGPT; False: the stored biases are zeros
    }


def read_config(folder: Path, block_size: int | None = None, dropout: float = 0.0) -> GPTConfig:
    """The shape that config.json describes, with fewer positions if `block_size` is given.

    Raises UserError if the file is missing or damaged, or describes anything but a plain GPT-2.
    """
    path = folder / "config.json"
    found = read_json(path, ConfigFile)
    if found.model_type != "gpt2":
        raise UserError(f"{path}: model_type is {shown(found.model_type)}, not 'gpt2'")
    fixed = {  # the values that this GPT-2 implements, default first
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (EPSILON,),
        "n_inner": (None, 4 * found.n_embd),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for name, values in fixed.items():
        if (value := getattr(found, name)) not in values:
            raise UserError(f"{path}: {name}={shown(value)} is not GPT-2's {values[0]!r}")
    positions = found.n_positions
    if block_size is not None and block_size > positions:
        raise UserError(f"block_size={block_size} is beyond the {positions} positions of {folder}")
    try:
        config = GPTConfig(
            vocab_size=found.vocab_size,
            block_size=positions,
            n_layer=found.n_layer,
            n_head=found.n_head,
            n_embd=found.n_embd,
            bias=found.bias,
            tie_weights=found.tie_word_embeddings,
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return replace(config, block_size=block_size or positions, dropout=dropout)


# --- safetensors


def to_file_layout(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """`GPT.weights()` as a GPT-2 file has them: float32, matrices transposed, every bias present.

    Tensors that need no conversion share their memory with `weights`.
    """
    converted = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().float().cpu()
        converted[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    if not config.bias:
        for name in [name for name in converted if ".h." in name or ".ln_f." in name]:
            bias = name.removesuffix("weight") + "bias"
            converted[bias] = torch.zeros(converted[name].size(-1))
    return converted


def from_file_layout(saved: dict[str, Tensor], config: GPTConfig, file: Path) -> dict[str, Tensor]:
    """The weights for `GPT.from_weights`, float32, copied from the tensors of a GPT-2 `file`.

    Raises a UserError that lists missing tensors and those of another type or shape, or names one
    that is not finite.
    """
    last = f"h.{config.n_layer - 1}.ln_1.weight"
    beyond = f"h.{config.n_layer}.ln_1.weight"
    for name, expected, words in ((last, True, "fewer"), (beyond, False, "more")):
        if (name in saved or f"transformer.{name}" in saved) != expected:
            layers = f"the {quantity(config.n_layer, 'layer')} of its config.json"
            raise UserError(f"{file} has {words} than {layers}")
    with torch.device("meta"):
        model = GPT(config)
    found: dict[str, Tensor] = {}
    problems = []
    for name, parameter in model.named_parameters():
        tensor = saved.get(name, saved.get(name.removeprefix("transformer.")))
        if tensor is None or not tensor.is_floating_point():
            problems.append(f"{name} is {'missing' if tensor is None else tensor.dtype}")
            continue
        if tensor.dim() == parameter.dim():
            if name.endswith(TRANSPOSED):
                tensor = tensor.t()
            if name == "transformer.wpe.weight":
                tensor = tensor[: config.block_size]
        if tensor.shape != parameter.shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(parameter.shape)}"
            problems.append(f"{name} has shape {shapes}")
        found[name] = tensor
    if problems:
        raise UserError(f"{file} does not match config.json: {first_three(problems)}")
    weights = {
        name: tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in found.items()
    }
    check_finite(weights, file)
    return weights


def first_three(problems: list[str]) -> str:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3])[:200] + more


def check_finite(weights: dict[str, Tensor], where: Path) -> None:
    """Raises a UserError that names the first tensor with a NaN or an infinity."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {name} holds NaN or infinite values")


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that its index names. Raises UserError if one is missing."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).exists() and index.exists():
        weight_map = read_json(index, IndexFile).weight_map
        names = sorted({Path(name).name for name in weight_map.values()})
        if not names:
            raise UserError(f"{index}: weight_map names no file")
    for name in names:
        if not (folder / name).exists():
            pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
                p.name for p in folder.glob("*.pt") if p.name != "optimizer.pt"
            )
            hint = f" ({pickles[0]} was not read: a pickle can run code)" if pickles else ""
            raise UserError(f"{folder} has no {name[:100]}{hint}")
    return [folder / name for name in names]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's `weight_files`. Raises UserError for a missing or damaged one."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with open_tensors(path) as opened:
            weights |= tensors_of(opened, path)
    return weights


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file and read its header: names, types and shapes.

    Raises UserError if the file is missing or damaged.
    """
    size_of(path)
    try:
        with safetensors.safe_open(path, "pt") as opened:
            if len(opened.keys()) > MAX_TENSORS:
                raise UserError(f"{path} has more than {MAX_TENSORS:,} tensors")
            yield opened
    except safetensors.SafetensorError as error:
        reason = str(error)[:150]
        raise UserError(f"{path} is damaged or not a safetensors file: {reason}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def tensors_of(opened: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of an opened file. Raises UserError for a type that no GPT-2 has, and if the file
    does not match its checksum."""
    names = opened.keys()
    for name in names:
        if (dtype := opened.get_slice(name).get_dtype()) not in DTYPES:
            raise UserError(f"{path}: {name[:80]} is of type {dtype}: expected F32, F16 or BF16")
    check_sum(path)
    return {name: opened.get_tensor(name) for name in names}


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Raises OSError if the disk refuses the file."""
    path.touch()
    mode = path.stat().st_mode  # as the umask allows; safetensors sets 0600
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)
