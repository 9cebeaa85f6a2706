"""Adapters on disk, in the format of the `peft` library."""

import filecmp
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from configurator import UserError
from model import GPT
from plaingpt import lora
from plaingpt.checkpoint.folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    HUB_NAMES,
    MODEL_FILES,
    find,
    is_adapter,
    on_hub,
)
from plaingpt.checkpoint.hugging_face import (
    first_three,
    open_tensors,
    tensors_of,
    write_tensors,
)
from plaingpt.checksums import SUMS, write_sums
from plaingpt.files import Count, as_record, atomic_folder, read_json, size_of, write_json
from plaingpt.wording import shown

BASE = "base"  # folder in which a run keeps the model that its adapters modify
PREFIX = "base_model.model."  # which peft puts before the names of tensors
# Fields of plain LoRA, and those that make no difference once an adapter is trained.
KNOWN = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
)


class AdapterFile(msgspec.Struct, frozen=True):
    """The fields of adapter_config.json that plain LoRA needs."""

    base_model_name_or_path: str
    r: Count
    lora_alpha: float
    lora_dropout: float
    revision: str | None = None


def adapter_for(folder: Path, where: str, out_dir: Path, config: lora.LoRAConfig) -> lora.Adapter:
    """A new adapter for the model in `folder`, which the user named `where`, to be trained by the
    run in `out_dir`. Its base is the model on the hub, or else the run's own copy (`keep_base`).

    Raises UserError if `folder` is itself an adapter.
    """
    if is_adapter(folder):
        raise UserError(
            f"{folder} is an adapter: merge it first, with python -m tools.export "
            f"--checkpoint={where} --out_dir=FOLDER, or resume its run, with --init_from=resume"
        )
    named = on_hub(where)
    base = named["repo_id"] if named else str((out_dir / BASE).resolve())
    revision = named["revision"] if named else None
    return lora.Adapter(config, base, revision)


def keep_base(folder: Path, out_dir: Path) -> None:
    """Copy the model in `folder` into the run folder, by hard links where possible: the run that
    made it may remove it. Raises UserError if that would replace anything but an earlier copy."""
    base = out_dir / BASE
    if folder.resolve() == base.resolve():
        return
    files = sorted(path for pattern in MODEL_FILES for path in folder.glob(pattern))
    there, ours = list(base.glob("*")), [*MODEL_FILES, SUMS]
    if there and files and all(same_file(path, base / path.name) for path in files):
        return
    if there and not ((base / SUMS).exists() and all(any(map(p.match, ours)) for p in there)):
        raise UserError(f"{base} is in the way of a copy of {folder}: choose another --out_dir")
    shutil.rmtree(base, ignore_errors=True)
    with atomic_folder(base) as partial:
        for path in files:
            size_of(path)
            try:
                os.link(path.resolve(), partial / path.name)
            except OSError:  # another disk, or one without links
                shutil.copyfile(path, partial / path.name)
        write_sums(partial)


def same_file(path: Path, other: Path) -> bool:
    return other.is_file() and path.is_file() and filecmp.cmp(path, other, shallow=False)


def base_folder(folder: Path, adapter: lora.Adapter) -> Path:
    """The folder of the model that an adapter modifies. Raises UserError if there is none, or if
    it is itself an adapter."""
    base = find(base_of(folder, adapter))
    if is_adapter(base):
        raise UserError(f"{folder} is an adapter for another adapter, {base}")
    return base


def base_of(folder: Path, adapter: lora.Adapter) -> str:
    """Where to `find` the model that an adapter modifies: where its config says, or in its run.

    A run's own copy comes first: it moves with the run, and another run may take its old place.
    """
    name = HUB_NAMES.get(adapter.base, f"hf:{adapter.base}")
    name += f"@{adapter.revision}" if adapter.revision else ""
    there, own = Path(adapter.base), folder.parent / BASE
    is_folder = there.is_absolute() or not on_hub(name)
    places = (own, there) if there.is_absolute() and there.name == BASE else (there, own)
    for where in places[: 1 + is_folder]:
        if where.is_dir():
            return str(where)
    if is_folder:
        raise UserError(
            f"{folder} is an adapter for {adapter.base}, which does not exist; if it was moved, "
            f"set base_model_name_or_path in {ADAPTER_CONFIG} to its new path and delete {SUMS}"
        )
    return name


def write_adapter(folder: Path, adapter: lora.Adapter, weights: dict[str, Tensor]) -> None:
    """Write both files of an adapter whose tensors, by the model's names, are `weights`."""
    write_json(folder / ADAPTER_CONFIG, to_peft(adapter))
    tensors = {PREFIX + name: tensor for name, tensor in weights.items()}
    metadata = {"format": "pt", "base_fingerprint": adapter.base_fingerprint or ""}
    write_tensors(folder / ADAPTER_WEIGHTS, tensors, metadata)


def read_adapter(folder: Path) -> tuple[lora.Adapter, dict[str, Tensor]]:
    """An adapter and its tensors, by peft's names.

    Raises UserError for a missing or damaged file, and for anything beyond plain LoRA.
    """
    with open_tensors(folder / ADAPTER_WEIGHTS) as opened:
        return from_peft(folder, opened), tensors_of(opened, folder / ADAPTER_WEIGHTS)


def describe(folder: Path) -> lora.Adapter:
    """`read_adapter` without the tensors."""
    with open_tensors(folder / ADAPTER_WEIGHTS) as opened:
        return from_peft(folder, opened)


def add_adapter(model: GPT, adapter: lora.Adapter, tensors: dict[str, Tensor]) -> None:
    """Add an adapter to its base, with the tensors of its file.

    Raises a UserError that lists what is missing, unexpected, or of another shape.
    """
    lora.add(model, adapter.config, seed=0)
    expected = {PREFIX + name: each for name, each in lora.adapter_tensors(model.weights()).items()}
    problems = [f"unexpected {name}" for name in sorted(tensors.keys() - expected.keys())]
    problems += [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    for name in sorted(tensors.keys() & expected.keys()):
        if tensors[name].shape != expected[name].shape:
            shapes = f"{tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}"
            problems.append(f"{name} has shape {shapes}")
        elif not (tensors[name].is_floating_point() and tensors[name].isfinite().all()):
            problems.append(f"{name} holds NaN, infinite or non-float values")
        else:
            expected[name].copy_(tensors[name])
    if problems:
        raise UserError(first_three(problems))


def to_peft(adapter: lora.Adapter) -> dict[str, Any]:
    """The content of adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "revision": adapter.revision,
        "r": adapter.config.rank,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": adapter.config.dropout,
        "target_modules": list(adapter.config.targets),
        "fan_in_fan_out": True,  # GPT-2's matrices are stored as (in, out)
        "bias": "none",
        "inference_mode": True,
    }


def from_peft(folder: Path, opened: Any) -> lora.Adapter:
    """The adapter that an adapter_config.json and the header of the opened tensors describe; its
    targets are the layers that have tensors.

    Raises UserError for anything beyond plain LoRA.
    """
    path = folder / ADAPTER_CONFIG
    found = read_json(path, dict[str, Any])
    if found.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {shown(found.get('peft_type'))}, not 'LORA'")
    for name, value in found.items():
        plain = value in (None, False, "none") or value == {} or value == []
        if name == "init_lora_weights":  # some ways of drawing them change the base as well
            plain = value in (True, False, "gaussian", "orthogonal")
        if not (plain or name in KNOWN):
            raise UserError(f"{path}: {name}={shown(value)} is not plain LoRA")
    file = as_record(found, AdapterFile, str(path))
    names = opened.keys()
    targets = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in names})
    try:
        config = lora.LoRAConfig(file.r, file.lora_alpha, file.lora_dropout, tuple(targets))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    fingerprint = (opened.metadata() or {}).get("base_fingerprint") or None
    return lora.Adapter(config, file.base_model_name_or_path, file.revision, fingerprint)
