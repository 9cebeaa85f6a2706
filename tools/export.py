"""
Make of a checkpoint what others take: an ordinary Hugging Face folder with a model card, LoRA's
adapter merged, and nothing of the training.

    python -m tools.export --checkpoint=out/instruct --out_dir=out/instruct_merged
    python -m tools.export --checkpoint=out/instruct --push_to_hub=OWNER/NAME --dry_run
    python -m tools.export --checkpoint=out/instruct --push_to_hub=OWNER/NAME      # after `hf auth login`
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import configurator
from configurator import UserError
from model import GPT
from plaingpt import files
from plaingpt.checkpoint import folders, store
from plaingpt.text import dataset
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training import run_folder


@dataclass(frozen=True)
class ExportConfig:
    checkpoint: str = "out/stdlib"  # a run folder (its newest step), a step, gpt2, hf:OWNER/NAME
    out_dir: str = "out/exported"  # the new folder
    push_to_hub: str | None = None  # OWNER/NAME of the hub that the folder is uploaded to
    private: bool = False  # if that is new, nobody else sees it
    dry_run: bool = False  # show the model card that would be uploaded, and write nothing


def export(cfg: ExportConfig) -> Path:
    """Write `out_dir`, and upload it if asked to; return it. A dry run writes nothing.

    Raises UserError for a checkpoint that cannot be opened, an `out_dir` that holds something and
    a hub that does not take it; OSError where the disk does not.
    """
    out_dir = Path(cfg.out_dir)
    check_settings(cfg)
    folder = folders.find(cfg.checkpoint)
    model, tokenizer = store.load(folder)
    model = without_padding(model, tokenizer.vocab_size)
    card = model_card(cfg.push_to_hub or cfg.out_dir, folder, model, tokenizer)
    if cfg.dry_run:
        print(f"would be uploaded to {cfg.push_to_hub}, with this README.md:\n\n{card}")
        return out_dir
    with files.whole_or_not_at_all(out_dir) as partial:
        store.write_model(partial, model.config, model.state_dict(), tokenizer)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if out_dir.exists():
            out_dir.rmdir()  # it is empty
    print(f"{out_dir} is written")
    if cfg.push_to_hub:
        print(f"uploaded: {upload(out_dir, cfg.push_to_hub, cfg.private)}")
    return out_dir


def check_settings(cfg: ExportConfig) -> None:
    """Raises UserError that lists all settings that do not go."""
    problems = []
    out_dir = Path(cfg.out_dir)
    if not out_dir.name:
        problems.append(f"out_dir={cfg.out_dir!r} is no name for a new folder")
    elif out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        problems.append(f"{out_dir} is there already: --out_dir=OTHER")
    if cfg.push_to_hub is None:
        without = [name for name in ("dry_run", "private") if getattr(cfg, name)]
        problems += [f"{name} is for push_to_hub" for name in without]
    else:
        import huggingface_hub  # not at the top: 0.3 s

        well_formed = cfg.push_to_hub.count("/") == 1
        try:
            huggingface_hub.utils.validate_repo_id(cfg.push_to_hub)
        except huggingface_hub.errors.HFValidationError:
            well_formed = False
        if not well_formed:
            problems.append(f"push_to_hub={cfg.push_to_hub!r} is not of the form OWNER/NAME")
    if problems:
        raise UserError("; ".join(problems))


def without_padding(model: GPT, vocab_size: int) -> GPT:
    """The model without rows for ids that no tokenizer gives and nobody draws."""
    weights = model.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = weights[name][:vocab_size].clone()
    return store.with_weights(replace(model.config, vocab_size=vocab_size), weights)


def upload(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a folder to the hub as a model; return where it is. Raises UserError where the hub
    does not take it."""
    import huggingface_hub  # not at the top: 0.3 s

    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
    except Exception as error:  # of huggingface_hub's and httpx' many kinds
        reason = f"{type(error).__name__}: {configurator.one_line(error)}"
        raise UserError(
            f"the hub did not take {repo_id} ({reason}); {folder} is written, and "
            f"`hf upload {repo_id} {folder}` tries again"
        ) from None


# --- the model card


def model_card(where: str, folder: Path, model: GPT, tokenizer: Tokenizer) -> str:
    """README.md of a model that is going to be at `where`: what it is, how it was trained as far as
    its folder tells, its use."""
    import huggingface_hub

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
        f"A GPT-2 of {model.num_params():,} parameters ({config.n_layer} layers, {config.n_head} "
        f"heads, {config.n_embd} wide, context {config.block_size:,}, vocabulary "
        f"{tokenizer.vocab_size:,})" + (", trained with plainGPT." if by_us else "."),
        "",
        *(training(folder) if by_us else []),
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
    """The model of the hub that a checkpoint was trained from, if it was one."""
    named = folders.on_hub(started_from(folder) or "")
    return named["repo_id"] if named else None


def started_from(folder: Path) -> str | None:
    """What the run of a checkpoint began with, before it was resumed."""
    starts = folders.read_starts(folder.parent)
    return starts[0]["settings"]["init_from"] if starts else None


def training(folder: Path) -> list[str]:
    """The lines of a model card on how it was trained."""
    state = folders.read_state(folder)
    settings, step = state["settings"], state["step"]
    records = run_folder.read_records(folder.parent / "metrics.jsonl")
    figures = {name: value for r in records if r["step"] == step for name, value in r.items()}
    rows = {
        "steps": f"{step:,}",
        "tokens": f"{figures['tokens']:,}" if "tokens" in figures else None,
        "training loss": number(state.get("loss"), "nats per token"),
        "validation loss": number(state.get("val_loss"), "nats per token"),
        "validation, bits per byte": number(figures.get("val_bpb"), ""),
        "optimizer": settings.get("optimizer"),
        "learning rate": settings.get("learning_rate"),
        "schedule": settings.get("schedule"),
        "sequences in a step": settings.get("batch_size"),
        "started from": public(started_from(folder)),
        "LoRA": f"rank {settings['lora_rank']}" if settings.get("lora_rank") else None,
        "data": data_of(settings.get("data_dir", ""), state["data"]),
        "seed": settings.get("seed"),
        "software": ", ".join(f"{name} {v}" for name, v in state.get("versions", {}).items()),
    }
    table = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return ["## Training", "", "| | |", "|---|---|", *table, ""]


def public(where: str | None) -> str | None:
    """A source without the folders of this machine."""
    return Path(where).name if where and Path(where).is_absolute() else where


def number(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{value:.4f} {unit}".strip()


def data_of(data_dir: str, fingerprint: str) -> str | None:
    """What a run was trained on, as long as the folder is still there and the same."""
    try:
        data = dataset.open_dataset(data_dir)
    except UserError:
        return None
    if data.fingerprint != fingerprint:
        return None
    given = data.manifest.get("settings", {}).get("sources", [])
    sources = ", ".join(str(public(source)) for source in given)
    tokens = data.statistics.get("train", {}).get("tokens")
    return f"{sources} ({tokens:,} tokens)" if sources and tokens else None


def main(argv: list[str] | None = None) -> int:
    return configurator.command(ExportConfig, export, argv)


if __name__ == "__main__":
    sys.exit(main())
