"""What a run will do, how much memory it needs and how long it takes, in sentences."""

import math

from plaingpt.training.memory import memory_gib, what_fits
from plaingpt.training.plan import Plan
from plaingpt.wording import duration, quantity

WORTHWHILE = 4  # epochs up to which repeated text is almost as good as new (arXiv 2305.16264)


def sentences(plan: Plan) -> list[str]:
    config, sizes = plan.config, plan.sizes
    processes = f"{plan.world_size} processes × " if plan.world_size > 1 else ""
    needed, available = memory_gib(plan), plan.device.memory_gib
    lines = [
        f"Model: {sizes.total:,} parameters; {quantity(config.n_layer, 'layer')}, "
        f"{quantity(config.n_head, 'head')}, {config.n_embd} wide, context "
        f"{config.block_size:,}, vocabulary {config.vocab_size:,}.",
        *lora_sentence(plan),
        f"Step: {quantity(plan.batch_size, 'sequence')} × {config.block_size:,} = "
        f"{quantity(plan.tokens_per_step, 'token')}, in {processes}"
        f"{quantity(plan.micro_steps, 'micro-step')} of "
        f"{quantity(plan.micro_batch_size, 'sequence')}.",
        *run_sentences(plan),
        f"Compute: {plan.max_steps * plan.flops_per_step:.3g} floating-point operations, "
        f"on {plan.device.name} in {str(plan.dtype).removeprefix('torch.')}.",
        f"Optimizer: {plan.optimizer.name}, learning rate {plan.learning_rate.peak:g}"
        + (f" ({plan.rate_source})." if plan.rate_source else "."),
        f"Memory: about {needed:.1f} GiB"
        + (f" of the {available:.0f} GiB of {plan.device.name}." if available else "."),
    ]
    if plan.learning_rate.warmup_steps >= plan.max_steps:
        lines.append(
            f"warmup_steps={plan.learning_rate.warmup_steps:,} >= max_steps: the peak learning "
            "rate is never reached."
        )
    if plan.fsdp and plan.world_size == 1:
        lines.append("--fsdp has no effect with one process.")
    if available and needed > available:
        lines.append(f"This will not fit: {what_fits(plan, available)}.")
    return lines


def lora_sentence(plan: Plan) -> list[str]:
    if not plan.lora:
        return []
    share = plan.sizes.trained / plan.sizes.total
    return [
        f"LoRA: {plan.sizes.trained:,} parameters train ({share:.1%}), "
        f"rank {plan.lora.rank} on {', '.join(plan.lora.targets)}."
    ]


def run_sentences(plan: Plan) -> list[str]:
    tokens = plan.max_steps * plan.tokens_per_step
    run = f"Run: {quantity(plan.max_steps, 'step')}, {quantity(tokens, 'token')}, "
    run += f"{tokens / plan.sizes.total:.1f} per parameter"
    if plan.epochs:
        run += f", {plan.epochs:,.2f} epochs of {quantity(plan.split_tokens, 'token')}"
    lines = [f"{run}."]
    if plan.done:
        tokens = plan.steps_left * plan.tokens_per_step
        lines.append(f"Left: {quantity(plan.steps_left, 'step')}, {quantity(tokens, 'token')}.")
    if plan.tasks:
        times = quantity(plan.measuring.count(plan.done, plan.max_steps) + baseline(plan), "time")
        reads = quantity(plan.task_tokens, "token")
        lines.append(f"Tasks: {', '.join(plan.tasks)}; measured {times}, {reads} each.")
    if plan.patience < math.inf:
        so_far = f" ({plan.waited:,} so far)" if plan.waited else ""
        lines.append(f"Ends early after {without_better(int(plan.patience))}{so_far}.")
    if plan.fresh and plan.epochs > WORTHWHILE:
        lines.append(
            f"This run reads its text {plan.epochs:,.0f} times: repetition teaches less and less "
            f"beyond {WORTHWHILE} epochs, and next to nothing beyond 16 (arXiv 2305.16264). "
            "Use more text or fewer steps."
        )
    return lines


def baseline(plan: Plan) -> int:
    """1 for a run that evaluates the model that it starts from, else 0."""
    return int(plan.done == 0 and not plan.fresh)


def without_better(evaluations: int) -> str:
    return f"{quantity(evaluations, 'evaluation')} without a better validation loss"


def time_sentence(plan: Plan, step_s: float, how: str) -> str:
    """How long the rest of the run takes at `step_s` seconds per step; `how` says where that figure
    comes from.

    Evaluating a token takes a third as long as training on it: there is no backward pass.
    """
    evaluations = plan.evaluation.count(plan.done, plan.max_steps) + baseline(plan)
    measurements = plan.measuring.count(plan.done, plan.max_steps) + baseline(plan)
    tokens = evaluations * plan.eval_tokens + measurements * plan.task_tokens
    steps = plan.steps_left + tokens / plan.tokens_per_step / 3
    step = f"{1000 * step_s:,.0f} ms" if step_s < 10 else f"{step_s:,.0f} s"
    return f"Time: about {duration(step_s * steps)}, {step} per step, {how}."
