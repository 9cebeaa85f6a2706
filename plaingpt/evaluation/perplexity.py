"""Perplexity and bits per byte: of the validation split, or of a text."""

import math

from configurator import UserError
from model import GPT
from plaingpt.evaluation.results import Result
from plaingpt.runtime import Runtime
from plaingpt.text.dataset import Dataset
from plaingpt.training import evaluation
from plaingpt.wording import quantity

BATCH_SIZE = 8  # windows per batch


def of_split(model: GPT, data: Dataset, max_windows: int | None, rt: Runtime) -> Result:
    """The perplexity of the validation split of prepared data, over at most `max_windows` windows.

    Raises UserError if no token counts in the loss, and for a model whose loss is not finite.
    """
    split, block_size = data.split("val"), model.config.block_size
    max_tokens = max_windows and max_windows * block_size
    loss, tokens = evaluation.validation_loss(model, split, max_tokens, BATCH_SIZE, rt)
    if not tokens:
        raise UserError(f"no token of {data.folder}, up to limit, counts in the loss")
    protocol = f"windows of {block_size:,} tokens that do not overlap"
    if split.has_mask:
        protocol += ", answers only"
    return as_result("perplexity", protocol, loss, tokens, data.bytes_per_token(split))


def as_result(
    task: str, protocol: str, loss: float, tokens: int, bytes_per_token: float | None
) -> Result:
    """The figures that follow from a loss in nats per token, the mean over `tokens`.

    Raises UserError for a loss that is not finite.
    """
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss}: the weights of the checkpoint are too large")
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": tokens}
    if bytes_per_token:
        figures["bits_per_byte"] = evaluation.bits_per_byte(loss, bytes_per_token)
    return Result(task, protocol, figures)


def summary(result: Result) -> str:
    figures = result.figures
    text = f"perplexity {figures['perplexity']:.4g}, {figures['loss']:.4f} nats per token"
    if "bits_per_byte" in figures:
        text += f", {figures['bits_per_byte']:.4f} bits per byte"
    return f"{text} ({quantity(int(figures['tokens']), 'token')}; {result.protocol})"
