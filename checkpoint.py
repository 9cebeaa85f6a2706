"""
Checkpoint folders: written whole or not at all, found, checked and loaded.

`out_dir/step_000500/` is a Hugging Face GPT-2 (config.json, model.safetensors,
generation_config.json, the tokenizer's files) plus optimizer.pt and state.json for resuming.
A run with LoRA saves an adapter of peft's in place of a model, which says what it is an adapter of.
It is written under another name, flushed and renamed, so a folder with its final name is whole.
Nothing here unpickles code: weights are safetensors, the optimizer's tensors a `weights_only` load.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import lora
from configurator import one_line
from model import EPSILON, GPT, INIT_STD, GPTConfig
from tokenizer import Tokenizer

STEP_FOLDER = re.compile(r"step_(\d{6,})")
PARTIAL = ".partial_"  # prefix of a folder still being written, or already being removed
BIAS = re.compile(r"(ln_1|ln_2|ln_f|c_attn|c_proj|c_fc)\.bias$")
# GPT-2's Conv1D keeps these as (in, out), nn.Linear as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_NAMES = {name: f"hf:openai-community/{name}" for name in OPENAI}
HUB_NAME = re.compile(r"hf:(?P<repo_id>[^/:@\s]+/[^/:@\s]+)(?:@(?P<revision>\S+))?")
HUB_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
HUB_FILES += ["model*.safetensors*", *ADAPTER_FILES]
BASE = "base"  # where a run keeps the model that its adapters are for


# --- saving


def save(
    out_dir: Path,
    step: int,
    config: GPTConfig,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer,
    optimizer: dict[str, Any],
    state: dict[str, Any],
    adapter: lora.Adapter | None = None,
) -> Path:
    """Write `out_dir/step_<step>`, a new folder; return its path.

    `weights` are a model's state_dict, `optimizer` holds tensors by parameter name, `state` what
    JSON can carry. With `adapter`, `weights` are only those of its layers.
    Raises OSError where the disk does not take it all, and leaves nothing of it.
    """
    remove_leftovers(out_dir)
    folder = out_dir / f"step_{step:06d}"
    if folder.exists():  # two renames would leave a moment with neither
        raise OSError(f"{folder} is in the way of a checkpoint")
    with whole_or_not_at_all(folder) as partial:
        write_model(partial, config, weights, tokenizer, adapter)
        torch.save(optimizer, partial / "optimizer.pt")
        write_json(partial / "state.json", state)
    return folder


@contextlib.contextmanager
def whole_or_not_at_all(folder: Path) -> Iterator[Path]:
    """A folder to write into that gets the name `folder` in the end, once the disk has all of it.

    Raises OSError where the disk does not take it, and leaves nothing.
    """
    partial = folder.with_name(f"{PARTIAL}{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.iterdir(), partial]:
            flush(path)
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (safetensors.SafetensorError, RuntimeError, OSError)):
            raise OSError(f"could not write {folder}: {error}") from error
        raise
    flush(folder.parent)


def write_model(
    folder: Path,
    config: GPTConfig,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer,
    adapter: lora.Adapter | None = None,
) -> None:
    """Write what `transformers` needs, or with `adapter` what peft does, into an empty folder."""
    tokenizer.save(folder)
    ids = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    metadata = {"format": "pt"}
    if adapter:
        about, file = (folder / name for name in ADAPTER_FILES)
        write_json(about, lora.to_peft(adapter))
        metadata["base_fingerprint"] = adapter.base_fingerprint or ""
        weights = {lora.PREFIX + name: tensor for name, tensor in weights.items()}
    else:
        about, file = folder / "config.json", folder / "model.safetensors"
        write_json(about, {**config_to_hugging_face(config), **ids})
        weights = to_hugging_face(weights, config)
    safetensors.torch.save_file(weights, file, metadata)
    shutil.copymode(about, file)  # else 0600
    # Without these, transformers takes the likeliest token always, and 256 of them whatever fits.
    how = {"do_sample": True, "max_new_tokens": max(config.block_size // 2, 1)}
    ids |= {"pad_token_id": tokenizer.eot_id}
    write_json(folder / "generation_config.json", ids | how)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, and on the disk."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    flush(new)
    new.replace(path)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or folder (folders: POSIX only)."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Delete a checkpoint so that no moment shows half of one under its final name."""
    doomed = folder.with_name(f"{PARTIAL}old_{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(out_dir: Path) -> None:
    for partial in out_dir.glob(f"{PARTIAL}*"):
        shutil.rmtree(partial)


def prune(out_dir: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints and the one of the lowest validation loss."""
    folders = steps(out_dir)
    losses = {folder: read_state(folder).get("val_loss") for folder in folders}
    evaluated = [(loss, folder) for folder, loss in losses.items() if loss is not None]
    best = min(evaluated)[1] if evaluated else None
    for folder in folders[:-keep]:
        if folder != best:
            remove(folder)


# --- finding


def steps(out_dir: Path | str) -> list[Path]:
    """The whole checkpoints of a run folder, oldest first; what others call so is none."""
    paths = Path(out_dir).glob("step_*/state.json")
    found = [path.parent for path in paths if STEP_FOLDER.fullmatch(path.parent.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def find(where: Path | str) -> Path:
    """The checkpoint folder that `where` means: a run folder (its newest), one itself, one of
    OpenAI's (gpt2, gpt2-medium, gpt2-large, gpt2-xl), or hf:OWNER/NAME[@REVISION] on the hub.

    Raises ValueError where there is none.
    """
    name = str(where)
    if name in HUB_NAMES or name.startswith("hf:"):
        return download(name)
    folder = Path(where)
    if steps(folder):
        return steps(folder)[-1]
    if (folder / "config.json").exists() or is_adapter(folder):
        return folder
    what = "holds no checkpoint" if folder.exists() else "does not exist"
    raise ValueError(f"{folder} {what}; train.py --out_dir={folder} makes one")


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_FILES[0]).exists()


def on_hub(where: str) -> re.Match[str] | None:
    """The repo_id and revision that gpt2 … gpt2-xl and hf:OWNER/NAME[@REVISION] stand for; None for
    other names."""
    return HUB_NAME.fullmatch(HUB_NAMES.get(where, where))


def download(name: str) -> Path:
    """The folder of a model of the hub, in huggingface_hub's cache (HF_HOME): what is not there yet
    is downloaded, what was cut short is gone on with.

    Raises ValueError where it is neither cached nor to be had.
    """
    import huggingface_hub  # not at the top: 0.3 s

    named = on_hub(name)
    if not named:
        raise ValueError(f"{name} is not of the form hf:OWNER/NAME[@REVISION]")
    try:
        found = huggingface_hub.snapshot_download(
            named["repo_id"], revision=named["revision"], allow_patterns=HUB_FILES
        )
    except Exception as error:  # of huggingface_hub's, httpx' and the cache's many kinds
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(
            f"{name} is neither in the cache nor to be had from the hub ({reason}); "
            "HF_HOME says where the cache is"
        ) from None
    return Path(found)


# --- loading


def load(
    where: Path | str, *, block_size: int | None = None, dropout: float = 0.0, merged: bool = True
) -> tuple[GPT, Tokenizer]:
    """As `load_model`, and the tokenizer; that of its model for an adapter that comes without.

    Raises ValueError, too, where the tokenizer is missing or has ids that the model has not.
    """
    folder = tokenizer_folder = find(where)
    if is_adapter(folder) and not (folder / "tokenizer.json").exists():
        tokenizer_folder = find(base_of(folder, read_adapter(folder)[0]))
    tokenizer = Tokenizer.load(tokenizer_folder)
    model = load_model(folder, block_size=block_size, dropout=dropout, merged=merged)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} ids, the model only "
            f"{model.config.vocab_size:,}"
        )
    return model, tokenizer


def load_model(
    where: Path | str, *, block_size: int | None = None, dropout: float = 0.0, merged: bool = True
) -> GPT:
    """Open a checkpoint of ours or a Hugging Face GPT-2 folder as a float32 GPT on the CPU.

    `block_size` may be shorter than the checkpoint's; the later positions are not read. The model
    of a folder with an adapter has it `merged`, or added to its layers.
    Raises ValueError for a folder that is no GPT-2, or whose weights are damaged or do not match.
    """
    folder = find(where)
    if is_adapter(folder):
        return load_adapted(folder, block_size, dropout, merged)
    config = config_from_hugging_face(folder, block_size, dropout)
    saved = read_weights(folder)
    if not config.bias and any(saved[name].any() for name in saved if BIAS.search(name)):
        config = replace(config, bias=True)  # trained elsewhere since, where biases always are
    weights = from_hugging_face(saved, config, folder)
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError(f"{folder} holds weights that are not finite numbers")
    return with_weights(config, weights)


def with_weights(config: GPTConfig, weights: dict[str, Tensor]) -> GPT:
    """A model that has these tensors as its own, without a copy."""
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(weights, assign=True)
    if config.tie_weights:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def load_adapted(folder: Path, block_size: int | None, dropout: float, merged: bool) -> GPT:
    """The model that an adapter is for, with the adapter."""
    adapter, tensors = read_adapter(folder)
    base = find(base_of(folder, adapter))
    if is_adapter(base):
        raise ValueError(f"{folder} is an adapter for another adapter, {base}")
    model = load_model(base, block_size=block_size, dropout=dropout)
    if adapter.base_fingerprint not in (None, lora.fingerprint(model)):
        raise ValueError(f"{folder} is an adapter for other weights than those of {base}")
    try:
        lora.add(model, adapter.config, seed=0)
        lora.load(model, tensors)
    except ValueError as error:
        raise ValueError(f"{folder} is no adapter for {base}: {error}") from None
    if merged:
        lora.merge(model)
    return model


def read_adapter(folder: Path) -> tuple[lora.Adapter, dict[str, Tensor]]:
    """What the files of an adapter say of it, and its tensors. Raises ValueError for a missing or
    damaged file, and for more than plain LoRA."""
    about, file = (folder / name for name in ADAPTER_FILES)
    found, tensors = read_json(about), read_tensors(file)
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    return lora.from_peft(found, tensors, metadata, str(about)), tensors


def adapter_for(
    folder: Path, where: str, out_dir: Path, model: GPT, config: lora.LoRAConfig
) -> lora.Adapter:
    """A new adapter, of a run in `out_dir`, for a model that was opened from `folder`, for which
    `where` stood. A model that is not on the hub the run keeps (`keep_base`).

    Raises ValueError where that is an adapter itself.
    """
    if is_adapter(folder):
        raise ValueError(
            f"{folder} is an adapter: merge it first, with export.py --checkpoint={where} "
            "--out_dir=FOLDER, or go on with it, with --init_from=resume"
        )
    named = on_hub(where)
    base = named["repo_id"] if named else str((out_dir / BASE).resolve())
    revision = named["revision"] if named else None
    return lora.Adapter(config, base, revision, lora.fingerprint(model))


def keep_base(folder: Path, out_dir: Path) -> None:
    """Have the model in `folder` in `out_dir`, too, as links where the disk has them: the run that
    made it may remove it."""
    if folder.resolve() == (out_dir / BASE).resolve():
        return
    shutil.rmtree(out_dir / BASE, ignore_errors=True)
    with whole_or_not_at_all(out_dir / BASE) as partial:
        for path in sorted(path for pattern in HUB_FILES for path in folder.glob(pattern)):
            try:
                os.link(path.resolve(), partial / path.name)
            except OSError:  # another disk, or one without links
                shutil.copyfile(path, partial / path.name)


def base_of(folder: Path, adapter: lora.Adapter) -> str:
    """Where the model of an adapter is, as `find` takes it: where it says, or in its run."""
    for where in (Path(adapter.base), folder.parent / BASE):
        if where.is_dir():
            return str(where)
    name = HUB_NAMES.get(adapter.base, f"hf:{adapter.base}")
    name += f"@{adapter.revision}" if adapter.revision else ""
    if Path(adapter.base).is_absolute() or not on_hub(name):
        raise ValueError(
            f"{folder} is an adapter for {adapter.base}, which is not there; if it was moved, "
            f"say where to in {ADAPTER_FILES[0]}: base_model_name_or_path"
        )
    return name


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError where a checkpoint's JSON file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is no checkpoint: it has no {path.name}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return content


def read_state(folder: Path) -> dict[str, Any]:
    state = read_json(folder / "state.json")
    for name, kind in {"step": int, "data": str, "settings": dict}.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{folder}/state.json is damaged: {name} is {state.get(name)!r}")
    return state


def read_starts(out_dir: Path) -> list[dict[str, Any]]:
    """What run.json tells of the starts of a run: the first, and each resumption."""
    path = out_dir / "run.json"
    if not path.exists():
        return []
    starts = read_json(path).get("starts")
    if not isinstance(starts, list) or not all("settings" in start for start in starts):
        raise ValueError(f"{path} is damaged: it tells of no starts")
    return starts


def read_optimizer(folder: Path) -> dict[str, Any]:
    """Raises ValueError for a file that is damaged, or that a pickle with code was put into."""
    path = folder / "optimizer.pt"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no optimizer.pt: it can start a run, not resume one"
        ) from None
    except Exception as error:  # what a damaged pickle raises is anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0].partition(". ")[0]
        raise ValueError(f"{path} is damaged, or holds code: not loaded ({reason})") from None
    if not isinstance(saved, dict) or not {"parameters", "scaler"} <= saved.keys():
        raise ValueError(f"{path} is no optimizer file of train.py")
    return saved


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from model.safetensors or the files that its index names.

    Raises ValueError for a missing or damaged file.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).exists() and index.exists():
        of_tensors = read_json(index).get("weight_map")
        if not isinstance(of_tensors, dict):
            raise ValueError(f"{index} is damaged: it has no weight_map")
        names = sorted({Path(str(name)).name for name in of_tensors.values()})
    weights: dict[str, Tensor] = {}
    for path in (folder / name for name in names):
        if not path.exists():
            pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
                p.name for p in folder.glob("*.pt") if p.name != "optimizer.pt"
            )
            hint = f" ({pickles[0]} is a pickle, which can run code: not read)" if pickles else ""
            raise ValueError(f"{folder} has no {path.name}{hint}")
        weights |= read_tensors(path)
    return weights


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises ValueError for a file that is missing or damaged."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


# --- Hugging Face's layout


def config_to_hugging_face(config: GPTConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": EPSILON,
        "initializer_range": INIT_STD,
        "tie_word_embeddings": config.tie_weights,
        "bias": config.bias,  # ours alone: False means that the zero biases are no parameters
    }


def config_from_hugging_face(folder: Path, block_size: int | None, dropout: float) -> GPTConfig:
    """Raises ValueError for a config.json that is not a plain GPT-2's."""
    path = folder / "config.json"
    found = read_json(path)
    if found.get("model_type") != "gpt2":
        raise ValueError(f"{path}: model_type is {found.get('model_type')!r}, not 'gpt2'")
    sizes = {"n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
    sizes |= {name: found[name] for name in sizes if name in found}
    if wrong := [n for n, size in sizes.items() if type(size) is not int or not 0 < size < 2**20]:
        raise ValueError(f"{path}: {wrong[0]}={sizes[wrong[0]]!r} is no size")
    # What else a GPT-2 config can say, and the one value of it that this GPT-2 has.
    fixed = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (EPSILON,),
        "n_inner": (None, 4 * sizes["n_embd"]),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for name, values in fixed.items():
        if found.get(name, values[0]) not in values:
            raise ValueError(f"{path}: {name}={found[name]!r} is not GPT-2's {values[0]!r}")
    positions = sizes.pop("n_positions")
    if block_size is not None and block_size > positions:
        raise ValueError(f"block_size={block_size} is beyond the {positions} positions of {folder}")
    return GPTConfig(
        **sizes,
        block_size=block_size or positions,
        dropout=dropout,
        bias=found.get("bias", True),
        tie_weights=found.get("tie_word_embeddings", True),
    )


def to_hugging_face(state_dict: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """A model's weights as a GPT-2 file has them: matrices transposed, no bias missing."""
    weights = {}
    for name, tensor in state_dict.items():
        if name == "lm_head.weight" and config.tie_weights:
            continue
        tensor = tensor.detach().float().cpu()
        weights[name] = (tensor.t() if name.endswith(TRANSPOSED) else tensor).contiguous()
    if not config.bias:
        for name in [name for name in weights if ".h." in name or ".ln_f." in name]:
            bias = name.removesuffix("weight") + "bias"
            weights[bias] = torch.zeros(weights[name].size(-1))
    return weights


def from_hugging_face(
    saved: dict[str, Tensor], config: GPTConfig, folder: Path
) -> dict[str, Tensor]:
    """The state dict of a GPT of that config, float32, from the tensors of a GPT-2 file.

    Raises ValueError that lists what is missing or of another shape.
    """
    last = f"h.{config.n_layer - 1}.ln_1.weight"
    beyond = f"h.{config.n_layer}.ln_1.weight"
    for name, wanted, words in ((last, True, "fewer"), (beyond, False, "more")):
        if (name in saved or f"transformer.{name}" in saved) != wanted:
            layers = f"the {config.n_layer:,} layers of its config.json"
            raise ValueError(f"{folder} has {words} than {layers}")
    with torch.device("meta"):
        shapes_of = GPT(config).state_dict()
    weights: dict[str, Tensor] = {}
    problems = []
    for name, like in shapes_of.items():
        if name == "lm_head.weight" and config.tie_weights:
            if "transformer.wte.weight" in weights:
                weights[name] = weights["transformer.wte.weight"]
            continue
        tensor = saved.get(name, saved.get(name.removeprefix("transformer.")))
        if tensor is None or not tensor.is_floating_point():
            problems.append(f"{name} is {'missing' if tensor is None else tensor.dtype}")
            continue
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        if name == "transformer.wpe.weight":
            tensor = tensor[: config.block_size]
        if tensor.shape != like.shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(like.shape)}"
            problems.append(f"{name} has shape {shapes}")
        weights[name] = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{folder} does not fit its config.json: {'; '.join(problems[:3])}{more}")
    return weights
