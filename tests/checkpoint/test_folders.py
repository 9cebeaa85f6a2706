"""Checkpoint folders: found, pruned, described, and taken from the hub's cache."""

import json
import os
import shutil
from unittest import mock

import huggingface_hub
import pytest
import torch
from test_hugging_face import in_the_wild  # noqa: F401
from test_store import IDX, save

from configurator import UserError
from plaingpt import files
from plaingpt.checkpoint import folders, store
from plaingpt.text.tokenizer import Tokenizer


def test_find_takes_the_newest_step_or_the_folder_itself(tmp_path):
    for step in (5, 1_000_000, 20):
        save(tmp_path, step)
    assert [p.name for p in folders.step_folders(tmp_path)] == [
        "step_000005",
        "step_000020",
        "step_1000000",
    ]
    assert folders.find(tmp_path).name == "step_1000000"
    assert folders.find(tmp_path / "step_000020").name == "step_000020"
    with pytest.raises(UserError, match="nowhere does not exist"):
        folders.find(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no checkpoint"):
        folders.find(tmp_path / "empty")


def test_a_folder_that_is_no_checkpoint_leads_to_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def advice(where) -> str:
        with pytest.raises(UserError) as caught:
            folders.find(where)
        return str(caught.value)

    assert advice("nope") == "nope does not exist; run train.py to make one"
    assert advice("out/nope") == "out/nope does not exist; run train.py to make one"
    assert advice("EleutherAI/gpt") == (
        "EleutherAI/gpt does not exist; a model of the hub is named hf:EleutherAI/gpt"
    )
    data = tmp_path / "data" / "tales"
    data.mkdir(parents=True)
    (data / "dataset.json").touch()
    assert advice("data/tales") == (
        "data/tales is a data folder, not a checkpoint; "
        "python train.py --data_dir=data/tales --out_dir=out/tales trains one"
    )
    for name in ("tales", "more"):
        save(tmp_path / "out" / name)
        start = folders.RunStart(settings={"init_from": "x", "data_dir": f"data/{name}"})
        files.write_json(tmp_path / "out" / name / "run.json", folders.Run((start,)))
    assert advice("data/tales").endswith("not a checkpoint; models trained on it: out/tales")
    assert advice("out/tale") == "out/tale does not exist; did you mean out/tales?"
    assert advice("nope") == "nope does not exist; trained models: out/more, out/tales"


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, loss in enumerate([5.0, 2.0, None, 3.0, 4.0], start=1):
        save(tmp_path, step, val_loss=loss)
        folders.prune(tmp_path, keep=2)
    assert [int(p.name[5:]) for p in folders.step_folders(tmp_path)] == [2, 4, 5]


def test_best_names_the_checkpoint_of_the_lowest_loss(tmp_path):
    assert folders.best_of(tmp_path) is None
    for step, loss in enumerate([None, 3.0, 2.0, 2.0, 4.0], start=1):
        save(tmp_path, step, val_loss=loss)
    assert folders.best_of(tmp_path) == folders.Best("step_000003", 2.0)
    assert folders.find(tmp_path / "best") == tmp_path / "step_000003"
    (tmp_path / "step_000003" / "state.json").write_text("{")
    assert folders.find(f"{tmp_path}/best/").name == "step_000004"
    shutil.copytree(tmp_path / "step_000005", tmp_path / "best")  # as a copy of a link may be
    assert folders.find(tmp_path / "best").name == "step_000004"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty/best does not exist"):
        folders.find(tmp_path / "empty" / "best")


@pytest.mark.skipif(os.name == "nt", reason="links need a right on Windows")
def test_a_link_leads_to_the_best_or_is_gone(tmp_path, monkeypatch):
    for name in ("step_000001", "step_000002"):
        (tmp_path / name).mkdir()
        (tmp_path / ".partial_best").symlink_to("left by a kill")
        folders.link_best(tmp_path, name)
        assert os.readlink(tmp_path / "best") == name
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no links"):
        patch.setattr(os, "symlink", mock.Mock(side_effect=OSError("no links")))
        folders.link_best(tmp_path, "step_000001")
    assert sorted(os.listdir(tmp_path)) == ["step_000001", "step_000002"]
    (tmp_path / "best").mkdir()
    with pytest.raises(OSError, match="best exists and is not a link"):
        folders.link_best(tmp_path, "step_000001")
    assert (tmp_path / "best").is_dir()


def test_a_damaged_old_checkpoint_ends_no_training(tmp_path, capsys):
    for step in range(1, 5):
        save(tmp_path, step, val_loss=float(step))
    (tmp_path / "step_000002" / "state.json").write_text("{")
    folders.prune(tmp_path, keep=1)
    assert [int(p.name[5:]) for p in folders.step_folders(tmp_path)] == [1, 2, 4]
    assert f"keeping {tmp_path / 'step_000002'}: " in capsys.readouterr().out


def test_folders_of_others_are_not_checkpoints(tmp_path):
    _, folder = save(tmp_path)
    (tmp_path / "step_000999").mkdir()
    (tmp_path / "step_001000").write_text("a file")
    assert folders.find(tmp_path) == folder
    with pytest.raises(OSError, match="step_000999 already exists"):
        save(tmp_path, 999)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "abc"}, "step: expected a whole number, got a string"),
        ({"step": -5}, "step: expected a whole number >= 0"),
        ({"step": 10**30}, "step: expected a whole number <= "),
        ({"step": 7}, "step is 7, but the folder is named step_000001"),
        ({"skipped": "none"}, "skipped: expected a whole number"),
        ({"data": None}, "data: expected a string, got null"),
        ({"settings": []}, "settings: expected an object, got a list"),
        ({"settings": {"seed": [[1]]}}, "settings[…][0]: expected a string"),
        ({"val_loss": "low"}, "val_loss: expected a number or null, got a string"),
        ({"versions": 3}, "versions: expected an object"),
    ],
)
def test_a_state_of_another_kind_is_refused(tmp_path, change, message):
    _, folder = save(tmp_path)
    (folder / "SHA256SUMS").unlink()  # which would notice the change
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as caught:
        folders.read_state(folder)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    "content",
    ["{}", '{"starts": 1}', '{"starts": [1]}', '{"starts": [{"settings": {}}]}', "[]", "{"],
)
def test_a_damaged_record_of_starts_is_refused(tmp_path, content):
    assert folders.read_starts(tmp_path) == ()
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json(: | is damaged: )"):
        folders.read_starts(tmp_path)


# --- the hub


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, in_the_wild):  # noqa: F811
    """huggingface_hub's cache, holding one model in its layout, without a network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def add(repo_id, revision="main"):
        repo = cache / f"models--{repo_id.replace('/', '--')}"
        commit = "0123456789abcdef0123456789abcdef01234567"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / revision).write_text(commit)
        return in_the_wild(repo / "snapshots" / commit)

    return add


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl", "hf:someone/some-gpt2", "hf:an/other@v1.0"])
def test_a_model_of_the_hub_opens_from_the_cache(hub_cache, name):
    repo_id, _, revision = folders.HUB_NAMES.get(name, name).removeprefix("hf:").partition("@")
    theirs = hub_cache(repo_id, revision or "main")
    ours = store.load_model(name)
    torch.testing.assert_close(ours(IDX), theirs(IDX).logits, atol=1e-4, rtol=0)
    assert Tokenizer.load(folders.find(name)).vocab_size == 257


@pytest.mark.parametrize("name", ["gpt2-medium", "hf:no/where"])
def test_a_model_that_cannot_be_downloaded_is_one_error(hub_cache, name):
    with pytest.raises(
        UserError, match=f"{name.removeprefix('hf:')} is not in the cache"
    ) as caught:
        folders.find(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["hf:", "hf:alone", "hf:a/b/c", "hf:a b/c"])
def test_a_malformed_hub_name_is_refused(name):
    with pytest.raises(UserError, match="is not of the form hf:OWNER/NAME"):
        folders.find(name)
