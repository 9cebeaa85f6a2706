"""
LoRA (Hu et al. 2021, arXiv 2106.09685): freeze a weight W, train a low-rank product B·A beside it,
and finally merge the two. Names and settings are those of the `peft` library.

Shapes: R the rank, I inputs and O outputs of a linear layer.
"""

import difflib
import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from configurator import UserError


@dataclass(frozen=True)
class LoRAConfig:
    """`targets` are suffixes of the names of the linear layers that get an adapter."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises UserError for a setting out of range."""
        if self.rank < 1:
            raise UserError(f"LoRA's rank must be at least 1, not {self.rank}")
        if not 0 < self.alpha < 1e30:
            raise UserError(f"LoRA's alpha must be above 0 and below 1e30, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA's dropout must be in [0, 1), not {self.dropout}")
        if not self.targets:
            raise UserError("LoRA has no targets: no layer would get an adapter")


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files describe it, without its tensors."""

    config: LoRAConfig
    base: str  # the model that it modifies: a folder, or OWNER/NAME on the hub
    revision: str | None = None
    base_fingerprint: str | None = None  # None: unknown, for adapters made elsewhere


class LoRALinear(nn.Linear):
    """W·x + b + alpha/R · B·A·dropout(x), where only A (R, I) and B (O, R) train."""

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
        """An ordinary layer that computes the same; it takes over `weight`, updated in place."""
        plain = nn.Linear(self.in_features, self.out_features, device="meta")
        self.weight.add_(self.lora_B.weight @ self.lora_A.weight, alpha=self.scale)
        plain.weight, plain.bias = self.weight, self.bias
        return plain


def add(model: nn.Module, config: LoRAConfig, seed: int) -> None:
    """Freeze a model on the CPU and add an adapter to each linear layer that `config` targets.

    The output does not change yet: A is drawn as PyTorch draws linear layers, B is zero.
    Raises UserError for a target that matches no linear layer, a layer whose weight another layer
    shares, and a rank above that of a layer.
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
            raise UserError(f"LoRA: rank {config.rank:,} exceeds that of {name}, {size}")
        new, bound = LoRALinear(layer, config), 1 / math.sqrt(layer.in_features)
        nn.init.uniform_(new.lora_A.weight, -bound, bound, generator=generator)
        nn.init.zeros_(new.lora_B.weight)
        model.set_submodule(name, new)


def is_target(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def merge(model: nn.Module) -> None:
    """Fold each adapter into its weight; what remains is an ordinary model, all of it trainable."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            model.set_submodule(name, layer.merged())
    model.requires_grad_(True)


def adapter_tensors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a model's tensors that belong to adapters."""
    return {name: tensor for name, tensor in weights.items() if is_adapter_weight(name)}


def is_adapter_weight(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights without adapters, and without positions, of which a model may be
    loaded with fewer."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not is_adapter_weight(name) and not name.endswith("wpe.weight"):
            digest.update(name.encode())
            digest.update(parameter.detach().float().contiguous().numpy().data)
    return digest.hexdigest()[:16]
