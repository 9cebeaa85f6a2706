"""What is answered to names of other programs, bare words and missing config files."""

from pathlib import Path

import pytest

import configurator
import prepare
import sample
import train
from configurator import UserError
from plaingpt import advice
from tools import compare, eval, export, serve

REPO = Path(__file__).parents[1]
CLASSES = {
    "prepare": prepare.PrepareConfig,
    "train": train.TrainConfig,
    "sample": sample.SampleConfig,
    "eval": eval.EvalConfig,
    "export": export.ExportConfig,
    "compare": compare.CompareConfig,
    "serve": serve.ServeConfig,
}


def message(command: str, *argv: str) -> str:
    with pytest.raises(UserError) as caught:
        configurator.resolve(CLASSES[command], list(argv))
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text.removeprefix("command line: ")


def test_a_config_file_of_another_command_says_so_in_a_line(monkeypatch):
    monkeypatch.chdir(REPO)
    for argv, file, other in (
        ("train.py", "config/data_fineweb.py", "prepare.py"),
        ("prepare.py", "config/gpt2_124m.py", "train.py"),
        ("prepare.py", "config/finetune_chat.py", "train.py"),
    ):
        monkeypatch.setattr("sys.argv", [f"/some/where/{argv}"])
        said = message(argv.removesuffix(".py"), file)
        assert said == f"{file} is for {other}: python {other} {file}"
    for argv, number in (("train.py", 4), ("prepare.py", 1)):
        monkeypatch.setattr("sys.argv", [argv])
        found = advice.unknown_in("config/gpt2_124m.py", ["a", "b", "c", "d"], {"learning_rate"})
        assert len(found) == number


@pytest.mark.parametrize(
    ("command", "argument", "ours"),
    [
        ("train", "--lr=1e-3", "learning_rate"),
        ("train", "--max_iters=5", "max_steps"),
        ("train", "--lr_decay_iters=5", "max_steps"),
        ("train", "--gradient_accumulation_steps=5", "micro_batch_size"),
        ("train", "--per-device-train-batch-size=5", "micro_batch_size"),
        ("train", "--dataset=shakespeare", "data_dir"),
        ("train", "--output_dir=x", "out_dir"),
        ("train", "--n_layers=2", "n_layer"),
        ("train", "--max_length=2", "block_size"),
        ("train", "--warmup_iters=2", "warmup_steps"),
        ("train", "--eval_iters=2", "eval_tokens"),
        ("train", "--wandb_log=True", "tracker"),
        ("train", "--num_train_epochs=3", "epochs"),
        ("train", "--resume_from_checkpoint=x", "init_from"),
        ("prepare", "--dataset=x", "sources"),
        ("prepare", "--out_dir=x", "data_dir"),
        ("prepare", "--num_proc=4", "workers"),
        ("sample", "--prompt=x", "start"),
        ("sample", "--out_dir=x", "checkpoint"),
        ("sample", "--max_length=x", "max_new_tokens"),
        ("sample", "--num_return_sequences=3", "num_samples"),
        ("serve", "--max_tokens=3", "max_new_tokens"),
        ("eval", "--model=gpt2", "checkpoint"),
        ("eval", "--out_dir=x", "checkpoint"),
        ("eval", "--dataset=x", "data_dir"),
    ],
)
def test_a_name_of_another_program_leads_to_ours(command, argument, ours):
    name = argument[2:].partition("=")[0].replace("-", "_")
    said = message(command, argument)
    assert f"unknown setting {name!r}; " in said and repr(ours) in said


def test_no_guess_is_better_than_a_poor_one():
    assert message("eval", "--batch_size=8") == "unknown setting 'batch_size'"


def test_where_the_meaning_differs_it_is_said(tmp_path):
    assert message("train", "--max_iters=5") == (
        "unknown setting 'max_iters'; use 'max_steps' "
        "(a step is one update of the weights, nanoGPT's iteration)"
    )
    path = tmp_path / "theirs.py"
    path.write_text("gradient_accumulation_steps = 40\n")
    assert message("train", str(path)) == (
        f"{path}: unknown setting 'gradient_accumulation_steps'; use "
        "'micro_batch_size' (batch_size counts all sequences of a step; accumulation follows "
        "from it and micro_batch_size)"
    )


def test_capitals_and_a_config_file_as_a_setting_are_recognized():
    assert message("train", "--MAX_STEPS=5").endswith("; did you mean 'max_steps'?")
    for argument in ("--config=x.py", "--config-file=x.py"):
        said = message("train", argument)
        assert "; name the config file alone, without --config" in said


def test_every_line_of_the_table_leads_to_a_setting():
    hints = {command: configurator.get_type_hints(cls) for command, cls in CLASSES.items()}
    for line in advice.OTHER_NAMES.strip().splitlines():
        ours, _, rest = line.partition(": ")
        theirs, _, note = rest.partition(" (")
        assert note.endswith(")") or not note
        commands = [command for command in hints if ours in hints[command]]
        for name in theirs.split():
            said = [
                advice.unknown(name, hints[each]) for each in commands if name not in hints[each]
            ]
            assert any(f"use {ours!r}" in each for each in said), (name, ours)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a text, a folder and config files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "novel.txt").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "config").mkdir()
    for name in ("data_tales", "gpt2_124m", "gpt2_350m"):
        (tmp_path / "config" / f"{name}.py").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("command", "argv", "said"),
    [
        ("prepare", ["novel.txt"], "; write --sources=novel.txt --data_dir=data/novel"),
        ("prepare", ["a b.txt"], "; write --sources='a b.txt' --data_dir='data/a b'"),
        ("prepare", ["a.txt", "b.txt"], "; write --sources=a.txt,b.txt --data_dir=data/a"),
        ("prepare", ["a.txt", "--data_dir=x"], "; write --sources=a.txt"),
        ("prepare", ["--sources", "a.txt", "b.txt"], " (quote a value that contains spaces or *)"),
        ("prepare", ["data_tales"], "; did you mean config/data_tales.py?"),
        ("sample", ["def main("], "; write --start='def main('"),
        ("sample", ["Once", "upon", "a"], "; write --start='Once upon a'"),
        ("sample", ["--start", "Once", "upon"], " (quote a value that contains spaces or *)"),
        ("sample", ["novel.txt"], "; write --start=FILE:novel.txt"),
        ("sample", ["run"], "; write --checkpoint=run"),
        ("sample", ["temperature=0.5"], "; did you mean --temperature=0.5?"),
        ("train", ["-max-steps", "5"], "; did you mean --max-steps 5?"),
        ("train", ["—max_steps=5"], "; did you mean --max_steps=5?"),
        ("train", ["config/gpt2_124m"], "; did you mean config/gpt2_124m.py?"),
        ("train", ["gpt2_125m"], "; did you mean config/gpt2_124m.py?"),
        ("train", ["run"], " (quote a value that contains spaces or *)"),
        ("export", ["run"], "; write --checkpoint=run"),
        ("compare", ["run", "b"], "; write --runs=run,b"),
    ],
)
def test_a_bare_word_is_answered_with_what_to_write(folder, command, argv, said):
    expected = f" is neither a config file (*.py) nor --key=value{said}"
    assert message(command, *argv).endswith(expected)


@pytest.mark.parametrize(
    ("path", "similar"),
    [
        ("config/gtp2.py", "config/gpt2_124m.py"),
        ("config/gpt2_350.py", "config/gpt2_350m.py"),
        ("gpt2_350m.py", "config/gpt2_350m.py"),
        ("config/xyz.py", None),
        ("nowhere/gpt2_350m.py", None),
    ],
)
def test_a_missing_config_file_leads_to_a_similar_one(folder, path, similar):
    said = f"; did you mean {similar}?" if similar else ""
    assert message("train", path) == f"{path}: No such file or directory{said}"


def test_what_a_config_file_does_not_find_is_not_taken_for_itself(folder):
    (folder / "config" / "mine.py").write_text("open('nowhere.txt')")
    assert message("train", "config/mine.py") == (
        "config/mine.py:1: FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.txt'"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("libtorch.so: failed to map", name="torch._C"), "error: libtorch.so: failed"),
        (ModuleNotFoundError("No module", name="tqdm"), "error: tqdm is not installed; "),
    ],
)
def test_a_package_that_cannot_be_imported_is_one_line(capsys, error, said):
    with pytest.raises(SystemExit) as ended:
        advice.explain_import(type(error), error, None)
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(said) and "pip install" in line


@pytest.mark.parametrize("error", [ImportError("x", name="plaingpt.files"), ValueError("x")])
def test_a_bug_of_our_own_keeps_its_traceback(capsys, error):
    advice.explain_import(type(error), error, None)
    assert capsys.readouterr().err == f"{type(error).__name__}: x\n"
