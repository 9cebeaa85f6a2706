"""Checkpoint folders: finding, describing, pruning and downloading them."""

import contextlib
import difflib
import os
import re
import shlex
from itertools import islice
from pathlib import Path

import msgspec

from configurator import UserError, one_line
from plaingpt.files import PARTIAL, Count, Settings, flush, read_json, remove_folder

STEP_FOLDER = re.compile(r"step_(\d{6,})")
BEST = "best"  # in a run folder: a link to its checkpoint of the lowest validation loss
OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB_NAMES = {name: f"hf:openai-community/{name}" for name in OPENAI}
HUB_NAME = re.compile(r"hf:(?P<repo_id>[^/:@\s]+/[^/:@\s]+)(?:@(?P<revision>\S+))?")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_FILES = [  # patterns of the files that a model needs; no others are downloaded
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model*.safetensors*",
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
]


class Progress(msgspec.Struct, frozen=True):
    """What a run remembers of its losses, to resume exactly."""

    loss_sum: float = 0.0  # since the last line, over the steps that were finite
    loss_steps: Count = 0  # how many those are
    best_val_loss: float | None = None
    waited: Count = 0  # evaluations since that one


class State(msgspec.Struct, frozen=True, kw_only=True):
    """state.json: where in its run a checkpoint was saved."""

    step: Count
    world_size: Count = 1
    skipped: Count = 0  # steps so far whose loss or gradient was not finite
    loss: float | None = None  # of the last step
    val_loss: float | None = None
    progress: Progress = Progress()
    data: str  # fingerprint
    versions: dict[str, str] = {}
    settings: Settings  # train.py's


class RunStart(msgspec.Struct, frozen=True, kw_only=True):
    """What it takes to repeat a run: an entry of run.json."""

    time: str = ""
    step: Count = 0
    command: str = ""
    settings: Settings  # train.py's
    data: str = ""  # fingerprint
    device: str = ""
    dtype: str = ""
    world_size: Count = 1
    versions: dict[str, str] = {}
    revision: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.settings.get("init_from"), str):
            raise ValueError("settings.init_from is missing, or not a string")

    @property
    def init_from(self) -> str:
        return str(self.settings["init_from"])


class Best(msgspec.Struct, frozen=True):
    """The checkpoint of a run that has the lowest validation loss."""

    checkpoint: str  # the name of its folder
    val_loss: float


class Run(msgspec.Struct, frozen=True):
    """run.json: the start of a run and each resumption, and its best checkpoint."""

    starts: tuple[RunStart, ...]
    best: Best | None = None  # until a checkpoint has been evaluated


def find(where: Path | str) -> Path:
    """The checkpoint folder that `where` names: a run folder (its newest step), `best` in a run
    folder, a checkpoint folder, one of OpenAI's models (gpt2, gpt2-medium, gpt2-large, gpt2-xl),
    or hf:OWNER/NAME[@REVISION] on the hub.

    Raises UserError if it finds no checkpoint there.
    """
    name = str(where)
    if name in HUB_NAMES or name.startswith("hf:"):
        return download(name)
    folder = Path(where)
    if folder.name == BEST and (best := best_of(folder.parent)):
        return folder.parent / best.checkpoint
    if steps := step_folders(folder):
        return steps[-1]
    if is_model(folder):
        return folder
    raise UserError(f"{folder} {missing(folder)}")


def missing(folder: Path) -> str:
    """Why a folder cannot be opened as a checkpoint, and which folder to open instead."""
    found = runs_near(folder)
    if os.path.exists(folder / "dataset.json"):
        trained = [str(run) for run in found if was_trained_on(run, folder)]
        data, out = shlex.quote(str(folder)), shlex.quote(f"out/{folder.name}")
        makes = f"python train.py --data_dir={data} --out_dir={out} trains one"
        hint = f"models trained on it: {', '.join(trained[:3])}" if trained else makes
        return f"is a data folder, not a checkpoint; {hint}"
    if os.path.isfile(folder):
        return "is a file, but a checkpoint is a folder"
    if steps := sorted(folder.glob("step_*/")):
        return f"holds no complete checkpoint: {steps[-1].name} has no state.json"
    if os.path.exists(folder / "run.json"):
        return "holds a run that has not saved a checkpoint yet"
    problem = "holds no checkpoint" if os.path.exists(folder) else "does not exist"
    local = folder.parent == Path("out") or os.path.exists(folder.parent)
    if HUB_NAME.fullmatch(f"hf:{folder}") and not local:
        return f"{problem}; a model of the hub is named hf:{folder}"
    names = [str(run) for run in found]
    if close := difflib.get_close_matches(str(folder), names, n=1):
        return f"{problem}; did you mean {close[0]}?"
    there = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{problem}; " + (f"trained models: {there}" if names else "run train.py to make one")


def runs_near(folder: Path) -> list[Path]:
    """The folders with checkpoints beside a folder, and in `out`."""
    places = [place for place in {folder.parent, Path("out")} if os.path.isdir(place)]
    around = [path for place in places for path in islice(place.glob("*/"), 1000)]
    return sorted(path for path in around if step_folders(path) or is_model(path))


def is_model(folder: Path) -> bool:
    """Whether a folder holds, or once held, a model or an adapter."""
    names = ("config.json", "model.safetensors", "state.json")
    return is_adapter(folder) or any(os.path.lexists(folder / name) for name in names)


def was_trained_on(run: Path, data_dir: Path) -> bool:
    try:
        starts = read_starts(run)
    except UserError:
        return False
    return bool(starts) and Path(str(starts[-1].settings.get("data_dir"))) == data_dir


def step_folders(out_dir: Path | str) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    paths = Path(out_dir).glob("step_*/state.json")
    found = [path.parent for path in paths if STEP_FOLDER.fullmatch(path.parent.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def within_checkpoint(folder: Path) -> bool:
    """Whether a folder is inside a checkpoint, with which it would be removed."""
    above = folder.resolve().parents
    return any(STEP_FOLDER.fullmatch(each.name) and is_model(each) for each in above)


def is_adapter(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))


def best_of(out_dir: Path) -> Best | None:
    """The best of a run's checkpoints whose state.json is whole; the earliest of equals. None
    before the first evaluation."""
    evaluated = []
    for folder in step_folders(out_dir):
        with contextlib.suppress(UserError):
            state = read_state(folder)
            if state.val_loss is not None:
                evaluated.append((state.val_loss, state.step, folder.name))
    if not evaluated:
        return None
    val_loss, _, name = min(evaluated)
    return Best(name, val_loss)


def link_best(out_dir: Path, name: str) -> None:
    """Point the link `best` of a run folder at one of its checkpoints, for programs that open
    folders by name. Raises OSError on systems without links, and for another file of that name."""
    link, partial = out_dir / BEST, out_dir / f"{PARTIAL}{BEST}"
    try:
        if link.exists() and not link.is_symlink():
            raise OSError(f"{link} exists and is not a link")
        partial.unlink(missing_ok=True)
        partial.symlink_to(name, target_is_directory=True)
        partial.replace(link)
        flush(out_dir)
    except OSError:
        unlink_best(out_dir)  # or it would soon lead to a checkpoint that has been pruned
        raise


def unlink_best(out_dir: Path) -> None:
    if (out_dir / BEST).is_symlink():
        (out_dir / BEST).unlink()


def prune(out_dir: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints and the best. An older checkpoint whose
    state.json is damaged stays: it should not end a training."""
    best = best_of(out_dir)
    for folder in step_folders(out_dir)[:-keep]:
        try:
            read_state(folder)
        except UserError as problem:
            print(f"keeping {folder}: {problem}")
            continue
        if not best or folder.name != best.checkpoint:
            remove_folder(folder)


def read_state(folder: Path) -> State:
    """A checkpoint's state.json. Raises UserError if it is missing or damaged."""
    path = folder / "state.json"
    state = read_json(path, State)
    named = STEP_FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != state.step:
        raise UserError(f"{path}: step is {state.step}, but the folder is named {folder.name}")
    return state


def read_starts(out_dir: Path) -> tuple[RunStart, ...]:
    """The starts in a run folder's run.json; () without the file. Raises UserError if it is
    damaged."""
    path = out_dir / "run.json"
    return read_json(path, Run).starts if path.exists() else ()


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
