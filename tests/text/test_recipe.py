"""The command that makes a data folder."""

from dataclasses import fields
from pathlib import Path

import pytest

import configurator
import prepare
import train
from plaingpt.text import recipe
from plaingpt.text.dataset import open_dataset

CONFIGS = sorted(path for path in recipe.CONFIG.glob("*.py") if not path.name.startswith("data_"))


def test_the_defaults_are_those_of_prepare():
    defaults = {field.name: field.default for field in fields(prepare.PrepareConfig)}
    assert {name: defaults[name] for name in recipe.DEFAULTS} == recipe.DEFAULTS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_data_of_every_config_is_made_by_a_recipe(path):
    cfg, _ = configurator.resolve(train.TrainConfig, [str(path)])
    made_by, settings = recipe.recipe_for(Path(cfg.data_dir))
    assert made_by is not None and settings["data_dir"] == cfg.data_dir


@pytest.mark.parametrize(
    "folder, command, ids",
    [
        ("data/stdlib", "python prepare.py", 4096),
        ("data/fineweb/", "python prepare.py config/data_fineweb.py", 50257),
        ("data/shakespeare", "python prepare.py config/data_shakespeare.py", 257),
        ("data/tinystories", "python prepare.py config/data_tinystories.py", 4096),
        ("data/mine", "python prepare.py --sources=FILES --data_dir=data/mine", 50257),
    ],
)
def test_advice_names_the_recipe(folder, command, ids, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipe.command_for(Path(folder)) == command
    assert recipe.vocab_size_for(Path(folder)) == ids
    with pytest.raises(ValueError) as caught:
        open_dataset(folder)
    assert str(caught.value) == f"there is no data in {Path(folder)}; {command} makes it"
