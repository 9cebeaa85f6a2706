"""What a run starts from: fresh weights, the weights of a checkpoint, or a run to resume.

`open_start` reads everything but the weights, which is enough for a plan; `load_weights` adds them.
Settings come as a dict of TrainConfig's fields, which is how a checkpoint remembers them.
"""

import difflib
import math
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from configurator import UserError
from model import GPT, GPTConfig
from plaingpt import lora
from plaingpt.checkpoint import adapters, folders, store
from plaingpt.checkpoint.folders import Progress, State
from plaingpt.checkpoint.hugging_face import MAX_LAYERS, MAX_WIDTH, read_config
from plaingpt.text.dataset import Dataset
from plaingpt.text.recipe import GPT2_IDS, vocab_size_for
from plaingpt.text.tokenizer import MAX_VOCAB_SIZE, Tokenizer

SHAPE = ("n_layer", "n_head", "n_embd", "bias", "tie_weights")  # what a checkpoint decides
LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
FIXED = ("seed", "batch_size", "stride", *LORA)  # decide the order of the data, and the adapters
OPENAI = {  # n_layer, n_head, n_embd; known without a download
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}

Settings = dict[str, Any]


@dataclass(frozen=True)
class Start:
    model: GPT  # on the CPU; without memory ("meta") until load_weights
    source: Path | None = None  # the checkpoint folder that the weights are from
    adapter: lora.Adapter | None = None  # with LoRA: what trains in place of the weights
    base: Path | None = None  # with LoRA: the folder of the frozen model, which the run copies
    step: int = 0
    skipped: int = 0  # steps so far whose loss or gradient was not finite
    progress: Progress = field(default_factory=Progress)
    optimizer: dict[str, Any] = field(default_factory=dict)  # what optimizer.pt of `source` holds


def open_start(settings: Settings, defaults: Settings, dataset: Dataset | None) -> Start:
    """Fresh weights, those of a checkpoint, or the run to resume, as `init_from` and `resume` say.
    A plan needs no dataset.

    Raises UserError for a checkpoint of another shape, tokenizer or data, and if a new run would
    overwrite an older one.
    """
    if resumes(settings):
        return resumed(settings, defaults, dataset)
    found = folders.step_folders(settings["out_dir"])
    if found and not (settings["overwrite"] or settings["plan"]):
        raise UserError(f"{found[-1]} exists: {ways_on(settings)}")
    if settings["init_from"] != "scratch":
        return from_checkpoint(settings, defaults, dataset)
    ids = dataset.tokenizer.vocab_size if dataset else vocab_size_for(Path(settings["data_dir"]))
    return Start(outline(model_config(settings, ids)))


def ways_on(settings: Settings) -> str:
    """What a new run may do about the checkpoints in its out_dir, which may be another's."""
    starts = folders.read_starts(Path(settings["out_dir"]))
    trained_on = starts[-1].settings.get("data_dir") if starts else settings["data_dir"]
    if trained_on == settings["data_dir"]:
        return (
            "--init_from=resume continues it, --overwrite deletes it and starts over, "
            "--out_dir=OTHER leaves it alone"
        )
    other = f"out/{Path(settings['data_dir']).name}"
    name = "OTHER" if folders.step_folders(other) else shlex.quote(other)
    return f"a model trained on {trained_on}; --out_dir={name} leaves it alone"


def outline(config: GPTConfig) -> GPT:
    """A model of shapes only, which takes no memory."""
    with torch.device("meta"):
        return GPT(config)


def model_config(settings: Settings, vocab_size: int) -> GPTConfig:
    """The shape that the settings ask for. Raises UserError if it is impossible."""
    multiple = settings["vocab_multiple"]
    widest = max(settings["n_embd"], settings["block_size"] or 0)
    if settings["n_layer"] > MAX_LAYERS or widest > MAX_WIDTH:
        raise UserError(f"n_layer is at most {MAX_LAYERS:,}, n_embd and block_size {MAX_WIDTH:,}")
    if multiple > MAX_VOCAB_SIZE:
        raise UserError(f"vocab_multiple is at most {MAX_VOCAB_SIZE:,}: token ids are uint16")
    try:
        return GPTConfig(
            vocab_size=math.ceil(vocab_size / multiple) * multiple,
            block_size=settings["block_size"] or 256,
            dropout=settings["dropout"],
            **{name: settings[name] for name in SHAPE},
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def from_checkpoint(settings: Settings, defaults: Settings, dataset: Dataset | None) -> Start:
    """A new run from the weights of a checkpoint, with its shape.

    Raises UserError if the checkpoint cannot be opened, has another tokenizer than the data, or
    another shape than settings that differ from their `defaults`.
    """
    where, out_dir = settings["init_from"], Path(settings["out_dir"])
    words = ("scratch", "resume", *OPENAI)
    word = difflib.get_close_matches(where.lower(), words, n=1, cutoff=0.75)
    if word and where not in words and not Path(where).exists():
        raise UserError(f"init_from={where!r}: did you mean {word[0]!r}?")
    if settings["plan"] and where in OPENAI:
        folder, shape = None, openai_shape(where, settings, dataset)
    else:
        folder = folders.find(where)
        shape = read_config(
            model_and_adapter(folder)[0], settings["block_size"], settings["dropout"]
        )
        check_tokenizer(folder, shape, dataset)
    other = [
        f"{name}={settings[name]}, where {folder or where} has {getattr(shape, name)}"
        for name in SHAPE
        if settings[name] not in (defaults[name], getattr(shape, name))
    ]
    if other:
        raise UserError(f"init_from takes the shape of its checkpoint: {'; '.join(other)}")
    doomed = folders.step_folders(out_dir) if settings["overwrite"] else []
    if folder and any(map(folder.samefile, doomed)):
        raise UserError(f"--overwrite would remove {folder}, which init_from starts from")
    model, config = outline(shape), lora_config(settings)
    if config is None:
        return Start(model, folder)
    with torch.device("meta"):
        lora.add(model, config, settings["seed"])
    adapter = adapters.adapter_for(folder or Path(where), where, out_dir, config)
    return Start(model, folder, adapter, base=None if folders.on_hub(where) else folder)


def openai_shape(name: str, settings: Settings, dataset: Dataset | None) -> GPTConfig:
    """The shape of one of OpenAI's models. Raises UserError for data of another tokenizer, and for
    a block_size beyond its context."""
    if dataset and dataset.tokenizer.vocab_size != GPT2_IDS:
        raise other_tokenizer(name, "gpt2", dataset)
    block_size = settings["block_size"] or GPTConfig.block_size
    if block_size > GPTConfig.block_size:
        raise UserError(f"block_size={block_size} is beyond the 1024 positions of {name}")
    n_layer, n_head, n_embd = OPENAI[name]
    return GPTConfig(GPT2_IDS, block_size, n_layer, n_head, n_embd, settings["dropout"])


def resumes(settings: Settings) -> bool:
    """Whether to resume a run: from its newest checkpoint, or from the one that init_from names."""
    where = settings["init_from"]
    return where == "resume" or (settings["resume"] and where != "scratch")


def resumed_folder(settings: Settings) -> Path:
    """The checkpoint to resume from. Raises UserError if it is missing, or has no run."""
    own = settings["init_from"] == "resume"
    folder = folders.find(settings["out_dir"] if own else settings["init_from"])
    if not (folder / "state.json").exists():
        raise UserError(f"{folder} has no state.json: a run can start from it, but not resume it")
    return folder


def resumed(settings: Settings, defaults: Settings, dataset: Dataset | None) -> Start:
    """The run of a checkpoint, from its step on.

    Raises UserError if the checkpoint cannot be opened, if out_dir has others after it, or if the
    data, the tokenizer, or settings on which the rest of the run depends have changed.
    """
    folder = resumed_folder(settings)
    if not settings["plan"]:
        check_newest(folder, Path(settings["out_dir"]))
    state = folders.read_state(folder)
    before = saved_settings(state, defaults)
    base, adapter = model_and_adapter(folder)
    shape = read_config(base, before["block_size"], settings["dropout"])
    tokenizer = check_tokenizer(folder, shape, dataset)
    fixed = asdict(model_config(settings, tokenizer.vocab_size))
    fixed |= {name: settings[name] for name in FIXED}
    if settings["block_size"] is None:
        del fixed["block_size"]
    there = before | asdict(shape)
    changed = [
        f"{name} is {there[name]}, not {value}"
        for name, value in fixed.items()
        if there[name] != value
    ]
    if changed:
        raise UserError(f"cannot resume {folder} with other settings: {'; '.join(changed)}")
    if dataset and state.data != dataset.fingerprint:
        raise UserError(f"cannot resume {folder} on other data than it was trained on")
    progress = state.progress
    if before.get("eval_tokens") != settings["eval_tokens"]:  # losses over other windows
        progress = Progress(progress.loss_sum, progress.loss_steps)
    start = Start(
        outline(shape),
        folder,
        step=state.step,
        skipped=state.skipped,
        progress=progress,
    )
    if adapter is None:
        return start
    with torch.device("meta"):
        lora.add(start.model, adapter.config, settings["seed"])
    adapter = replace(adapter, config=lora_config(settings) or adapter.config)
    if not Path(adapter.base).is_absolute():  # on the hub
        return replace(start, adapter=adapter)
    place = str((Path(settings["out_dir"]) / adapters.BASE).resolve())
    return replace(start, adapter=replace(adapter, base=place), base=base)


def check_newest(folder: Path, out_dir: Path) -> None:
    """Raises UserError if out_dir has checkpoints that a run resumed from `folder` would run
    into."""
    found = folders.step_folders(out_dir)
    places = [each.resolve() for each in found]
    after = found[places.index(folder.resolve()) + 1 :] if folder.resolve() in places else found
    if after:
        raise UserError(
            f"{out_dir} has checkpoints up to {after[-1].name}, which are never overwritten: "
            f"--out_dir=OTHER continues {folder} in another folder, --init_from=resume continues "
            f"{after[-1]}"
        )


def load_weights(start: Start, settings: Settings) -> Start:
    """Fresh weights or those of the checkpoint; to resume, its optimizer state as well.

    Raises UserError if a file is missing, damaged, or does not fit the shape.
    """
    shape = start.model.config
    if start.source is None:
        return replace(start, model=GPT(shape).init_weights(settings["seed"]))
    model = store.load_model(
        start.source, block_size=shape.block_size, dropout=shape.dropout, merged=start.step == 0
    )
    if start.step:
        optimizer = store.read_optimizer(start.source)
        if not optimizer["parameters"] and start.skipped < start.step:
            raise UserError(
                f"{start.source}/optimizer.pt is empty: a run can start from {start.source}, but "
                "not resume it"
            )
        return replace(start, model=model, optimizer=optimizer)
    if start.adapter is None:
        return replace(start, model=model)
    adapter = replace(start.adapter, base_fingerprint=lora.fingerprint(model))
    lora.add(model, adapter.config, settings["seed"])
    return replace(start, model=model, adapter=adapter)


def saved_settings(state: State, defaults: Settings) -> Settings:
    """The settings in a checkpoint's state.json, with `defaults` for those that it is too old to
    have."""
    saved = state.settings
    return defaults | {name: saved[name] for name in defaults.keys() & saved.keys()}


def shape_of(start: Start, settings: Settings, vocab_size: int) -> Settings:
    """The shape of the opened model as settings, to be saved for resuming."""
    config = start.model.config
    shape = {name: getattr(config, name) for name in SHAPE}
    if model_config(settings | shape, vocab_size).vocab_size != config.vocab_size:
        shape["vocab_multiple"] = config.vocab_size  # which the vocabulary is rounded up to
    return shape


def model_and_adapter(folder: Path) -> tuple[Path, lora.Adapter | None]:
    """The folder with the model of a checkpoint, and the adapter if the checkpoint is one."""
    if not folders.is_adapter(folder):
        return folder, None
    adapter = adapters.describe(folder)
    return adapters.base_folder(folder, adapter), adapter


def check_tokenizer(folder: Path, shape: GPTConfig, dataset: Dataset | None) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises UserError if it is not that of the data."""
    tokenizer = store.load_tokenizer(folder)
    store.check_vocabulary(folder, tokenizer, shape)
    if dataset and tokenizer.fingerprint != dataset.tokenizer.fingerprint:
        raise other_tokenizer(folder, folder, dataset)
    return tokenizer


def other_tokenizer(model: Path | str, tokenizer: Path | str, dataset: Dataset) -> UserError:
    makes = f"prepare.py with --tokenizer={shlex.quote(str(tokenizer))} and another --data_dir"
    return UserError(f"{model} has another tokenizer than {dataset.folder}; {makes} makes its data")


def lora_config(settings: Settings) -> lora.LoRAConfig | None:
    """None where all weights train. Raises UserError for settings out of range."""
    if not settings["lora_rank"]:
        return None
    return lora.LoRAConfig(*(settings[name] for name in LORA))
