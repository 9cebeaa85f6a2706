"""Adapters: only they train, they resume, and merged they are an ordinary model."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from test_train import assert_same_end, cfg, records, same  # noqa: F401
from transformers import GPT2LMHeadModel

import sample
import train
from configurator import UserError
from model import GPT, GPTConfig
from plaingpt import lora, runtime
from plaingpt.checkpoint import adapters, folders, store
from plaingpt.training import optim
from plaingpt.training.devices import Device
from plaingpt.training.memory import memory_gib
from plaingpt.training.plan import make_plan
from plaingpt.training.start import Start
from tools import export

SHAPE = GPTConfig(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=32)
CONFIG = lora.LoRAConfig(rank=4, alpha=8.0, dropout=0.0, targets=("c_attn", "mlp.c_proj"))
IDX = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))


def adapted(seed=1, config=CONFIG) -> GPT:
    """A model with adapters that have learned something."""
    model = GPT(SHAPE).init_weights(seed)
    lora.add(model, config, seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(seed))
    return model.eval()


@pytest.fixture(scope="module")
def base(cfg, tmp_path_factory):  # noqa: F811
    """The folder of a checkpoint to start from."""
    out_dir = tmp_path_factory.mktemp("base")
    train.train(replace(cfg, out_dir=str(out_dir), max_steps=10))
    return folders.find(out_dir)


@pytest.fixture
def run(cfg, base, tmp_path):  # noqa: F811
    """A run of an adapter."""
    settings = {"init_from": str(base), "lora_rank": 4, "lora_dropout": 0.1, "max_steps": 12}
    return replace(cfg, **settings, save_interval=4, out_dir=str(tmp_path / "lora"))


# --- the layers


def test_a_new_adapter_changes_nothing_and_only_it_trains():
    model = GPT(SHAPE).init_weights(1)
    before = model(IDX)
    lora.add(model, CONFIG, seed=1)
    assert torch.equal(model(IDX), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == lora.adapter_tensors(model.state_dict()).keys()
    assert len(trained) == 2 * 2 * SHAPE.n_layer
    model(IDX, IDX).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_merged_is_unmerged():
    model = adapted()
    before, plain = model(IDX), GPT(SHAPE).init_weights(1)
    assert (before - plain(IDX)).abs().max() > 0.1
    lora.merge(model)
    torch.testing.assert_close(model(IDX), before, atol=1e-5, rtol=0)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def test_any_linear_layer_takes_one_but_not_one_whose_weight_is_shared():
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 6))
    lora.add(model, replace(CONFIG, targets=("0", "2")), seed=0)
    assert model(torch.ones(3, 4)).shape == (3, 6)
    assert set(lora.adapter_tensors(model.state_dict())) == {
        f"{layer}.lora_{part}.weight" for layer in "02" for part in "AB"
    }
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        lora.add(GPT(SHAPE), replace(CONFIG, targets=("lm_head",)), seed=0)
    untied = GPT(replace(SHAPE, tie_weights=False)).init_weights(0)
    lora.add(untied, replace(CONFIG, targets=("lm_head",)), seed=0)


def test_a_target_that_is_nowhere_is_refused_with_the_closest():
    with pytest.raises(ValueError, match="named 'c_atn'; did you mean 'c_attn'"):
        lora.add(GPT(SHAPE), replace(CONFIG, targets=("c_atn",)), seed=0)
    with pytest.raises(ValueError, match="rank 97 exceeds that of .*c_attn, 32 → 96"):
        lora.add(GPT(SHAPE), replace(CONFIG, rank=97), seed=0)
    with pytest.raises(ValueError, match="named 'q'; there are c_attn, c_fc, c_proj, lm_head"):
        lora.add(GPT(SHAPE), replace(CONFIG, targets=("q",)), seed=0)


@pytest.mark.parametrize("name, moments", [("adamw", 2), ("muon", 1)])
def test_the_optimizer_has_the_adapters_alone(name, moments):
    model = adapted()
    rates = {"weight_decay": 0.0, "betas": (0.9, 0.99), "momentum": 0.9, "embedding_lr_scale": 1.0}
    optimizers = optim.build_optimizers(model, optim.OptimizerConfig(name, **rates))
    assert len(optimizers) == 1
    optim.set_learning_rate(optimizers, 0.01)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(IDX, IDX).backward()
    optimizers[0].step(torch.tensor(True))
    changed = {
        name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])
    }
    assert (
        changed
        == lora.adapter_tensors(before).keys()
        == optim.optimizer_state(model, optimizers).keys()
    )


# --- training


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_4_steps_and_8_more_are_12_steps(run, tmp_path, monkeypatch, optimizer):
    whole = replace(run, optimizer=optimizer, out_dir=str(tmp_path / "whole"))
    last = train.train(whole)
    assert records(whole.out_dir)[0]["val_loss"] > last["val_loss"]
    parts = replace(run, optimizer=optimizer, block_size=None)
    train.train(parts)
    for step in ("step_000008", "step_000012"):
        shutil.rmtree(Path(run.out_dir) / step)
    read, really_read = [], adapters.tensors_of
    monkeypatch.setattr(adapters, "tensors_of", lambda *of: read.append(of) or really_read(*of))
    train.train(replace(parts, init_from="resume"))
    assert len(read) == 1
    one, other = folders.find(tmp_path / "whole"), folders.find(run.out_dir)
    about = [replace(adapters.read_adapter(folder)[0], base="") for folder in (one, other)]
    assert about[0] == about[1]
    assert same(adapters.read_adapter(one)[1], adapters.read_adapter(other)[1])
    assert same(store.read_optimizer(one), store.read_optimizer(other))
    assert records(whole.out_dir) == records(run.out_dir)
    assert not (one / "model.safetensors").exists() and not (one / "config.json").exists()


def test_an_adapter_outlives_the_run_of_its_model_and_moves_with_its_own(run, base, tmp_path):
    shutil.copytree(base, tmp_path / "first" / base.name)
    train.train(replace(run, init_from=str(tmp_path / "first"), max_steps=4))
    before = store.load_model(run.out_dir)(IDX)
    shutil.rmtree(tmp_path / "first")
    shutil.move(run.out_dir, tmp_path / "moved")
    assert torch.equal(store.load_model(tmp_path / "moved")(IDX), before)
    (Path(run.out_dir) / "base").mkdir(parents=True)  # of another run, with another model
    assert torch.equal(store.load_model(tmp_path / "moved")(IDX), before)


def test_shorter_windows_are_kept_when_a_run_resumes(run):
    short = replace(run, block_size=8)
    train.train(short)
    assert train.main([f"--out_dir={run.out_dir}", "--init_from=resume", "--max_steps=13"]) == 0
    assert store.load_model(run.out_dir).config.block_size == 16  # the model's own


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lora_rank=8"], "lora_rank is 4, not 8"),
        (["--lora_alpha=8"], "lora_alpha is 16.0, not 8.0"),
        (["--lora_targets=c_fc"], "lora_targets is ('c_attn', 'c_proj', 'c_fc'), not ('c_fc',)"),
        (["--lora_rank=0"], "lora_rank is 4, not 0"),
        (["--lora_dropout=0.5"], "lora_dropout is 0.1, not 0.5"),
    ],
)
def test_another_adapter_does_not_resume(run, capsys, arguments, message):
    train.train(replace(run, max_steps=4))
    resume = [f"--out_dir={run.out_dir}", "--init_from=resume", "--max_steps=8"]
    assert train.main([*resume, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init_from": "scratch"}, "lora_rank needs init_from"),
        ({"lora_rank": -1}, "lora_rank must be at least 0, not -1"),
        ({"lora_alpha": 0.0}, "alpha must be a number above 0"),
        ({"lora_dropout": 1.0}, "dropout must be in"),
        ({"lora_targets": ("c_atn",)}, "did you mean 'c_attn'"),
        ({"lora_targets": ()}, "lora_targets is empty"),
    ],
)
def test_bad_settings(run, changes, message):
    with pytest.raises(ValueError, match=message):
        train.train(replace(run, **changes))
    assert not Path(run.out_dir).exists()


def test_the_plan_says_what_trains_and_what_it_takes(run, base, capsys):
    train.train(replace(run, plan=True))
    out = capsys.readouterr().out
    assert "LoRA: 4,096 parameters train (10.7%), rank 4 on c_attn, c_proj, c_fc." in out
    model = store.load_model(base)
    rt, memory = runtime.start("cpu", "float32"), []
    for _ in range(2):
        settings = vars(replace(run, optimizer="adamw"))
        plan = make_plan(settings, Start(model), None, 4, rt, Device("cpu", "cpu"))
        memory.append(memory_gib(plan) * 2**30)
        lora.add(model, CONFIG, seed=0) if len(memory) == 1 else None
    params = 34_208  # of each all but the adapters' lose gradient and moments
    adapters = model.num_params() - params
    assert memory[0] - memory[1] == pytest.approx(12 * params - 16 * adapters)
    flops = [model.config.flops_per_token(frozen) for frozen in (False, True)]
    matrices = 2 * 12 * 32**2 + 257 * 32
    assert flops[0] - flops[1] == 2 * matrices


def test_a_run_goes_on_elsewhere_with_its_base(run, tmp_path):
    train.train(run)
    other = tmp_path / "other"
    first = f"--init_from={run.out_dir}/step_000004"
    assert train.main([first, "--resume", f"--out_dir={other}"]) == 0
    for read in (lambda at: adapters.read_adapter(at)[1], store.read_optimizer):
        assert same(read(folders.find(other)), read(folders.find(run.out_dir)))
    content = [(folders.find(at) / "optimizer.pt").read_bytes() for at in (other, run.out_dir)]
    assert content[0] == content[1]
    assert records(other) == records(run.out_dir)
    shutil.rmtree(run.out_dir)
    store.load_model(other)
    assert train.main([f"--out_dir={other}", "--init_from=resume", "--max_steps=14"]) == 0


def test_merged_by_one_command_it_is_an_ordinary_checkpoint(run, tmp_path, capsys):
    train.train(run)
    merged = tmp_path / "merged"
    assert export.main([f"--checkpoint={run.out_dir}", f"--out_dir={merged}"]) == 0
    logits = store.load_model(run.out_dir, merged=False).eval()(IDX)
    theirs = GPT2LMHeadModel.from_pretrained(merged).eval()
    torch.testing.assert_close(theirs(IDX).logits, logits, atol=1e-4, rtol=0)
    capsys.readouterr()
    texts = []
    for where in (run.out_dir, merged):
        command = [f"--checkpoint={where}", "--device=cpu", "--dtype=float32", "--start=al"]
        assert sample.main(command) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_an_adapter_starts_no_other_adapter_but_a_whole_run(run, tmp_path):
    train.train(run)
    after = replace(run, init_from=run.out_dir, out_dir=str(tmp_path / "after"))
    with pytest.raises(ValueError, match="is an adapter: merge it first"):
        train.train(after)
    train.train(replace(after, lora_rank=0))
    before = records(run.out_dir)[-1]["val_loss"]
    assert records(tmp_path / "after")[0]["val_loss"] == pytest.approx(before, abs=1e-3)


def test_a_folder_named_base_that_is_not_a_copy_is_not_replaced(run, base, tmp_path):
    shutil.copytree(base.parent, tmp_path / "base")
    for start in (base, tmp_path / "base"):
        with pytest.raises(UserError, match="base is in the way of a copy of"):
            train.train(replace(run, init_from=str(start), out_dir=str(tmp_path)))
    assert folders.find(tmp_path / "base").name == base.name
