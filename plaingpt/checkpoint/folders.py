"""Checkpoint folders: found, pruned, downloaded."""

import re
from pathlib import Path
from typing import Any

from configurator import UserError, one_line
from plaingpt.files import read_json, remove

STEP_FOLDER = re.compile(r"step_(\d{6,})")
OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_NAMES = {name: f"hf:openai-community/{name}" for name in OPENAI}
HUB_NAME = re.compile(r"hf:(?P<repo_id>[^/:@\s]+/[^/:@\s]+)(?:@(?P<revision>\S+))?")
HUB_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
HUB_FILES += ["model*.safetensors*", *ADAPTER_FILES]


def prune(out_dir: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints and the one of the lowest validation loss."""
    folders = steps(out_dir)
    losses = {folder: read_state(folder).get("val_loss") for folder in folders}
    evaluated = [(loss, folder) for folder, loss in losses.items() if loss is not None]
    best = min(evaluated)[1] if evaluated else None
    for folder in folders[:-keep]:
        if folder != best:
            remove(folder)


def steps(out_dir: Path | str) -> list[Path]:
    """The whole checkpoints of a run folder, oldest first; what others call so is none."""
    paths = Path(out_dir).glob("step_*/state.json")
    found = [path.parent for path in paths if STEP_FOLDER.fullmatch(path.parent.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def find(where: Path | str) -> Path:
    """The checkpoint folder that `where` means: a run folder (its newest), one itself, one of
    OpenAI's (gpt2, gpt2-medium, gpt2-large, gpt2-xl), or hf:OWNER/NAME[@REVISION] on the hub.

    Raises UserError where there is none.
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
    raise UserError(f"{folder} {what}; train.py --out_dir={folder} makes one")


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_FILES[0]).exists()


def on_hub(where: str) -> re.Match[str] | None:
    """The repo_id and revision that gpt2 … gpt2-xl and hf:OWNER/NAME[@REVISION] stand for; None for
    other names."""
    return HUB_NAME.fullmatch(HUB_NAMES.get(where, where))


def download(name: str) -> Path:
    """The folder of a model of the hub, in huggingface_hub's cache (HF_HOME): what is not there yet
    is downloaded, what was cut short is gone on with.

    Raises UserError where it is neither cached nor to be had.
    """
    import huggingface_hub  # not at the top: 0.3 s

    named = on_hub(name)
    if not named:
        raise UserError(f"{name} is not of the form hf:OWNER/NAME[@REVISION]")
    try:
        found = huggingface_hub.snapshot_download(
            named["repo_id"], revision=named["revision"], allow_patterns=HUB_FILES
        )
    except Exception as error:  # of huggingface_hub's, httpx' and the cache's many kinds
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"{name} is neither in the cache nor to be had from the hub ({reason}); "
            "HF_HOME says where the cache is"
        ) from None
    return Path(found)


def read_state(folder: Path) -> dict[str, Any]:
    state = read_json(folder / "state.json")
    for name, kind in {"step": int, "data": str, "settings": dict}.items():
        if not isinstance(state.get(name), kind):
            raise UserError(f"{folder}/state.json is damaged: {name} is {state.get(name)!r}")
    return state


def read_starts(out_dir: Path) -> list[dict[str, Any]]:
    """What run.json tells of the starts of a run: the first, and each resumption."""
    path = out_dir / "run.json"
    if not path.exists():
        return []
    starts = read_json(path).get("starts")
    if not isinstance(starts, list) or not all("settings" in start for start in starts):
        raise UserError(f"{path} is damaged: it tells of no starts")
    return starts
