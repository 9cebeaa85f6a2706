"""
LoRA (Hu et al. 2021, arXiv 2106.09685): beside a weight W that stays as it is, train B·A of a low
rank, and add it to W in the end. Adapters have the names and the settings of the `peft` library.

Shapes: R the rank, I inputs and O outputs of a linear layer.
"""

import difflib
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from configurator import UserError

PREFIX = "base_model.model."  # of peft's names


@dataclass(frozen=True)
class LoRAConfig:
    """`targets` are the ends of the names of the linear layers that get an adapter."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises UserError for settings out of range."""
        if self.rank < 1:
            raise UserError(f"LoRA's rank must be at least 1, not {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"LoRA's alpha must be a number above 0, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA's dropout must be in [0, 1), not {self.dropout}")
        if not self.targets:
            raise UserError("LoRA has no targets: no layer would get an adapter")


@dataclass(frozen=True)
class Adapter:
    """What the files of an adapter say of it, but for its tensors."""

    config: LoRAConfig
    base: str  # what it is for: a folder, or OWNER/NAME of the hub
    revision: str | None = None
    base_fingerprint: str | None = None  # None: not known, as it was made elsewhere


class LoRALinear(nn.Linear):
    """W·x + b + alpha/R · B·A·dropout(x), of which only A (R, I) and B (O, R) train."""

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.Linear(self.in_features, config.rank, bias=False)
        self.lora_B = nn.Linear(config.rank, self.out_features, bias=False)
        self.scale, self.dropout = config.alpha / config.rank, config.dropout

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_A(F.dropout(x, self.dropout, self.training))  # (…, R)
        return F.linear(x, self.weight, self.bias) + self.lora_B(low) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same as one matrix, in place of `weight`."""
        plain = nn.Linear(self.in_features, self.out_features, device="meta")
        self.weight.add_(self.lora_B.weight @ self.lora_A.weight, alpha=self.scale)
        plain.weight, plain.bias = self.weight, self.bias
        return plain


def add(model: nn.Module, config: LoRAConfig, seed: int) -> None:
    """Freeze a model on the CPU and give the linear layers that `config` targets an adapter, which
    changes nothing yet: A is drawn as PyTorch draws linear layers, B is zero.

    Raises UserError for a target that no linear layer's name ends with, and for a layer whose
    weight another layer shares.
    """
    layers = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    for target in config.targets:
        if not any(is_target(name, target) for name in layers):
            known = sorted({name.rpartition(".")[2] for name in layers})
            close = difflib.get_close_matches(target, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            raise UserError(f"LoRA: no linear layer is named {target!r}; {hint}")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name, layer in layers.items():
        if not any(is_target(name, target) for target in config.targets):
            continue
        if sum(p is layer.weight for _, p in model.named_parameters(remove_duplicate=False)) > 1:
            raise UserError(f"LoRA: {name} shares its weight with another layer")
        if config.rank > min(layer.in_features, layer.out_features):
            size = f"{layer.in_features:,} → {layer.out_features:,}"
            raise UserError(f"LoRA: rank {config.rank:,} is beyond that of {name}, {size}")
        new, bound = LoRALinear(layer, config), 1 / math.sqrt(layer.in_features)
        nn.init.uniform_(new.lora_A.weight, -bound, bound, generator=generator)
        nn.init.zeros_(new.lora_B.weight)
        model.set_submodule(name, new)


def is_target(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def merge(model: nn.Module) -> None:
    """Add each adapter to its weight, and leave an ordinary model whose parameters all train."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            model.set_submodule(name, layer.merged())
    model.requires_grad_(True)


def adapter_tensors(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a model's tensors those of its adapters."""
    return {
        name: tensor
        for name, tensor in state_dict.items()
        if name.endswith((".lora_A.weight", ".lora_B.weight"))
    }


def load(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give the adapters of a model their tensors, by peft's names.

    Raises UserError that lists what is missing, foreign, or of another shape.
    """
    wanted = {PREFIX + name: each for name, each in adapter_tensors(model.state_dict()).items()}
    problems = [f"it has {name}" for name in sorted(tensors.keys() - wanted.keys())]
    problems += [f"it has no {name}" for name in sorted(wanted.keys() - tensors.keys())]
    for name in sorted(tensors.keys() & wanted.keys()):
        if tensors[name].shape != wanted[name].shape:
            shapes = f"{tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
            problems.append(f"{name} has shape {shapes}")
        elif not (tensors[name].is_floating_point() and tensors[name].isfinite().all()):
            problems.append(f"{name} holds what are no finite fractions")
        else:
            wanted[name].copy_(tensors[name])
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError("; ".join(problems[:3]) + more)


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights without adapters, nor positions: it may be opened with fewer."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" not in name and not name.endswith("wpe.weight"):
            digest.update(name.encode())
            digest.update(parameter.detach().float().contiguous().numpy().data)
    return digest.hexdigest()[:16]


# --- peft's format


def to_peft(adapter: Adapter) -> dict[str, Any]:
    """The content of adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "revision": adapter.revision,
        "r": adapter.config.rank,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": adapter.config.dropout,
        "target_modules": list(adapter.config.targets),
        "fan_in_fan_out": True,  # GPT-2's matrices are (in, out) there
        "bias": "none",
        "inference_mode": True,
    }


def from_peft(
    found: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, str], where: str
) -> Adapter:
    """The adapter of an adapter_config.json, with the layers that it really has as targets.

    Raises UserError for one that is not plain LoRA.
    """
    if found.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {found.get('peft_type')!r}, not 'LORA'")
    for name, value in found.items():
        plain = value in (None, False, "none") or value == {} or value == []
        if name == "init_lora_weights":  # some ways change the base, too
            plain = value in (True, False, "gaussian", "orthogonal")
        if not (plain or name in KNOWN):
            raise UserError(f"{where}: {name}={value!r} is more than plain LoRA")
    try:
        base, revision = str(found["base_model_name_or_path"]), found.get("revision")
        rank, alpha = int(found["r"]), float(found["lora_alpha"])
        dropout = float(found["lora_dropout"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is damaged: {error!r}") from None
    names = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors})
    try:
        config = LoRAConfig(rank, alpha, dropout, tuple(names))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return Adapter(config, base, revision, metadata.get("base_fingerprint") or None)


# What plain LoRA has, and what changes nothing for an adapter that has been trained.
KNOWN = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
)
