"""Hugging Face's layout of a GPT-2: config.json and safetensors."""

from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from configurator import UserError
from model import EPSILON, GPT, INIT_STD, GPTConfig
from plaingpt.files import read_json

# GPT-2's Conv1D keeps these as (in, out), nn.Linear as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from model.safetensors or the files that its index names.

    Raises UserError for a missing or damaged file.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).exists() and index.exists():
        of_tensors = read_json(index).get("weight_map")
        if not isinstance(of_tensors, dict):
            raise UserError(f"{index} is damaged: it has no weight_map")
        names = sorted({Path(str(name)).name for name in of_tensors.values()})
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
    """Raises UserError for a file that is missing or damaged."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def config_to_hugging_face(config: GPTConfig) -> dict[str, Any]:
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
        "bias": config.bias,  # ours alone: False means that the zero biases are no parameters
    }


def config_from_hugging_face(folder: Path, block_size: int | None, dropout: float) -> GPTConfig:
    """Raises UserError for a config.json that is not a plain GPT-2's."""
    path = folder / "config.json"
    found = read_json(path)
    if found.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type is {found.get('model_type')!r}, not 'gpt2'")
    sizes = {"n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
    sizes |= {name: found[name] for name in sizes if name in found}
    if wrong := [n for n, size in sizes.items() if type(size) is not int or not 0 < size < 2**20]:
        raise UserError(f"{path}: {wrong[0]}={sizes[wrong[0]]!r} is no size")
    # What else a GPT-2 config can say, and the one value of it that this GPT-2 has.
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
    return GPTConfig(
        **sizes,
        block_size=block_size or positions,
        dropout=dropout,
        bias=found.get("bias", True),
        tie_weights=found.get("tie_word_embeddings", True),
    )


def to_hugging_face(state_dict: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """A model's weights as a GPT-2 file has them: matrices transposed, no bias missing."""
    weights = {}
    for name, tensor in state_dict.items():
        if name == "lm_head.weight" and config.tie_weights:
            continue
        tensor = tensor.detach().float().cpu()
        weights[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    if not config.bias:
        for name in [name for name in weights if ".h." in name or ".ln_f." in name]:
            bias = name.removesuffix("weight") + "bias"
            weights[bias] = torch.zeros(weights[name].size(-1))
    return weights


def from_hugging_face(
    saved: dict[str, Tensor], config: GPTConfig, folder: Path
) -> dict[str, Tensor]:
    """The state dict of a GPT of that config, float32, from the tensors of a GPT-2 file.

    Raises UserError that lists what is missing or of another shape.
    """
    last = f"h.{config.n_layer - 1}.ln_1.weight"
    beyond = f"h.{config.n_layer}.ln_1.weight"
    for name, wanted, words in ((last, True, "fewer"), (beyond, False, "more")):
        if (name in saved or f"transformer.{name}" in saved) != wanted:
            layers = f"the {config.n_layer:,} layers of its config.json"
            raise UserError(f"{folder} has {words} than {layers}")
    with torch.device("meta"):
        shapes_of = GPT(config).state_dict()
    weights: dict[str, Tensor] = {}
    problems = []
    for name, like in shapes_of.items():
        if name == "lm_head.weight" and config.tie_weights:
            if "transformer.wte.weight" in weights:
                weights[name] = weights["transformer.wte.weight"]
            continue
        tensor = saved.get(name, saved.get(name.removeprefix("transformer.")))
        if tensor is None or not tensor.is_floating_point():
            problems.append(f"{name} is {'missing' if tensor is None else tensor.dtype}")
            continue
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        if name == "transformer.wpe.weight":
            tensor = tensor[: config.block_size]
        if tensor.shape != like.shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(like.shape)}"
            problems.append(f"{name} has shape {shapes}")
        weights[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{folder} does not fit its config.json: {'; '.join(problems[:3])}{more}")
    return weights
