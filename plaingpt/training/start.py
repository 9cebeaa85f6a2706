"""What a run starts from: fresh weights, the weights of a checkpoint, or a run to resume.

Settings come as a dict of TrainConfig's fields, which is how a checkpoint remembers them.
"""

import difflib
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from configurator import UserError
from model import GPT, GPTConfig
from plaingpt import lora
from plaingpt.checkpoint import adapters, folders, store
from plaingpt.checkpoint.folders import State
from plaingpt.text.dataset import Dataset

SHAPE = ("n_layer", "n_head", "n_embd", "bias", "tie_weights")  # what a checkpoint decides
LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
FIXED = ("seed", "batch_size", "stride", *LORA)  # decide the order of the data, and the adapters

Settings = dict[str, Any]


@dataclass(frozen=True)
class Start:
    model: GPT  # on the CPU; without memory ("meta") if it is only planned
    source: Path | None = None  # the checkpoint folder that the weights are from
    adapter: lora.Adapter | None = None  # with LoRA: what trains in place of the weights
    step: int = 0
    skipped: int = 0  # steps so far whose loss or gradient was not finite
    optimizer: dict[str, Any] = field(default_factory=dict)  # what optimizer.pt of `source` holds


def open_start(settings: Settings, defaults: Settings, dataset: Dataset) -> Start:
    """Fresh weights, those of a checkpoint, or the run to resume, as `init_from` says.

    Raises UserError for a checkpoint of another shape, tokenizer or data, and if a new run would
    overwrite an older one.
    """
    if settings["init_from"] == "resume":
        return resumed(settings, defaults, dataset)
    found = folders.step_folders(settings["out_dir"])
    if found and not (settings["overwrite"] or settings["plan"]):
        raise UserError(
            f"{found[-1]} exists: --init_from=resume continues it, --overwrite starts over, "
            "--out_dir=OTHER leaves it alone"
        )
    if settings["init_from"] != "scratch":
        return from_checkpoint(settings, defaults, dataset)
    vocab_size = dataset.tokenizer.vocab_size
    if settings["plan"]:
        return planned_start(settings, vocab_size)
    return Start(GPT(model_config(settings, vocab_size)).init_weights(settings["seed"]))


def planned_start(settings: Settings, vocab_size: int) -> Start:
    """A new model without memory, for --plan."""
    with torch.device("meta"):
        return Start(GPT(model_config(settings, vocab_size)))


def model_config(settings: Settings, vocab_size: int) -> GPTConfig:
    """The shape that the settings ask for. Raises UserError if it is impossible."""
    multiple = settings["vocab_multiple"]
    try:
        return GPTConfig(
            vocab_size=math.ceil(vocab_size / multiple) * multiple,
            block_size=settings["block_size"] or 256,
            dropout=settings["dropout"],
            **{name: settings[name] for name in SHAPE},
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def from_checkpoint(settings: Settings, defaults: Settings, dataset: Dataset) -> Start:
    """A new run from the weights of a checkpoint, with its shape.

    Raises UserError if the checkpoint cannot be opened, has another tokenizer than the data, or
    another shape than settings that differ from their `defaults`.
    """
    where, out_dir = settings["init_from"], Path(settings["out_dir"])
    word = difflib.get_close_matches(where.lower(), ("scratch", "resume"), n=1, cutoff=0.8)
    if word and not Path(where).exists():
        raise UserError(f"init_from={where!r}: did you mean {word[0]!r}?")
    folder = folders.find(where)
    model = open_model(folder, settings, dataset, merged=True)
    other = [
        f"{name}={settings[name]}, where {folder} has {getattr(model.config, name)}"
        for name in SHAPE
        if settings[name] not in (defaults[name], getattr(model.config, name))
    ]
    if other:
        raise UserError(f"init_from takes the shape of its checkpoint: {'; '.join(other)}")
    if settings["overwrite"] and folder in folders.step_folders(out_dir):
        raise UserError(f"--overwrite would remove {folder}, which init_from starts from")
    config = lora_config(settings)
    if config is None:
        return Start(model, folder)
    adapter = adapters.adapter_for(folder, where, out_dir, model, config)
    lora.add(model, config, settings["seed"])
    return Start(model, folder, adapter)


def resumed(settings: Settings, defaults: Settings, dataset: Dataset) -> Start:
    """The run of the newest checkpoint in out_dir, from its step on.

    Raises UserError if the checkpoint cannot be opened, or if the data, the tokenizer, or settings
    on which the rest of the run depends have changed.
    """
    folder = folders.find(settings["out_dir"])
    state = folders.read_state(folder)
    before = saved_settings(state, defaults)
    as_before = settings | {"block_size": before["block_size"]}
    model = open_model(folder, as_before, dataset, merged=False)
    fixed = asdict(model_config(settings, dataset.tokenizer.vocab_size))
    fixed |= {name: settings[name] for name in FIXED}
    if settings["block_size"] is None:
        del fixed["block_size"]
    there = before | asdict(model.config)
    changed = [
        f"{name} is {there[name]}, not {value}"
        for name, value in fixed.items()
        if there[name] != value
    ]
    if changed:
        raise UserError(f"cannot resume {folder} with other settings: {'; '.join(changed)}")
    if state.data != dataset.fingerprint:
        raise UserError(f"cannot resume {folder} on other data than it was trained on")
    adapter = None
    if config := lora_config(settings):
        adapter = replace(adapters.describe(folder), config=config)
    optimizer = store.read_optimizer(folder)
    if not optimizer["parameters"] and state.skipped < state.step:
        raise UserError(
            f"{folder}/optimizer.pt is empty: a run can start from {folder}, not resume"
        )
    return Start(model, folder, adapter, state.step, state.skipped, optimizer)


def saved_settings(state: State, defaults: Settings) -> Settings:
    """The settings in the state.json of a checkpoint; the `defaults` of those newer than it."""
    saved = state.settings
    return defaults | {name: saved[name] for name in defaults.keys() & saved.keys()}


def shape_of(start: Start, settings: Settings, vocab_size: int) -> Settings:
    """The shape of the opened model as settings, to be saved for resuming."""
    config = start.model.config
    shape = {name: getattr(config, name) for name in SHAPE}
    if model_config(settings | shape, vocab_size).vocab_size != config.vocab_size:
        shape["vocab_multiple"] = config.vocab_size  # which the vocabulary is rounded up to
    return shape


def open_model(folder: Path, settings: Settings, dataset: Dataset, merged: bool) -> GPT:
    model, tokenizer = store.load(
        folder, block_size=settings["block_size"], dropout=settings["dropout"], merged=merged
    )
    if tokenizer.fingerprint != dataset.tokenizer.fingerprint:
        raise UserError(f"{folder} has another tokenizer than {dataset.folder}")
    return model


def lora_config(settings: Settings) -> lora.LoRAConfig | None:
    """None where all weights train. Raises UserError for settings out of range."""
    if not settings["lora_rank"]:
        return None
    return lora.LoRAConfig(*(settings[name] for name in LORA))
