"""Hugging Face's file layout of a GPT-2: config.json and safetensors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from configurator import UserError
from model import EPSILON, GPT, INIT_STD, GPTConfig
from plaingpt.files import read_json

# GPT-2's Conv1D stores these as (in, out), nn.Linear as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


# --- config.json


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
    found = read_json(path)
    if found.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type is {found.get('model_type')!r}, not 'gpt2'")
    sizes = {"n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
    sizes |= {name: found[name] for name in sizes if name in found}
    for name, size in sizes.items():
        if type(size) is not int or not 0 < size < 2**20:
            raise UserError(f"{path}: {name}={size!r} is not a valid size")
    # Other fields of a GPT-2 config, with the values that this GPT-2 implements, default first.
    fixed = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (EPSILON,),
        "n_inner": (None, 4 * sizes["n_embd"]),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for name, values in fixed.items():
        if found.get(name, values[0]) not in values:
            raise UserError(f"{path}: {name}={found[name]!r} is not GPT-2's {values[0]!r}")
    positions = sizes.pop("n_positions")
    if block_size is not None and block_size > positions:
        raise UserError(f"block_size={block_size} is beyond the {positions} positions of {folder}")
    try:
        config = GPTConfig(
            **sizes,
            block_size=positions,
            bias=bool(found.get("bias", True)),
            tie_weights=bool(found.get("tie_word_embeddings", True)),
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


def from_file_layout(
    saved: dict[str, Tensor], config: GPTConfig, folder: Path
) -> dict[str, Tensor]:
    """The weights for `GPT.from_weights`, float32, copied from the tensors of a GPT-2 file.

    Raises a UserError that lists missing tensors and those of another type or shape.
    """
    last = f"h.{config.n_layer - 1}.ln_1.weight"
    beyond = f"h.{config.n_layer}.ln_1.weight"
    for name, expected, words in ((last, True, "fewer"), (beyond, False, "more")):
        if (name in saved or f"transformer.{name}" in saved) != expected:
            layers = f"the {config.n_layer:,} layers of its config.json"
            raise UserError(f"{folder} has {words} than {layers}")
    with torch.device("meta"):
        model = GPT(config)
    weights: dict[str, Tensor] = {}
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
        weights[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if problems:
        raise UserError(f"{folder} does not match its config.json: {first_three(problems)}")
    return weights


def first_three(problems: list[str]) -> str:
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from model.safetensors or the files that its index names.

    Raises UserError for a missing or damaged file.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).exists() and index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} is damaged: it has no weight_map")
        names = sorted({Path(str(name)).name for name in weight_map.values()})
    weights: dict[str, Tensor] = {}
    for path in (folder / name for name in names):
        if not path.exists():
            pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
                p.name for p in folder.glob("*.pt") if p.name != "optimizer.pt"
            )
            hint = f" ({pickles[0]} is a pickle, which can run code: not read)" if pickles else ""
            raise UserError(f"{folder} has no {path.name}{hint}")
        weights |= read_tensors(path)
    return weights


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file. Raises UserError if it is missing or damaged."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Raises OSError if the disk refuses the file."""
    path.touch()
    mode = path.stat().st_mode  # as the umask allows; safetensors sets 0600
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(mode)
