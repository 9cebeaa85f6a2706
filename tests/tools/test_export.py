"""A folder for others: whole, opened by `transformers`, with a card of the run's own figures."""

import json
import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import safetensors.torch
import torch
from test_train import cfg, same  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import train
from model import GPT, GPTConfig
from plaingpt import files
from plaingpt.checkpoint import folders, hugging_face
from plaingpt.text.templates import CHAT_TEMPLATES
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training import run_folder
from tools import export


@pytest.fixture(scope="module")
def run(cfg, tmp_path_factory):  # noqa: F811
    """A run folder, from data whose manifest says where it came from."""
    data_dir = Path(cfg.data_dir)
    manifest = {"settings": {"sources": ["tales/*.txt"]}, "splits": {}}
    shards = {name: data_dir / f"{name}_000000.bin" for name in ("train", "val")}
    for name, path in shards.items():
        tokens = (path.stat().st_size - 1024) // 2
        entry = {"file": path.name, "tokens": tokens, "sha256": name}
        counts = {"documents": 1, "bytes": tokens, "tokens": tokens}
        manifest["splits"][name] = {**counts, "shards": [entry]}
    (data_dir / "dataset.json").write_text(json.dumps(manifest))
    out_dir = tmp_path_factory.mktemp("run")
    train.train(replace(cfg, out_dir=str(out_dir)))
    return out_dir


def test_the_folder_is_what_transformers_needs_and_no_more(run, tmp_path, capsys):
    out_dir = tmp_path / "mine"
    assert export.main([f"--checkpoint={run}", f"--out_dir={out_dir}"]) == 0
    names = {path.name for path in out_dir.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert list(tmp_path.iterdir()) == [out_dir]
    ours, theirs = hugging_face.read_weights(folders.find(run)), hugging_face.read_weights(out_dir)
    assert same(ours, theirs)
    write = pipeline("text-generation", model=str(out_dir), device="cpu")
    assert write("al", max_new_tokens=3)[0]["generated_text"].startswith("al")


@pytest.mark.parametrize("tie_weights", [True, False])
def test_the_padding_of_a_vocabulary_is_left_out(tie_weights):
    shape = GPTConfig(264, block_size=16, n_layer=1, n_head=2, n_embd=32, tie_weights=tie_weights)
    padded = GPT(shape).init_weights(1)
    plain = export.without_padding(padded, 257)
    idx = torch.arange(16)[None]
    assert torch.equal(plain(idx), padded(idx)[..., :257])
    assert plain.config == replace(shape, vocab_size=257)
    assert (plain.lm_head.weight is plain.transformer.wte.weight) == tie_weights
    assert plain.num_params() == GPT(plain.config).num_params()


def test_the_card_has_the_runs_figures(run, tmp_path):
    out_dir = export.export(export.ExportConfig(str(run), str(tmp_path / "mine")))
    card = huggingface_hub.ModelCard.load(out_dir / "README.md")
    assert card.data.library_name == "transformers" and "gpt2" in card.data.tags
    last = run_folder.read_records(run / "metrics.jsonl")[-1]
    tokens = json.loads((run / "run.json").read_text())["starts"][0]["settings"]["max_steps"] * 64
    for words in (
        "# mine",
        "A GPT-2 of 34,208 parameters",
        "| steps | 20 |",
        f"| tokens | {tokens:,} |",
        f"| validation loss | {last['val_loss']:.4f} nats per token |",
        f"| validation, bits per byte | {last['val_bpb']:.4f} |",
        "| data | tales/*.txt (",
        "| optimizer | muon |",
        f'model="{out_dir}"',
    ):
        assert words in card.content, words


def test_a_card_for_the_hub_says_where_it_is_and_what_it_was_made_from(run, tmp_path, capsys):
    step = folders.find(run)
    tuned = tmp_path / "tuned" / step.name
    tuned.mkdir(parents=True)
    for path in step.iterdir():
        (tuned / path.name).write_bytes(path.read_bytes())
    starts = [{"settings": {"init_from": name}} for name in ("gpt2", "resume")]
    files.write_json(tuned.parent / "run.json", {"starts": starts})
    (tuned / "SHA256SUMS").unlink()  # which would notice the change
    tokenizer = Tokenizer.load(tuned)
    tokenizer.chat_template = CHAT_TEMPLATES["chat"]
    tokenizer.save(tuned)
    arguments = [f"--checkpoint={tuned}", f"--out_dir={tmp_path}/x", "--push_to_hub=me/talker"]
    with mock.patch.object(huggingface_hub, "HfApi") as api:
        assert export.main([*arguments, "--dry_run"]) == 0
        assert not api.called
    out = capsys.readouterr().out
    assert "would be uploaded to me/talker" in out and "base_model: openai-community/gpt2" in out
    assert 'model="me/talker"' in out and "# talker" in out and '{"role": "user"' in out
    assert "| started from | gpt2 |" in out and not (tmp_path / "x").exists()
    assert export.main(arguments[:2]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "x").chat_template == CHAT_TEMPLATES["chat"]


def test_it_is_uploaded_as_huggingface_hub_does_it(run, tmp_path, capsys):
    api = mock.create_autospec(huggingface_hub.HfApi)
    arguments = [f"--checkpoint={run}", "--push_to_hub=me/mine", "--private"]
    with mock.patch.object(huggingface_hub, "HfApi", return_value=api):
        assert export.main([*arguments, f"--out_dir={tmp_path}/a"]) == 0
    api.create_repo.assert_called_once_with("me/mine", private=True, exist_ok=True)
    api.upload_folder.assert_called_once_with(repo_id="me/mine", folder_path=tmp_path / "a")
    capsys.readouterr()
    assert export.main([*arguments, f"--out_dir={tmp_path}/b"]) == 2  # the tests have no network
    err = capsys.readouterr().err
    assert "could not upload to me/mine on the hub (OfflineModeIsEnabled" in err
    assert "hf upload me/mine" in err and (tmp_path / "b" / "README.md").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--out_dir={full}"], "already exists: choose another --out_dir"),
        (["--out_dir={link}"], "already exists: choose another --out_dir"),
        (["--out_dir={step}/mine"], "would be in a checkpoint, or look like one"),
        (["--out_dir={full}/step_000099"], "would be in a checkpoint, or look like one"),
        (["--out_dir="], "cannot be the name of a new folder"),
        (["--out_dir={new}/.."], "cannot be the name of a new folder"),
        (["--out_dir={new}", "--push_to_hub=me"], "push_to_hub='me' is not of the form OWNER/NAME"),
        (["--out_dir={new}", "--push_to_hub=me/it@main"], "is not of the form OWNER/NAME"),
        (["--out_dir={new}", "--push_to_hub=me/-it"], "is not of the form OWNER/NAME"),
        (["--out_dir={new}", "--dry_run"], "dry_run needs push_to_hub"),
        (["--out_dir={new}", "--private"], "private needs push_to_hub"),
        (["--out_dir={new}", "--checkpoint={new}"], "does not exist"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(run, tmp_path, capsys, arguments, message):
    paths = {"full": run, "new": tmp_path / "new", "step": folders.find(run)}
    paths["link"] = run.parent / "link"
    if not paths["link"].is_symlink():
        paths["link"].symlink_to(tmp_path)
    words = [argument.format(**paths) for argument in arguments]
    assert export.main([f"--checkpoint={run}", *words]) == 2
    out, err = capsys.readouterr()
    assert message in err and out == "" and list(tmp_path.iterdir()) == []


def test_a_folder_of_someone_else_has_a_card_without_figures(run, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders.find(run))
    model.save_pretrained(tmp_path / "theirs")
    Tokenizer.bytes().save(tmp_path / "theirs")
    (tmp_path / "mine").mkdir()  # empty: taken
    out_dir = export.export(export.ExportConfig(str(tmp_path / "theirs"), str(tmp_path / "mine")))
    card = (out_dir / "README.md").read_text()
    assert "## Training" not in card and "plainGPT" not in card


@pytest.mark.skipif(os.name == "nt", reason="names of files are bytes on POSIX only")
def test_a_folder_whose_name_is_not_utf8_has_a_card(run, tmp_path):
    out_dir = tmp_path / os.fsdecode(b"caf\xe9")
    assert export.main([f"--checkpoint={run}", f"--out_dir={out_dir}"]) == 0
    assert "# caf\\udce9\n" in (out_dir / "README.md").read_text(encoding="utf-8")


def test_data_that_changed_since_is_not_named_and_folders_of_this_machine_never(run, tmp_path):
    manifest = Path(folders.read_state(folders.find(run)).settings["data_dir"]) / "dataset.json"
    before = manifest.read_text()
    for changes, row in (
        ({"settings": {"sources": ["/home/me/private/tales.txt", "hf:owner/tales"]}}, True),
        ({"splits": {}}, False),
    ):
        manifest.write_text(json.dumps(json.loads(before) | changes))
        text = "\n".join(export.training_section(folders.find(run)))
        assert ("| data | tales.txt, hf:owner/tales (" in text) == row and "private" not in text
    manifest.write_text(before)


def test_a_damaged_run_json_is_one_line(run, tmp_path, capsys):
    before = (run / "run.json").read_text()
    (run / "run.json").write_text("{}")
    assert export.main([f"--checkpoint={run}", f"--out_dir={tmp_path}/x"]) == 2
    (run / "run.json").write_text(before)
    assert "run.json: missing field starts" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert export.main([f"--checkpoint={run}", f"--out_dir={tmp_path}/x"]) == 2
    assert "could not write" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
