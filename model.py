"""
All of GPT-2: the network and its key/value cache.

A genuine GPT-2 (Radford et al. 2019): learned positions, pre-LayerNorm, tanh GELU, a tied head, and
Hugging Face's parameter names, so that `transformers` loads what this file trains. Whatever its
format cannot express stays out.

Shapes: B sequences, T new tokens each, S tokens with those in the cache, C channels (n_embd),
H heads, D channels per head (C / H), V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

EPSILON = 1e-5  # of every LayerNorm
INIT_STD = 0.02


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2; `block_size` is Hugging Face's `n_positions`."""

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in the linear layers and LayerNorms; a checkpoint stores False as zeros
    tie_weights: bool = True  # the head is the token embedding

    def __post_init__(self) -> None:
        """Raises ValueError for an impossible shape."""
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.n_embd % self.n_head:
            fits = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
            near = min(fits, key=lambda h: abs(h - self.n_head))
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; "
                f"the nearest that works is n_head={near}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")

    def flops_per_token(self, frozen: bool = False) -> int:
        """Floating-point operations to train on one token of a full window, forward and backward.

        6 per parameter that multiplies (positions only add), 4 if all are `frozen`, and 12·L·C·T
        for attention: the count of PaLM (arXiv 2204.02311, appendix B), without a deduction for
        causal masking.
        """
        layer = 12 * self.n_embd**2
        matrices = self.n_layer * layer + self.vocab_size * self.n_embd
        return (4 if frozen else 6) * matrices + 12 * self.n_layer * self.n_embd * self.block_size


class KVCache:
    """Keys and values of the tokens that each sequence has so far, in buffers of a fixed shape."""

    def __init__(
        self, model: "GPT", batch_size: int, capacity: int | None = None, stride: int = 1
    ) -> None:
        """For `capacity` tokens per sequence (None: block_size). New tokens see a multiple of
        `stride` entries, so that a GPU meets few shapes; those beyond a sequence are masked."""
        config, weight = model.config, model.transformer.wpe.weight
        self.capacity, self.stride = capacity or config.block_size, stride
        head_dim = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, 2, config.n_head, self.capacity, head_dim)
        self.entries = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        self.end = 0  # no sequence is longer

    def span(self, end: int) -> int:
        """How many entries new tokens see when no sequence is longer than `end`."""
        return min(-(-end // self.stride) * self.stride, self.capacity)

    def reserve(self, B: int, T: int) -> Tensor:
        """Make room for T more tokens of the first B sequences; return their positions, (B, T)."""
        start, end = self.end, self.end + T
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit a cache of {self.capacity}")
        self.end, self.size = end, self.span(end) if start else end
        self.positions = self.lengths[:B, None] + torch.arange(T, device=self.lengths.device)
        self.rows = torch.arange(B, device=self.lengths.device)[:, None]
        self.seen = None
        if start and (B * T > 1 or self.stride > 1):  # else plainly causal, or one that sees all
            seen = torch.arange(self.size, device=self.lengths.device) <= self.positions[..., None]
            self.seen = seen[:, None]  # (B, 1, T, S)
        self.lengths[:B] += T
        return self.positions

    def extend(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values (B, T, 2, H, D) of a layer; return all of them as k and v,
        (B, H, S, D)."""
        entries = self.entries[layer]
        entries[self.rows, :, :, self.positions] = kv.to(entries.dtype)  # autocast's may differ
        k, v = entries[: len(kv), :, :, : self.size].unbind(1)
        return k, v


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Draw nothing: the weights come from GPT.init_weights or a checkpoint."""


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Draw nothing, as in Linear."""


class Attention(nn.Module):
    """Causal attention, by PyTorch's flash kernels where available. It is a module of its own so
    that plaingpt/cpu.py can replace it."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, dropout: float
    ) -> Tensor:
        """Attend with queries q (B, H, T, D) to those keys and values k and v (B, H, S, D) that
        `seen` (B, 1, T, S) allows. Without it, attention is causal (T is S), or a single query sees
        everything."""
        causal = seen is None and q.size(2) > 1
        return F.scaled_dot_product_attention(q, k, v, seen, dropout, causal)


class SelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attend = Attention()
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x: Tensor, layer: int, cache: KVCache | None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        seen = None
        if cache is not None:
            k, v = cache.extend(layer, qkv[:, :, 1:])
            seen = cache.seen
        y = self.attend(q, k, v, seen, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = nn.GELU(approximate="tanh")
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(self.act(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, EPSILON, bias=config.bias)
        self.attn = SelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, EPSILON, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layer: int, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), layer, cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Everything below the head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, EPSILON, bias=config.bias)
        self.config = config
        # for training
        self.recompute = False  # activation checkpointing: run blocks again in the backward pass
        self.stream_dtype: torch.dtype | None = None  # of the residual stream; None: the weights'

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final hidden states (B, T, C) of token ids `idx` (B, T); `cache` is read and extended.

        Raises ValueError if the tokens, with those in the cache, exceed block_size.
        """
        B, T = idx.shape
        block_size = self.config.block_size
        if cache is None and block_size < T:
            raise ValueError(f"{T} tokens do not fit block_size={block_size}")
        positions = self.wpe.weight[:T] if cache is None else self.wpe(cache.reserve(B, T))
        x = self.wte(idx) + positions  # (B, T, C)
        if self.training:
            x = x.to(dtype=self.stream_dtype)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            if self.recompute and self.training:
                x = recomputed(block, x, layer, cache, use_reentrant=False)
            else:
                x = block(x, layer, cache)
        return self.ln_f(x)


class CrossEntropy(nn.Module):
    """The loss, in float32. A module, so that plaingpt/cpu.py can put a faster one in its place."""

    def forward(self, logits: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """The mean over the rows of `logits` (N, V) and `targets` (N,) where `mask` (N,) is 1."""
        if mask is None:
            return F.cross_entropy(logits.float(), targets)
        losses = F.cross_entropy(logits.float(), targets, reduction="none") * mask
        return losses.sum() / mask.sum().clamp(min=1)


class GPT(nn.Module):
    """The network. Its weights are undefined until init_weights draws them or a checkpoint is
    loaded. They have the names of `transformers.GPT2LMHeadModel`, which stores the matrices of the
    blocks transposed (`Conv1D`); plaingpt/checkpoint/hugging_face.py converts them.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.loss = CrossEntropy()
        self.tie_head()

    def tie_head(self) -> None:
        """Make the head and the token embedding one matrix, if the config asks for it."""
        if self.config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: dict[str, Tensor]) -> "GPT":
        """A model that owns these tensors, named as in `weights()`, without copying them."""
        with torch.device("meta"):
            model = cls(config)
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
        assert not unexpected and missing == (["lm_head.weight"] if config.tie_weights else [])
        model.tie_head()
        return model

    def weights(self) -> dict[str, Tensor]:
        """Every weight once, by name: a tied head appears as the embedding."""
        weights = self.state_dict()
        if self.config.tie_weights:
            del weights["lm_head.weight"]
        return weights

    @torch.no_grad()
    def init_weights(self, seed: int) -> "GPT":
        """Draw fresh weights, the same for a seed on every device: N(0, 0.02), residual
        projections scaled down by sqrt(2·n_layer), biases 0, LayerNorm gains 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = INIT_STD
            if name.endswith("c_proj.weight"):
                std /= math.sqrt(2 * self.config.n_layer)
            parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))
        return self

    def num_params(self, trained: bool = False) -> int:
        """The number of parameters, or only of those that are `trained`."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trained)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V); with `targets` (B, T), the loss instead: a scalar, the mean nats per
        target where `mask` (B, T) is 1, and 0 if the mask is all zeros.

        Raises ValueError if the tokens, with those in the cache, exceed block_size.
        """
        logits = self.lm_head(self.transformer(idx, cache))
        if targets is None:
            return logits
        mask = None if mask is None else mask.flatten()
        return self.loss(logits.flatten(0, 1), targets.flatten(), mask)
