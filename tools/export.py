"""
Export a checkpoint for others: an ordinary Hugging Face folder with a model card, a LoRA adapter
merged into its base, and none of the training state.

    python -m tools.export --checkpoint=out/instruct --out_dir=out/instruct_merged
    python -m tools.export --checkpoint=out/chat --push_to_hub=OWNER/NAME --dry_run
    python -m tools.export --checkpoint=out/chat --push_to_hub=OWNER/NAME  # after `hf auth login`
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # for python tools/export.py

import configurator
from configurator import PathName, UserError


@dataclass(frozen=True)
class ExportConfig:
    checkpoint: PathName = "out/stdlib"  # a run (last step), RUN/best, a step, gpt2, hf:OWNER/NAME
    out_dir: PathName = "out/exported"  # the new folder
    push_to_hub: str | None = None  # upload the folder to OWNER/NAME on the hub
    private: bool = False  # make that repository private if it is new
    dry_run: bool = False  # show the model card that would be uploaded, and write nothing


if __name__ == "__main__":
    configurator.answer_help(ExportConfig)  # before torch is imported, which takes a second

from model import GPT
from plaingpt.checkpoint import folders, store
from plaingpt.files import atomic_folder
from plaingpt.locks import locked
from plaingpt.text import dataset
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training import run_folder
from plaingpt.wording import quantity


def export(cfg: ExportConfig) -> Path:
    """Write `out_dir`, and upload it if asked to; return it. A dry run writes nothing.

    Raises UserError if the checkpoint cannot be opened, `out_dir` is not empty or the hub rejects
    the upload; OSError if the disk refuses the files.
    """
    check_settings(cfg)
    out_dir = Path(cfg.out_dir)
    folder = folders.find(cfg.checkpoint)
    model, tokenizer = store.load(folder)
    model = without_padding(model, tokenizer.vocab_size)
    card = model_card(cfg.push_to_hub or cfg.out_dir, folder, model, tokenizer)
    if cfg.dry_run:
        print(f"would be uploaded to {cfg.push_to_hub}, with this README.md:\n\n{card}")
        return out_dir
    with locked(out_dir.absolute().parent), atomic_folder(out_dir) as partial:
        store.write_model(partial, model.config, model.weights(), tokenizer)
        # Names of folders that are not UTF-8 are spelled as Python spells them.
        (partial / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        if out_dir.exists():
            out_dir.rmdir()  # it is empty, unless another process was faster
    print(f"wrote {out_dir}")
    if cfg.push_to_hub:
        print(f"uploaded: {upload(out_dir, cfg.push_to_hub, cfg.private)}")
    return out_dir


def check_settings(cfg: ExportConfig) -> None:
    """Raises a UserError that lists all invalid settings."""
    problems = []
    out_dir = Path(cfg.out_dir)
    if out_dir.name in ("", ".."):
        problems.append(f"out_dir={cfg.out_dir!r} cannot be the name of a new folder")
    elif out_dir.is_symlink() or (any(out_dir.iterdir()) if out_dir.is_dir() else out_dir.exists()):
        problems.append(f"{out_dir} already exists: choose another --out_dir")
    elif folders.within_checkpoint(out_dir) or folders.STEP_FOLDER.fullmatch(out_dir.name):
        problems.append(f"{out_dir} would be in a checkpoint, or look like one: choose another")
    if cfg.push_to_hub is None:
        given = [name for name in ("dry_run", "private") if getattr(cfg, name)]
        problems += [f"{name} needs push_to_hub" for name in given]
    elif not is_repo_id(cfg.push_to_hub):
        problems.append(f"push_to_hub={cfg.push_to_hub!r} is not of the form OWNER/NAME")
    configurator.validate(cfg, problems)


def is_repo_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError  # not at the top: 0.3 s
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def without_padding(model: GPT, vocab_size: int) -> GPT:
    """The model without the rows for ids that the tokenizer never produces."""
    weights = model.weights()
    for name in {"transformer.wte.weight", "lm_head.weight"} & weights.keys():
        weights[name] = weights[name][:vocab_size].clone()
    return GPT.from_weights(replace(model.config, vocab_size=vocab_size), weights)


def upload(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a folder to the hub as a model; return its address. Raises UserError if that fails."""
    import huggingface_hub  # not at the top: 0.3 s

    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
    except Exception as error:  # huggingface_hub and httpx raise many kinds
        reason = f"{type(error).__name__}: {configurator.one_line(error)}"
        raise UserError(
            f"could not upload to {repo_id} on the hub ({reason}); {folder} is complete, and "
            f"`hf upload {repo_id} {folder}` tries again"
        ) from None


# --- the model card


def model_card(where: str, folder: Path, model: GPT, tokenizer: Tokenizer) -> str:
    """README.md of a model published as `where`: what it is, how it was trained if `folder` tells,
    and how to use it."""
    import huggingface_hub  # not at the top: 0.3 s

    about = huggingface_hub.ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "plaingpt"],
        base_model=base_model(folder),
    )
    config, by_us = model.config, (folder / "state.json").exists()
    lines = [
        f"# {Path(where).name}",
        "",
        f"A GPT-2 of {model.num_params():,} parameters ({quantity(config.n_layer, 'layer')}, "
        f"{quantity(config.n_head, 'head')}, {config.n_embd} wide, context {config.block_size:,}, "
        f"vocabulary {tokenizer.vocab_size:,})" + (", trained with plainGPT." if by_us else "."),
        "",
        *(training_section(folder) if by_us else []),
        "## Use",
        "",
        "```python",
        "from transformers import pipeline",
        "",
        f'write = pipeline("text-generation", model="{where}")',
    ]
    if tokenizer.chat_template:
        lines += [
            'messages = [{"role": "user", "content": "Name the capital of France."}]',
            'print(write(messages, max_new_tokens=100)[0]["generated_text"][-1])',
        ]
    else:
        lines += ['print(write("Once upon", max_new_tokens=100)[0]["generated_text"])']
    return f"---\n{about.to_yaml()}\n---\n\n" + "\n".join([*lines, "```", ""])


def base_model(folder: Path) -> str | None:
    """The model on the hub that a checkpoint was trained from, if there is one."""
    named = folders.on_hub(started_from(folder) or "")
    return named["repo_id"] if named else None


def started_from(folder: Path) -> str | None:
    """The init_from of the run of a checkpoint, when it first started."""
    starts = folders.read_starts(folder.parent)
    return starts[0].init_from if starts else None


def training_section(folder: Path) -> list[str]:
    """The lines of a model card about the training."""
    state = folders.read_state(folder)
    settings, step = state.settings, state.step
    records = run_folder.read_records(folder.parent / "metrics.jsonl")
    figures = {name: value for r in records if r["step"] == step for name, value in r.items()}
    rows = {
        "steps": f"{step:,}",
        "tokens": f"{figures['tokens']:,}" if "tokens" in figures else None,
        "training loss": number(figures.get("loss", state.loss), "nats per token"),
        "validation loss": number(state.val_loss, "nats per token"),
        "validation, bits per byte": number(figures.get("val_bpb"), ""),
        "optimizer": settings.get("optimizer"),
        "learning rate": settings.get("learning_rate"),
        "schedule": settings.get("schedule"),
        "sequences in a step": settings.get("batch_size"),
        "started from": without_local_path(started_from(folder)),
        "LoRA": f"rank {settings['lora_rank']}" if settings.get("lora_rank") else None,
        "data": data_of(str(settings.get("data_dir", "")), state.data),
        "seed": settings.get("seed"),
        "software": ", ".join(f"{name} {v}" for name, v in state.versions.items()),
    }
    table = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return ["## Training", "", "| | |", "|---|---|", *table, ""]


def without_local_path(where: str | None) -> str | None:
    """A source without the folders of this machine."""
    return Path(where).name if where and Path(where).is_absolute() else where


def number(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{value:.4f} {unit}".strip()


def data_of(data_dir: str, fingerprint: str) -> str | None:
    """The sources and size of a run's training data; None if it has changed or is gone."""
    try:
        data = dataset.open_dataset(data_dir)
    except UserError:
        return None
    if data.fingerprint != fingerprint:
        return None
    settings = (data.manifest and data.manifest.settings) or {}
    given = settings.get("sources")
    names = given if isinstance(given, tuple) else ()
    sources = ", ".join(str(without_local_path(name)) for name in names)
    tokens = data.statistics.get("train", {}).get("tokens")
    return f"{sources} ({quantity(tokens, 'token')})" if sources and tokens else None


def main(argv: list[str] | None = None) -> int:
    return configurator.command(ExportConfig, export, argv)


if __name__ == "__main__":
    sys.exit(main())
