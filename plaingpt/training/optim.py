"""AdamW, Muon, and which of them trains which parameter."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.adamw import adamw

from configurator import UserError
from plaingpt.training.parallel import at_owners, divided, local_shard, sharded_as

OptimizerName = Literal["muon", "adamw"]


class Optimizer:
    """Groups of parameters with their settings, and a state for each parameter.

    It stands in for torch.optim.Optimizer, whose constructor imports torch._dynamo: a second, which
    a run of a few seconds would notice.
    """

    def __init__(self, params: Iterable[Any], **settings: Any) -> None:
        """`params` are parameters, or groups: dicts of "params" and settings of their own."""
        groups = list(params)
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        self.param_groups: list[dict[str, Any]] = [settings | group for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def zero_grad(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None

    def step(self, usable: Tensor) -> None:
        """Update the parameters that have a gradient if `usable`, a single bool that stays on the
        device; else change nothing."""
        raise NotImplementedError


class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv 1711.05101), through PyTorch's fused kernel."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, usable: Tensor) -> None:
        unusable = usable.logical_not().float()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if p not in self.state:
                    self.state[p] = {
                        "step": torch.zeros((), device=p.device),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            adamw(
                [local_shard(p) for p in parameters],
                [local_shard(p.grad) for p in parameters],
                [local_shard(self.state[p]["exp_avg"]) for p in parameters],
                [local_shard(self.state[p]["exp_avg_sq"]) for p in parameters],
                [],
                [self.state[p]["step"] for p in parameters],
                fused=True,
                found_inf=unusable,  # at 1, the kernel changes nothing
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                amsgrad=False,
                maximize=False,
            )


class Muon(Optimizer):
    """Nesterov momentum with an orthogonalized update, for the weight matrices of hidden layers
    (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    The update is scaled by 0.2·sqrt(max(rows, columns)) to the size of AdamW's, so that the same
    learning rates serve both (Moonlight, arXiv 2502.16982). The matrices of a group are split along
    their rows into `parts` that are orthogonalized separately: the q, k and v of a fused
    projection. All matrices of one shape form one batch, because in small models they are most of
    the cost. Several processes share the work.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, usable: Tensor) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for parameters in shapes.values():
                self._step_shape(parameters, group, usable)

    def _step_shape(self, parameters: list[Tensor], group: dict[str, Any], usable: Tensor) -> None:
        for p in parameters:
            if p not in self.state:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        grads = [p.grad for p in parameters if p.grad is not None]
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        mine, averages = [local_shard(g) for g in grads], [local_shard(b) for b in buffers]
        for gradient, average in zip(mine, averages):
            torch.where(usable, gradient, average, out=gradient)  # the average then stays the same
        torch._foreach_lerp_(averages, mine, 1 - group["momentum"])
        torch._foreach_lerp_(mine, averages, group["momentum"])  # Nesterov's
        stack = torch.stack(mine).bfloat16()
        rows, columns = parameters[0].size(0) // group.get("parts", 1), parameters[0].size(1)

        def update(matrices: Tensor) -> Tensor:
            return orthogonalize(matrices.reshape(-1, rows, columns)).view_as(matrices)

        if mine[0] is grads[0]:
            updates = divided(update, stack.view(-1, rows, columns)).view_as(stack)
        else:
            updates = at_owners(update, stack, parameters[0].size(0))
        weights = [local_shard(p) for p in parameters]
        lr = usable * group["lr"]
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        scale = -0.2 * math.sqrt(max(rows, columns)) * lr
        torch._foreach_add_(weights, list(updates.to(mine[0].dtype).mul_(scale)))


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Approximately U·Vᵀ for each U·S·Vᵀ in a stack (n, rows, columns), in bf16.

    A quintic Newton-Schulz iteration with coefficients that are steep at zero: singular values end
    up between about 0.7 and 1.2, which serves as well as 1 (Jordan et al. 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x.mT @ x if tall else x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        x = x @ factor if tall else factor @ x
    return x


@dataclass(frozen=True)
class OptimizerConfig:
    name: OptimizerName
    weight_decay: float
    betas: tuple[float, float]  # AdamW's
    momentum: float  # Muon's
    embedding_lr_scale: float  # with Muon: AdamW's learning rate as a multiple of Muon's


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[Optimizer]:
    """The optimizers that together train every parameter of a GPT that is not frozen.

    "muon" puts Muon on the matrices of the blocks and AdamW on the rest, "adamw" AdamW on all.
    Weight decay applies to matrices and embeddings, not to biases and LayerNorms. Learning rates
    are 0 until set_learning_rate is called, before each step.
    """
    qkv, matrices, decayed, plain = (list[nn.Parameter]() for _ in range(4))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dim() < 2:
            plain.append(parameter)
        elif config.name == "adamw" or ".h." not in name:
            decayed.append(parameter)
        else:
            (qkv if name.endswith("c_attn.weight") else matrices).append(parameter)
    lr_scale = config.embedding_lr_scale if config.name == "muon" else 1.0
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "lr_scale": lr_scale},
        {"params": plain, "weight_decay": 0.0, "lr_scale": lr_scale},
    ]
    optimizers: list[Optimizer] = [AdamW(groups, lr=0.0, betas=config.betas)]
    if config.name == "muon":
        groups = [{"params": qkv, "parts": 3}, {"params": matrices, "parts": 1}]
        muon = Muon(groups, 0.0, momentum=config.momentum, weight_decay=config.weight_decay)
        optimizers.append(muon)
    return [each for each in optimizers if each.parameters()]


def default_learning_rate(name: OptimizerName, n_embd: int, gentle: bool) -> tuple[float, str]:
    """The peak for a model of this width, and a phrase that says where it comes from; `gentle` is
    for trained weights, which should keep what they know.

    Muon's 0.01 was the best rate measured at width 128. At a fixed rate, the spectral norm of its
    updates grows with sqrt(n_embd); it should not depend on the width (arXiv 2310.17813). AdamW's
    0.002 was the best from 64 to 192; beyond, 0.4 / n_embd is close to GPT-3's rates (arXiv
    2005.14165).
    """
    if name == "muon":
        rate, measured = 0.01 * math.sqrt(128 / n_embd), n_embd == 128
    else:
        rate, measured = min(0.002, 0.4 / n_embd), n_embd <= 192
    source = "measured" if measured else "derived from the width"
    if gentle:
        rate, source = rate / 10, f"a tenth of a new model's, {source}"
    return float(f"{rate:.2g}"), source


def set_learning_rate(optimizers: list[Optimizer], lr: float) -> None:
    """Give every group `lr` times its own "lr_scale"."""
    for group in (group for each in optimizers for group in each.param_groups):
        group["lr"] = lr * group.get("lr_scale", 1.0)


def optimizer_state(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, dict[str, Tensor]]:
    """The optimizers' state of each parameter, by the name of the parameter, in the model's order
    (they create or restore their states in orders of their own)."""
    states = {p: state for each in optimizers for p, state in each.state.items()}
    return {name: dict(states[p]) for name, p in model.named_parameters() if p in states}


def load_optimizer_state(
    model: nn.Module, optimizers: list[Optimizer], saved: dict[str, dict[str, Tensor]]
) -> None:
    """Restore what `optimizer_state` returned. Settings such as the learning rate are not part of
    it: they are this run's own.

    Raises UserError if `saved` belongs to other parameters, shapes or another optimizer, or is
    damaged.
    """
    if not saved:  # older versions had no state before the first finite step
        return
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    foreign = sorted(set(saved) - set(names.values()))
    if foreign:
        raise UserError(f"the saved state has a parameter that the model lacks: {foreign[0][:100]}")
    for each in optimizers:
        for parameter in each.parameters():
            state = dict(saved.get(names[parameter], {}))
            check_state(state, each, names[parameter], parameter)
            for key, value in state.items():
                value = value.to(parameter.device, parameter.dtype, copy=True)
                state[key] = value if key == "step" else sharded_as(parameter, value)
            each.state[parameter] = state


def check_state(
    state: dict[str, Tensor], optimizer: Optimizer, name: str, parameter: Tensor
) -> None:
    wanted = {"exp_avg", "exp_avg_sq", "step"}
    if isinstance(optimizer, Muon):
        wanted = {"momentum_buffer"}
    if set(state) != wanted:
        there, needed = ", ".join(sorted(state))[:60], ", ".join(sorted(wanted))
        raise UserError(
            f"the saved state of {name} is {there or 'missing'}; this run's "
            f"{type(optimizer).__name__} needs {needed}: keep the optimizer setting"
        )
    for key, value in state.items():
        shape = () if key == "step" else tuple(parameter.shape)
        if value.shape != shape:
            raise UserError(
                f"the saved {key} of {name} has shape {tuple(value.shape)}, not {shape}"
            )
        plain = value.layout == torch.strided and not value.is_meta
        if not (plain and value.dtype == torch.float32):
            raise UserError(f"the saved {key} of {name} is not a float32 tensor")
        if not value.isfinite().all() or (key in ("step", "exp_avg_sq") and value.min() < 0):
            raise UserError(f"the saved {key} of {name} holds NaN, infinite or negative values")
