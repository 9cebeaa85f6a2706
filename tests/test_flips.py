"""One flipped bit, anywhere in a run folder or a data folder, is noticed or changes nothing."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_train import same

import prepare
import sample
import train
from configurator import UserError
from plaingpt.checkpoint import adapters, folders, store
from plaingpt.text.dataset import open_dataset
from plaingpt.training import run_folder

FLIPS = 300
HARMLESS = ("loss.png", "generation_config.json")  # nothing here reads them


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Masked data in several shards, a training on it and a LoRA training of that."""
    folder = tmp_path_factory.mktemp("flips")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "naïve"]
    talks = [
        {"instruction": " ".join(rng.choice(words, 6)), "output": " ".join(rng.choice(words, 9))}
        for _ in range(60)
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    wanted = [f"--sources={folder}/talks.jsonl", "--template=alpaca", "--tokenizer=bytes"]
    wanted += ["--val_fraction=0.2", "--shard_tokens=4000", f"--data_dir={folder}/data"]
    assert prepare.main(wanted) == 0
    wanted = [f"--data_dir={folder}/data", "--n_layer=1", "--n_embd=16", "--block_size=16"]
    wanted += ["--batch_size=4", "--max_steps=4", "--log_interval=1", "--sample_interval=0"]
    wanted += ["--device=cpu"]
    assert train.main([*wanted, f"--out_dir={folder}/run"]) == 0
    wanted += [f"--init_from={folder}/run", "--lora_rank=2"]
    wanted = [word for word in wanted if "n_" not in word and "block" not in word]
    assert train.main([*wanted, f"--out_dir={folder}/lora"]) == 0
    return folder


def data_in_use(folder: Path) -> list:
    data = open_dataset(folder)
    tokens = [data.split(name)[0 : len(data.split(name))].tolist() for name in ("train", "val")]
    masks = [data.split(name).mask(0, len(data.split(name))).tolist() for name in ("train", "val")]
    tokenizer = data.tokenizer
    known = [tokenizer.ranks, tokenizer.special, tokenizer.eot_id, tokenizer.chat_template]
    return [tokens, masks, known, data.manifest, data.fingerprint]


def run_in_use(folder: Path) -> list:
    step = folders.find(folder)
    model, tokenizer = store.load(step, merged=False)
    known = [tokenizer.ranks, tokenizer.special, tokenizer.eot_id, tokenizer.chat_template]
    state = [folders.read_state(step), folders.read_starts(folder), store.read_optimizer(step)]
    adapter = adapters.read_adapter(step) if folders.is_adapter(step) else None
    records = run_folder.read_records(folder / "metrics.jsonl")
    return [model.config, dict(model.named_parameters()), known, *state, adapter, records]


def equal(one, other) -> bool:
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(*pair) for pair in zip(one, other))
    return same(one, other)


def test_a_flipped_bit_is_noticed_or_changes_nothing(folder):
    uses = {"data": data_in_use, "run": run_in_use, "lora": run_in_use}
    before = {name: use(folder / name) for name, use in uses.items()}
    paths = [path for name in uses for path in sorted((folder / name).rglob("*"))]
    paths = [path for path in paths if path.is_file()]
    assert len(paths) > 30
    rng, noticed, without_effect = np.random.default_rng(0), [], []
    for number in range(FLIPS):
        path = paths[number % len(paths)]
        name = path.relative_to(folder).parts[0]
        content = bytearray(path.read_bytes())
        place = int(rng.choice([rng.integers(len(content)), rng.integers(8), -1 - rng.integers(8)]))
        content[place % len(content)] ^= 1 << int(rng.integers(8))
        whole = path.read_bytes()
        path.write_bytes(content)
        try:
            after = uses[name](folder / name)
        except UserError as problem:
            line = str(problem)
            assert path.name in line and "\n" not in line and len(line) < 400, (path, place, line)
            noticed.append(path)
        else:
            assert equal(after, before[name]), f"{path}: the flip at {place} was not noticed"
            without_effect.append(path)
        path.write_bytes(whole)
    assert len(noticed) > FLIPS // 2
    unread = {path for path in paths if path.name in HARMLESS}
    unread |= set((folder / "lora" / "base").glob("tokenizer*"))  # the adapter has its own
    assert set(paths) - set(noticed) == unread


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_the_commands_say_in_a_line_which_file_changed(folder, capsys):
    run, data = folder / "run", folder / "data"
    step = folders.find(run)
    onwards = [f"--out_dir={run}", "--init_from=resume", "--max_steps=5"]
    anew = [f"--data_dir={data}", f"--out_dir={folder}/new", "--block_size=16", "--device=cpu"]
    for path, place, command, arguments in (
        (step / "model.safetensors", -5, sample, [f"--checkpoint={run}", "--device=cpu"]),
        (step / "model.safetensors", -5, train, onwards),
        (step / "model.safetensors", -5, train, [*anew, f"--init_from={run}"]),
        (step / "optimizer.pt", 2000, train, onwards),
        (run / "metrics.jsonl", 30, train, onwards),
        (data / "train_000000.bin", 3000, train, anew),
        (data / "val_000000.mask.bin", 30, train, anew),
    ):
        flip(path, place)
        capsys.readouterr()
        assert command.main(arguments) == 2
        errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert len(errors) == 1 and f"{path}" in errors[0], errors
        assert ("SHA256SUMS" in errors[0]) == (path.parent == step)
        flip(path, place)
        shutil.rmtree(folder / "new", ignore_errors=True)


def test_a_change_that_is_meant_needs_no_more_than_its_sums_removed(folder, tmp_path, capsys):
    step = shutil.copytree(folders.find(folder / "run"), tmp_path / "step")
    config = json.loads((step / "config.json").read_text())
    (step / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    arguments = [f"--checkpoint={step}", "--device=cpu", "--max_new_tokens=3"]
    assert sample.main(arguments) == 2
    assert f"if the change is intended, delete {step}/SHA256SUMS" in capsys.readouterr().err
    (step / "SHA256SUMS").unlink()
    assert sample.main(arguments) == 2
    assert "has fewer than the 2 layers" in capsys.readouterr().err
    (step / "config.json").write_text(json.dumps(config | {"summary_type": "mine"}))
    assert sample.main(arguments) == 0


def test_folders_of_older_versions_open_without_checksums(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copytree(folder / "data", tmp_path / "data")
    for path in tmp_path.rglob("SHA256SUMS"):
        path.unlink()
    manifest = json.loads((tmp_path / "data" / "dataset.json").read_text())
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            assert len(shard.pop("crc32")) == 8 and len(shard.pop("mask_crc32")) == 8
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(manifest))
    for name in ("run.json", "metrics.jsonl"):
        path = tmp_path / "run" / name
        path.write_text(re.sub(r', "crc32": "\w{8}"', "", path.read_text()))
    for path in (tmp_path / "run").glob("step_*/state.json"):
        state = json.loads(path.read_text())
        assert state.pop("progress")["waited"] == 0
        path.write_text(json.dumps(state))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run.pop("best")
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    onwards = [f"--data_dir={tmp_path}/data", f"--out_dir={tmp_path}/run", "--max_steps=5"]
    assert train.main([*onwards, "--init_from=resume"]) == 0
