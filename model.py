"""
GPT-2, all of it: the network, the key/value cache, sampling and generation.

A genuine GPT-2 (Radford et al. 2019): learned positions, pre-LayerNorm, tanh GELU, a tied head,
and Hugging Face's parameter names, so that `transformers` opens what this file trains. What its
format cannot carry stays out.

Shapes: B sequences, T tokens each, S tokens seen so far, C channels (n_embd), H heads,
D channels per head (C / H), V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

EPSILON = 1e-5  # of every LayerNorm
INIT_STD = 0.02
CPU_BLOCK = 256  # queries in a block of attention on a CPU


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
        """Raises ValueError for a shape that cannot be built."""
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, not {value!r}")
        if self.n_embd % self.n_head:
            fits = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
            near = min(fits, key=lambda h: abs(h - self.n_head))
            raise ValueError(
                f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads; "
                f"the nearest that does is n_head={near}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")

    def flops_per_token(self, frozen: bool = False) -> int:
        """Floating-point operations to train on one token of a full window, forward and backward.

        6 per parameter that multiplies (positions only add), 4 where all are `frozen`, and 12·L·C·T
        for attention: the count of PaLM (arXiv 2204.02311, appendix B), causal masking not
        deducted.
        """
        layer = 12 * self.n_embd**2
        matrices = self.n_layer * layer + self.vocab_size * self.n_embd
        return (4 if frozen else 6) * matrices + 12 * self.n_layer * self.n_embd * self.block_size

    def activation_bytes_per_token(self, half: bool, recompute: bool) -> int:
        """About what a training step keeps of each token for the backward pass, in bf16 or fp32.

        In units of n_embd, a block keeps two LayerNorms (in and out), qkv, attention, and the MLP
        around its GELU; `recompute` leaves its input alone, and one block's worth at a time. Of the
        logits there are three copies.
        """
        block = self.n_embd * (36 if half else 64)
        blocks = self.n_layer * 4 * self.n_embd + block if recompute else self.n_layer * block
        return blocks + self.vocab_size * (10 if half else 12)


class KVCache:
    """Keys and values of the tokens seen so far, in buffers that never change their shape."""

    def __init__(self, model: "GPT", batch_size: int) -> None:
        config, weight = model.config, model.transformer.wte.weight
        shape = (config.n_layer, batch_size, config.n_head, config.block_size)
        head_dim = config.n_embd // config.n_head
        self.keys = torch.zeros(*shape, head_dim, device=weight.device, dtype=weight.dtype)
        self.values = torch.zeros_like(self.keys)
        self.length = 0  # S, the same for every sequence of the batch

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H, T, D) behind the S tokens so far; return all S + T of the layer."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Draw nothing: GPT.init_weights does, or a checkpoint has the weights."""


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Draw nothing, as Linear does."""


class SelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x: Tensor, layer: int, cache: KVCache | None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        y = attention(q, k, v, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention of the last T of S tokens: q (B, H, T, D), k and v (B, H, S, D).

    Flash attention, but plain products on a CPU up to 1,024 tokens, a third faster there
    (docs/benchmarks.md): blocks of queries, each with the keys up to its own end.
    """
    shape, T, S, D = q.shape[:2], q.size(2), k.size(2), q.size(3)
    if q.device.type == "cpu" and 1 < T == S <= 1024:
        future = q.new_full((T, T), -torch.inf).triu(1)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B·H, T, D)
        out = []
        for start in range(0, T, CPU_BLOCK):
            end = min(start + CPU_BLOCK, T)
            bias, keys = future[start:end, :end], k[:, :end]
            scores = torch.baddbmm(bias, q[:, start:end], keys.mT, alpha=D**-0.5)
            weights = F.dropout(F.softmax(scores, dim=-1), dropout)  # (B·H, block, end)
            out.append(torch.bmm(weights, v[:, :end]))
        return torch.cat(out, dim=1).unflatten(0, shape)
    if T == 1 or T == S:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(gelu(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training)


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, the tanh approximation."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return CPUGelu.apply(x)
    return F.gelu(x, approximate="tanh")


class CPUGelu(torch.autograd.Function):
    """The same in bf16 as x·sigmoid(u), u = 2·sqrt(2/pi)·(x + 0.044715·x³), in element-wise passes
    that PyTorch has vectorized for bf16 on CPUs; its own kernel takes twice as long."""

    linear = torch.tensor(2 * math.sqrt(2 / math.pi), dtype=torch.bfloat16)
    cubic = 0.044715 * 2 * math.sqrt(2 / math.pi)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate = torch.addcmul(CPUGelu.linear, x, x, value=CPUGelu.cubic).mul_(x).sigmoid_()
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        x, gate = ctx.saved_tensors
        slope = torch.addcmul(CPUGelu.linear, x, x, value=3 * CPUGelu.cubic).mul_(x)  # x·du/dx
        return (1 - gate).mul_(slope).add_(1).mul_(gate).mul_(grad)


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
        self.recompute = False  # activations of blocks in the backward pass, to keep fewer

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final hidden states (B, T, C) of token ids `idx` (B, T); `cache` is read and extended.

        Raises ValueError where the tokens, with those in the cache, pass block_size.
        """
        start = 0 if cache is None else cache.length
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit block_size={self.config.block_size}")
        x = self.wte(idx) + self.wpe.weight[start:end]  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            if self.recompute and self.training:
                x = recomputed(block, x, layer, cache, use_reentrant=False)
            else:
                x = block(x, layer, cache)
        if cache is not None:
            cache.length = end
        return self.ln_f(x)


class GPT(nn.Module):
    """The network. Its weights are undefined until init_weights draws them or a checkpoint is
    loaded. They are named as in `transformers.GPT2LMHeadModel`, which stores the matrices of the
    blocks transposed (`Conv1D`); checkpoint.py takes care of that.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_head()

    def tie_head(self) -> None:
        """Have the head and the token embedding share one matrix, if the shape says so."""
        if self.config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: dict[str, Tensor]) -> "GPT":
        """A model that takes these tensors, named as `weights` names them, as its own, uncopied."""
        with torch.device("meta"):
            model = cls(config)
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
        assert not unexpected and missing == ["lm_head.weight"] * config.tie_weights
        model.tie_head()
        return model

    def weights(self) -> dict[str, Tensor]:
        """Each weight once, by name: a tied head is its embedding."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

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
        """How many there are, or only those that are `trained`."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trained)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """With `targets` (B, T), the loss: nats per target, a scalar, over the targets where
        `mask` (B, T) is 1; 0 where the mask is all zeros. Without, logits (B, T, V).

        Raises ValueError where the tokens, with those in the cache, pass block_size.
        """
        logits = self.lm_head(self.transformer(idx, cache))
        if targets is None:
            return logits
        logits, targets = logits.flatten(0, 1).float(), targets.flatten()
        if mask is None:
            return F.cross_entropy(logits, targets)
        losses = F.cross_entropy(logits, targets, reduction="none") * mask.flatten()
        return losses.sum() / mask.sum().clamp(min=1)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop_id: int | None = None,
        vocab_size: int | None = None,
        generator: torch.Generator | None = None,
        watch: Callable[[Tensor], Any] | None = None,
    ) -> Iterator[Tensor]:
        """Yield the next id of each sequence, (B,), again and again, continuing `idx` (B, T).

        A sequence that drew `stop_id` yields it ever after, and when all have, generation ends.
        Ids from `vocab_size` on (the padding of a vocabulary) are never drawn. Positions are
        learned, so a full context cannot slide: once block_size tokens are in, the last
        block_size // 2 (at least one) are read anew from position 0, and likewise a prompt
        longer than block_size keeps its last block_size tokens. `watch` is called with the logits
        (B, V) that an id is going to be drawn from.
        """
        block_size = self.config.block_size
        cache = KVCache(self, idx.size(0))
        tokens = idx[:, -block_size:]  # what the model sees, T <= block_size
        unread = tokens
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if cache.length + unread.size(1) > block_size:
                tokens = tokens[:, -max(block_size // 2, 1) :]
                cache.length, unread = 0, tokens
            logits = self.lm_head(self.transformer(unread, cache)[:, -1])[:, :vocab_size].float()
            if watch:
                watch(logits)  # (B, V)
            drawn = sample(logits, temperature, top_k, top_p, min_p, generator)
            if stop_id is not None:
                drawn = torch.where(done, stop_id, drawn)
                done |= drawn == stop_id
            yield drawn
            if stop_id is not None and done.all():
                return
            unread = drawn[:, None]
            tokens = torch.cat((tokens, unread), dim=1)


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw an id (B,) from each row of `logits` (B, V); temperature 0 takes the likeliest.

    The filters apply in the order of the arguments, each to what the one before left:
    the k likeliest, the fewest whose probability reaches top_p (arXiv 1904.09751), those at
    least min_p times as likely as the likeliest (arXiv 2407.01082).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = F.softmax(logits / temperature, dim=-1)
    if top_k is not None:
        kth = probs.topk(min(top_k, probs.size(-1))).values[:, -1:]
        probs = probs.masked_fill(probs < kth, 0.0)
    if top_p is not None:
        ordered, ids = (probs / probs.sum(-1, keepdim=True)).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p  # mass of the likelier ones
        beyond[:, 0] = False  # not even where top_p is too small for a float
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, ids, beyond), 0.0)
    if min_p is not None:
        probs = probs.masked_fill(probs < min_p * probs.max(-1, keepdim=True).values, 0.0)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]
