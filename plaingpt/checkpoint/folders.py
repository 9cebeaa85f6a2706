"""Checkpoint folders: finding, describing, pruning and downloading them."""

import re
from pathlib import Path
from typing import Any

from configurator import UserError, one_line
from plaingpt.files import read_json, remove_folder

STEP_FOLDER = re.compile(r"step_(\d{6,})")
OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_NAMES = {name: f"hf:openai-community/{name}" for name in OPENAI}
HUB_NAME = re.compile(r"hf:(?P<repo_id>[^/:@\s]+/[^/:@\s]+)(?:@(?P<revision>\S+))?")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REQUIRED_STATE = {"step": int, "data": str, "settings": dict}
OPTIONAL_STATE = {
    "loss": int | float | None,
    "val_loss": int | float | None,
    "skipped": int,
    "versions": dict,
}
MODEL_FILES = [  # patterns of the files that a model needs; no others are downloaded
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model*.safetensors*",
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
]


def find(where: Path | str) -> Path:
    """The checkpoint folder that `where` names: a run folder (its newest step), a checkpoint
    folder, one of OpenAI's models (gpt2, gpt2-medium, gpt2-large, gpt2-xl), or
    hf:OWNER/NAME[@REVISION] on the hub.

    Raises UserError if it finds no checkpoint there.
    """
    name = str(where)
    if name in HUB_NAMES or name.startswith("hf:"):
        return download(name)
    folder = Path(where)
    if steps := step_folders(folder):
        return steps[-1]
    if (folder / "config.json").exists() or is_adapter(folder):
        return folder
    problem = "holds no checkpoint" if folder.exists() else "does not exist"
    raise UserError(f"{folder} {problem}; train.py --out_dir={folder} makes one")


def step_folders(out_dir: Path | str) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    paths = Path(out_dir).glob("step_*/state.json")
    found = [path.parent for path in paths if STEP_FOLDER.fullmatch(path.parent.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).exists()


def prune(out_dir: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints and the one of the lowest validation loss."""
    folders = step_folders(out_dir)
    losses = {folder: read_state(folder).get("val_loss") for folder in folders}
    evaluated = [(loss, folder) for folder, loss in losses.items() if loss is not None]
    best = min(evaluated)[1] if evaluated else None
    for folder in folders[:-keep]:
        if folder != best:
            remove_folder(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json. Raises UserError if it is missing or damaged."""
    state = read_json(folder / "state.json")
    found = {name: kind for name, kind in OPTIONAL_STATE.items() if name in state}
    for name, kind in (REQUIRED_STATE | found).items():
        if not isinstance(state.get(name), kind):
            raise UserError(f"{folder}/state.json is damaged: {name} is {state.get(name)!r}")
    return state


def read_starts(out_dir: Path) -> list[dict[str, Any]]:
    """What run.json records of the start of a run and of each resumption; [] without the file.

    Raises UserError if it is damaged.
    """
    path = out_dir / "run.json"
    if not path.exists():
        return []
    starts = read_json(path).get("starts")
    if not isinstance(starts, list) or not all(is_start(start) for start in starts):
        raise UserError(f"{path} is damaged: it does not list the starts of a run")
    return starts


def is_start(value: Any) -> bool:
    settings = value.get("settings") if isinstance(value, dict) else None
    return isinstance(settings, dict) and isinstance(settings.get("init_from"), str)


def on_hub(where: str) -> re.Match[str] | None:
    """The repo_id and revision behind gpt2 … gpt2-xl and hf:OWNER/NAME[@REVISION]; None for any
    other name."""
    return HUB_NAME.fullmatch(HUB_NAMES.get(where, where))


def download(name: str) -> Path:
    """The folder of a model of the hub in huggingface_hub's cache (HF_HOME). Missing files are
    downloaded, and an interrupted download resumes.

    Raises UserError if it is not cached and cannot be downloaded.
    """
    import huggingface_hub  # not at the top: 0.3 s

    named = on_hub(name)
    if not named:
        raise UserError(f"{name} is not of the form hf:OWNER/NAME[@REVISION]")
    try:
        found = huggingface_hub.snapshot_download(
            named["repo_id"], revision=named["revision"], allow_patterns=MODEL_FILES
        )
    except Exception as error:  # huggingface_hub, httpx and the file system raise many kinds
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"{name} is not in the cache and could not be downloaded ({reason}); "
            "HF_HOME sets where the cache is"
        ) from None
    return Path(found)
