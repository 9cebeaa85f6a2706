"""Adapters on disk, in peft's format."""

import os
import shutil
from pathlib import Path

import safetensors
from torch import Tensor

from configurator import UserError
from model import GPT
from plaingpt import lora
from plaingpt.checkpoint.folders import (
    ADAPTER_FILES,
    HUB_FILES,
    HUB_NAMES,
    is_adapter,
    on_hub,
)
from plaingpt.checkpoint.hugging_face import read_tensors
from plaingpt.files import read_json, whole_or_not_at_all

BASE = "base"  # where a run keeps the model that its adapters are for


def read_adapter(folder: Path) -> tuple[lora.Adapter, dict[str, Tensor]]:
    """What the files of an adapter say of it, and its tensors. Raises UserError for a missing or
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

    Raises UserError where that is an adapter itself.
    """
    if is_adapter(folder):
        raise UserError(
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
        raise UserError(
            f"{folder} is an adapter for {adapter.base}, which is not there; if it was moved, "
            f"say where to in {ADAPTER_FILES[0]}: base_model_name_or_path"
        )
    return name
