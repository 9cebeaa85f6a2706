"""
Draw the pictures of docs/walk, from a trained model.

    python -m tools.figures
    python -m tools.figures --checkpoint=out/novel --data_dir=data/novel --out_dir=pictures
    python -m tools.figures --text="import os" --out_dir=pictures

tokens.png: the tokens of the text with their ids; attention.png: which token attends to which, in
each head; loss.png: what each token adds to the loss; muon.png: the singular values of a gradient
before and after Muon orthogonalizes it; schedule.png: learning rates, which need no model.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # for python tools/figures.py

import configurator
from configurator import Folder, NonEmpty, PathName, UserError

TEXT = "def area(width, height):\n    return width * height\n"


@dataclass(frozen=True)
class FiguresConfig:
    checkpoint: PathName = "out/stdlib"  # a run (last step), RUN/best, a step, gpt2, hf:OWNER/NAME
    data_dir: Folder = "data/stdlib"  # whose first batch gives the gradient of muon.png
    text: NonEmpty = TEXT  # what the other pictures show
    out_dir: Folder = "docs/walk"  # where they go


if __name__ == "__main__":
    configurator.answer_help(FiguresConfig)  # before torch is imported, which takes a second

import math
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from model import GPT, Block
from plaingpt.checkpoint import store
from plaingpt.files import atomic_file
from plaingpt.text.comparison import visible
from plaingpt.text.dataset import open_dataset
from plaingpt.text.shards import Split
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training.batches import Batches
from plaingpt.training.optim import orthogonalize
from plaingpt.training.schedule import LearningRate, ScheduleName
from plaingpt.wording import quantity
from tools.insight import attention, scored

LONGEST = 60  # tokens
COLUMNS = 56  # of a line of tokens
MAPS = 4  # layers whose attention is drawn, and heads
MONOSPACE: dict[str, Any] = {"family": "monospace", "ha": "center", "va": "center"}


def draw(cfg: FiguresConfig) -> list[Path]:
    """Write all pictures; return their paths.

    Raises UserError for a checkpoint or data that cannot be opened or have different tokenizers,
    and for a text of one token or too many.
    """
    configurator.validate(cfg)
    model, tokenizer = store.load(cfg.checkpoint)
    data = open_dataset(cfg.data_dir)
    if data.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{cfg.checkpoint} and {cfg.data_dir} have different tokenizers")
    model.eval()
    ids = tokenizer.encode(cfg.text)
    longest = min(LONGEST, model.config.block_size)
    if not 2 <= len(ids) <= longest:
        raise UserError(f"text has {quantity(len(ids), 'token')}: expected 2 to {longest}")
    figures = {
        "tokens": draw_tokens(ids, tokenizer),
        "attention": draw_attention(model, ids, tokenizer),
        "loss": draw_loss(model, ids, tokenizer),
        "muon": draw_muon(model, data.split("train")),
        "schedule": draw_schedule(),
    }
    paths = []
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        paths.append(Path(cfg.out_dir, f"{name}.png"))
        with atomic_file(paths[-1]) as partial:
            FigureCanvasAgg(figure).print_png(str(partial))
        print(f"wrote {paths[-1]}")
    return paths


def pieces_of(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    return [visible(tokenizer.encoding.decode_single_token_bytes(token)) for token in ids]


def draw_tokens(ids: list[int], tokenizer: Tokenizer) -> Figure:
    """Each token in a box, above its id."""
    places, x, y = [], 0, 0
    for token, piece in zip(ids, pieces_of(ids, tokenizer)):
        width = max(len(piece), len(str(token))) + 1
        if x and x + width > COLUMNS:
            x, y = 0, y - 3
        places.append((x, y, width, piece, token))
        x += width
    figure = Figure(figsize=(7, 0.6 * (1 - y / 3)), layout="constrained")
    axes = figure.subplots()
    for number, (x, y, width, piece, token) in enumerate(places):
        color = f"C{number % 10}"
        axes.broken_barh([(x + 0.1, width - 0.2)], (y, 2), facecolor=color, alpha=0.25)
        axes.text(x + width / 2, y + 1.35, piece, fontsize=10, **MONOSPACE)
        axes.text(x + width / 2, y + 0.5, str(token), fontsize=7, color="0.35", **MONOSPACE)
    axes.set(xlim=(0, COLUMNS), ylim=(y - 0.3, 2.3))
    axes.axis("off")
    return figure


def draw_attention(model: GPT, ids: list[int], tokenizer: Tokenizer) -> Figure:
    """A map for each of the first heads of the first layers: a row shows where a token looks."""
    maps = torch.zeros(model.config.n_layer, model.config.n_head, len(ids), len(ids))
    for end in range(1, len(ids) + 1):
        maps[:, :, end - 1, :end] = attention(model, ids[:end])
    maps = maps[:MAPS, :MAPS]
    layers, heads = maps.shape[:2]
    figure = Figure(figsize=(1 + 3 * heads, 3 * layers), layout="constrained")
    pieces = pieces_of(ids, tokenizer)
    for place, axes in enumerate(figure.subplots(layers, heads, squeeze=False).flat):
        layer, head = divmod(place, heads)
        axes.imshow(maps[layer, head].numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"layer {layer}, head {head}", fontsize=9)
        axes.set_xticks(range(len(ids)), pieces, rotation=90, fontsize=6, family="monospace")
        axes.set_yticks(range(len(ids)), pieces, fontsize=6, family="monospace")
    return figure


def draw_loss(model: GPT, ids: list[int], tokenizer: Tokenizer) -> Figure:
    """The loss of each token but the first, and the mean that training makes smaller."""
    losses = [-math.log(each["probability"]) for each in scored(model, tokenizer, ids)[1:]]
    mean = sum(losses) / len(losses)
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(losses)), losses, color="C0", alpha=0.7)
    axes.axhline(mean, color="C1", label=f"mean: {mean:.2f}")
    pieces = pieces_of(ids[1:], tokenizer)
    axes.set_xticks(range(len(losses)), pieces, rotation=90, fontsize=8, family="monospace")
    axes.set_ylabel("loss (nats)")
    axes.legend()
    return figure


def draw_muon(model: GPT, split: Split) -> Figure:
    """The singular values of the gradient of a matrix, as shares of the largest, and those of the
    update that Muon makes of it."""
    block, length = model.transformer.h[0], model.config.block_size
    assert isinstance(block, Block)
    x, y, mask = Batches(split, batch_size=8, block_size=length, seed=1337, stride=length)(0)
    model(x, y, mask).backward()
    gradient = block.mlp.c_fc.weight.grad
    assert gradient is not None
    before = torch.linalg.svdvals(gradient).numpy()
    after = torch.linalg.svdvals(orthogonalize(gradient[None])[0].float()).numpy()
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(before / before[0], label="gradient, as shares of the largest")
    axes.plot(after, label="update")
    axes.set(xlabel="singular values, from the largest", ylim=(0, 1.4))
    axes.legend()
    return figure


def draw_schedule() -> Figure:
    """The learning rate over the steps of the quick start, and with cosine and a warm-up."""
    lines: list[tuple[ScheduleName, int]] = [("wsd", 0), ("cosine", 100)]
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes = figure.subplots()
    for schedule, warmup in lines:
        rate = LearningRate(1750, 0.01, 0.0, warmup, schedule, decay_fraction=0.5)
        label = f"--schedule={schedule} --warmup_steps={warmup}"
        axes.plot([rate.at(step) for step in range(1750)], label=label)
    axes.set(xlabel="step", ylabel="learning rate")
    axes.legend()
    return figure


def main(argv: list[str] | None = None) -> int:
    return configurator.command(FiguresConfig, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
