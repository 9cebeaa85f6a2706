"""What changes during a run: the model on its device, its optimizers, and its progress."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from msgspec.structs import replace
from torch import Tensor

from configurator import UserError
from model import GPT
from plaingpt import lora
from plaingpt.checkpoint import store
from plaingpt.checkpoint.folders import Progress, State
from plaingpt.runtime import Runtime
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training import optim, parallel
from plaingpt.training.optim import Optimizer
from plaingpt.training.plan import Plan
from plaingpt.training.start import Start


@dataclass
class TrainState:
    model: GPT
    fast_model: GPT  # the model, compiled where that pays; evaluations use it
    step_model: Callable[..., Tensor]  # fast_model, wrapped in DDP if there are several processes
    tokenizer: Tokenizer
    adapter: lora.Adapter | None  # with LoRA: what trains and is saved, in place of the weights
    optimizers: list[Optimizer]
    scaler: torch.amp.GradScaler  # enabled in float16 only
    step: int  # steps done
    skipped: int  # of those, the ones whose loss or gradient was not finite
    progress: Progress
    skipped_in_a_row: int = 0

    def count(self, loss: float, finite: bool) -> None:
        """Count a step, which updated the weights if it was `finite`."""
        self.step += 1
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if finite:
            total, steps = self.progress.loss_sum + loss, self.progress.loss_steps + 1
            self.progress = replace(self.progress, loss_sum=total, loss_steps=steps)

    def read_loss(self) -> float:
        """The mean loss of the finite steps since the last reading; nan if there are none."""
        total, steps = self.progress.loss_sum, self.progress.loss_steps
        self.progress = replace(self.progress, loss_sum=0.0, loss_steps=0)
        return total / steps if steps else math.nan

    def count_evaluation(self, val_loss: float) -> None:
        """Count an evaluation, which is the best so far or one more without a better loss."""
        best = self.progress.best_val_loss
        if math.isfinite(val_loss) and (best is None or val_loss < best):
            self.progress = replace(self.progress, best_val_loss=val_loss, waited=0)
        else:
            self.progress = replace(self.progress, waited=self.progress.waited + 1)


def make_state(start: Start, tokenizer: Tokenizer, plan: Plan, rt: Runtime) -> TrainState:
    """Move the model of a start to its device, or shard it, and give it its optimizers."""
    model = start.model
    model.transformer.recompute = plan.activation_checkpointing
    model.transformer.stream_dtype = stream_dtype(rt)
    if plan.sharded:
        parallel.shard(model, rt)
    else:
        rt.place(model)
    optimizers = optim.build_optimizers(model, plan.optimizer)
    scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16)
    if start.optimizer:
        try:
            optim.load_optimizer_state(model, optimizers, start.optimizer["parameters"])
        except UserError as error:
            raise UserError(f"{start.source}/optimizer.pt: {error}") from None
        if start.optimizer["scaler"]:  # {} if the run had another dtype
            scaler.load_state_dict(start.optimizer["scaler"])
        start.optimizer.clear()  # it is up to twice as large as the model
    fast_model = maybe_compiled(model, plan, rt)
    step_model: Callable[..., Tensor] = fast_model
    compiled = fast_model is not model
    if rt.world_size > 1 and not plan.sharded:
        step_model = parallel.average_gradients(fast_model, compiled, rt)
    return TrainState(
        model,
        fast_model,
        step_model,
        tokenizer,
        start.adapter,
        optimizers,
        scaler,
        step=start.step,
        skipped=start.skipped,
        progress=start.progress,
    )


def stream_dtype(rt: Runtime) -> torch.dtype | None:
    """The dtype of the residual stream in training, None for that of the weights: bf16 on GPUs
    that train in it, half the bytes to read and write in each block."""
    return torch.bfloat16 if (rt.device.type, rt.dtype) == ("cuda", torch.bfloat16) else None


def maybe_compiled(model: GPT, plan: Plan, rt: Runtime) -> GPT:
    """The model as steps and evaluations call it, tried once; "auto" compiles on GPUs.

    It is tried with what a step and an evaluation give it, and outside of DDP: otherwise the first
    step would compile again, and in pieces. Tasks and samples are not compiled, because their
    shapes vary. Raises UserError if compiling is asked for and fails, and OutOfMemoryError; "auto"
    says what failed and trains without it.
    """
    if plan.compile is False or (plan.compile == "auto" and not worth_compiling(rt)):
        return model
    compiled = torch.compile(model, dynamic=False)
    blocks: Iterable[Any] = model.transformer.h if parallel.is_sharded(model) else ()
    for block in blocks:  # FSDP's hooks around them end a graph
        block.forward = torch.compile(block.forward, dynamic=False)
    shape = (plan.micro_batch_size, model.config.block_size)
    tokens = torch.zeros(shape, dtype=torch.long, device=rt.device)
    mask = torch.ones(shape, device=rt.device) if plan.masked else None
    reason = ""
    try:
        with rt.autocast():
            with torch.no_grad():
                model.eval()
                compiled(tokens, tokens.clone(), torch.ones(shape, device=rt.device))
            model.train()
            # After the evaluation, which leaves FSDP's outer weights gathered: zero_grad would miss
            # the gradients of their shards.
            compiled(tokens, tokens.clone(), mask).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a missing compiler, an unsupported platform, …: many kinds
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    model.train()
    model.zero_grad(set_to_none=True)
    if not rt.any(bool(reason)):
        return cast(GPT, compiled)  # it has the attributes of the model
    for block in blocks:
        del block.forward  # the compiled one, so that it is its class's again
    reason = reason or "in another process"
    if plan.compile is True:
        raise UserError(f"--compile=true does not work here ({reason})")
    print(f"torch.compile does not work here ({reason}); training without it")
    return model


def worth_compiling(rt: Runtime) -> bool:
    """On a CPU, compiling takes longer than a small run."""
    return rt.device.type == "cuda"


def snapshot_of(state: TrainState, about: dict[str, Any], rt: Runtime) -> store.Snapshot | None:
    """What a checkpoint holds, put together by all processes, each of which may hold a part of the
    tensors; None in all but the main one. On a CPU the tensors are the model's own.

    `about` holds the other fields of state.json.
    """
    model = state.model
    # before the moments: state_dict shards again what an evaluation left gathered
    tensors = lora.adapter_tensors(model.weights()) if state.adapter else model.weights()
    weights = parallel.gather_to_main(tensors, rt)
    parameters = {
        name: parallel.gather_to_main(moments, rt)
        for name, moments in optim.optimizer_state(model, state.optimizers).items()
    }
    if not rt.is_main:
        return None
    optimizer = {"parameters": parameters, "scaler": state.scaler.state_dict()}
    saved = State(
        step=state.step,
        world_size=rt.world_size,
        skipped=state.skipped,
        progress=state.progress,
        **about,
    )
    return store.Snapshot(model.config, weights, state.tokenizer, optimizer, saved, state.adapter)
