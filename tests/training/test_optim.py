"""The schedule as a function; Muon against torch.optim.Muon; groups; state by name."""

import copy

import pytest
import torch
from torch import nn

from model import GPT, GPTConfig
from plaingpt.training import optim

YES, NO = torch.tensor(True), torch.tensor(False)
SHAPE = GPTConfig(vocab_size=61, block_size=8, n_layer=2, n_head=2, n_embd=16)


# --- Muon


SHAPES = [(16, 16), (16, 16), (16, 64), (64, 16), (16, 48), (16, 64)]


def matrices():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_is_torchs(weight_decay):
    ours, theirs, start = matrices(), matrices(), matrices()
    one = optim.Muon(ours, lr=0.02, weight_decay=weight_decay)
    other = torch.optim.Muon(
        theirs,
        lr=0.02,
        weight_decay=weight_decay,
        momentum=0.95,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        one.step(YES)
        other.step()
    for mine, torchs, before in zip(ours, theirs, start):
        moved = (torchs - before).norm()
        assert (mine - torchs).norm() < 0.05 * moved  # bf16, multiplied in another order
        assert torch.equal(
            one.state[mine]["momentum_buffer"], other.state[torchs]["momentum_buffer"]
        )


def test_adamw_is_torchs():
    ours, theirs = matrices(), matrices()
    settings = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1}
    one, other = optim.AdamW(ours, **settings), torch.optim.AdamW(theirs, fused=True, **settings)
    for step in range(5):
        for parameters in (ours, theirs):
            give_gradients(parameters, step)
            parameters[0].grad = None if step == 2 else parameters[0].grad
        one.step(YES)
        other.step()
    assert all(torch.equal(mine, torchs) for mine, torchs in zip(ours, theirs))
    assert all(
        torch.equal(one.state[mine][key], value)
        for mine, torchs in zip(ours, theirs)
        for key, value in other.state[torchs].items()
    )


def test_parts_are_matrices_of_their_own():
    whole = nn.Parameter(torch.randn(48, 16, generator=torch.Generator().manual_seed(0)))
    parts = [nn.Parameter(part.clone()) for part in whole.detach().split(16)]
    one = optim.Muon([{"params": [whole], "parts": 3}], lr=0.02, weight_decay=0.1)
    three = optim.Muon(parts, lr=0.02, weight_decay=0.1)
    for step in range(3):
        give_gradients([whole], step)
        for part, gradient in zip(parts, whole.grad.split(16)):
            part.grad = gradient * 1000  # the size of a gradient does not matter
        one.step(YES)
        three.step(YES)
    torch.testing.assert_close(whole, torch.cat(parts), atol=2e-3, rtol=0)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (2, 64, 16)])
def test_an_orthogonalized_matrix_has_singular_values_near_one(shape):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(noise, full_matrices=False)
    skewed = u * torch.logspace(0, -1.5, 16) @ v  # from 1 to 0.03
    values = torch.linalg.svdvals(optim.orthogonalize(skewed).float())
    assert values.min() > 0.6 and values.max() < 1.3
    assert (values.mean() - 1).abs() < 0.2


def test_a_zero_gradient_moves_nothing():
    (parameter,) = [nn.Parameter(torch.ones(4, 8))]
    parameter.grad = torch.zeros(4, 8)
    optim.Muon([parameter], lr=0.1).step(YES)
    assert torch.equal(parameter, torch.ones(4, 8))


@pytest.mark.parametrize("kind", [optim.AdamW, optim.Muon])
@pytest.mark.parametrize("when", [0, 2])
def test_an_unusable_gradient_changes_nothing(kind, when):
    ours, theirs = matrices(), matrices()
    one, other = (kind(each, lr=0.1, weight_decay=0.1) for each in (ours, theirs))
    for step in range(4):
        if step == when:
            for parameter in ours:
                parameter.grad = torch.full_like(parameter, torch.nan)
            one.step(NO)
        for each, parameters in ((one, ours), (other, theirs)):
            give_gradients(parameters, step)
            each.step(YES)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs))
    for mine, wanted in zip(one.state.values(), other.state.values()):
        assert all(torch.equal(mine[key], value) for key, value in wanted.items())


def test_a_parameter_without_gradient_is_left_alone():
    ours = matrices()
    give_gradients(ours, 0)
    ours[0].grad = None
    before = [parameter.detach().clone() for parameter in ours]
    muon = optim.Muon(ours, lr=0.1, weight_decay=0.1)
    muon.step(YES)
    equal = [torch.equal(now, then) for now, then in zip(ours, before)]
    assert equal == [True] + [False] * 5
    assert ours[0] not in muon.state


# --- groups


def build(model, optimizer, lr=0.01, **settings):
    defaults = {"weight_decay": 0.1, "betas": (0.9, 0.95), "momentum": 0.95}
    defaults["embedding_lr_scale"] = 1.0
    config = optim.OptimizerConfig(optimizer, **{**defaults, **settings})
    optimizers = optim.build_optimizers(model, config)
    optim.set_learning_rate(optimizers, lr)
    return optimizers


def muon_of(optimizers) -> optim.Muon:
    (muon,) = [each for each in optimizers if isinstance(each, optim.Muon)]
    return muon


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_parameter_is_in_one_group_and_vectors_do_not_decay(optimizer, tie_weights, bias):
    config = GPTConfig(**{**vars(SHAPE), "tie_weights": tie_weights, "bias": bias})
    model = GPT(config)
    groups = [group for each in build(model, optimizer) for group in each.param_groups]
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = GPT(SHAPE)
    optimizers = build(model, "muon", momentum=0.9)
    names = {parameter: name for name, parameter in model.named_parameters()}
    parts = {
        names[p]: group["parts"]
        for group in muon_of(optimizers).param_groups
        for p in group["params"]
    }
    wanted = {"attn.c_attn": 3, "attn.c_proj": 1, "mlp.c_fc": 1, "mlp.c_proj": 1}
    assert parts == {
        f"transformer.h.{i}.{name}.weight": count
        for i in range(2)
        for name, count in wanted.items()
    }
    assert model.transformer.h[0].attn.c_attn.weight.shape == (48, 16)  # q, k and v along the rows
    assert [group["momentum"] for group in muon_of(optimizers).param_groups] == [0.9, 0.9]
    assert {type(each) for each in optimizers} == {optim.Muon, optim.AdamW}
    assert [type(each) for each in build(model, "adamw")] == [optim.AdamW]


def test_adamw_gets_its_settings():
    (adamw,) = build(GPT(SHAPE), "adamw", lr=0.3, betas=(0.8, 0.9))
    for group in adamw.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.3, (0.8, 0.9), 1e-8)


def test_beside_muon_the_rest_has_a_learning_rate_of_its_own():
    for optimizer, scale in (("muon", 0.5), ("adamw", 1.0)):
        optimizers = build(GPT(SHAPE), optimizer, lr=0.3, embedding_lr_scale=0.5)
        for each in optimizers:
            wanted = 0.3 if isinstance(each, optim.Muon) else 0.3 * scale
            assert [group["lr"] for group in each.param_groups] == [wanted] * 2


# --- state by name


def train_steps(model, optimizers, steps):
    for step in steps:
        tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(step))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        for each in optimizers:
            each.step(YES)
            each.zero_grad()


def trained(optimizer, shape=SHAPE):
    model = GPT(shape).init_weights(0)
    optimizers = build(model, optimizer)
    train_steps(model, optimizers, range(3))
    return model, optimizers


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_loaded_state_goes_on_exactly(optimizer):
    model, optimizers = trained(optimizer)
    saved = copy.deepcopy(optim.optimizer_state(model, optimizers))
    assert set(saved) == {name for name, _ in model.named_parameters()}
    again = GPT(SHAPE)
    again.load_state_dict(model.state_dict())
    loaded = build(again, optimizer)
    optim.load_optimizer_state(again, loaded, saved)
    for each, steps in ((model, optimizers), (again, loaded)):
        train_steps(each, steps, range(3, 6))
    for (name, one), other in zip(model.named_parameters(), again.parameters()):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_loaded_state_is_a_copy(optimizer):
    model, optimizers = trained(optimizer)
    saved = optim.optimizer_state(model, optimizers)
    before = copy.deepcopy(saved)
    again = GPT(SHAPE).init_weights(0)
    loaded = build(again, optimizer)
    optim.load_optimizer_state(again, loaded, saved)
    train_steps(again, loaded, range(3, 5))
    for name, state in before.items():
        for key, value in state.items():
            assert torch.equal(saved[name][key], value), (name, key)


@pytest.mark.parametrize("saved, wanted", [("adamw", "muon"), ("muon", "adamw")])
def test_the_state_of_another_optimizer_is_refused(saved, wanted):
    state = optim.optimizer_state(*trained(saved))
    model = GPT(SHAPE)
    with pytest.raises(ValueError, match=r"transformer\.h\.0.*keep the optimizer setting"):
        optim.load_optimizer_state(model, build(model, wanted), state)


@pytest.mark.parametrize("change", [{"n_embd": 32}, {"vocab_size": 62}, {"n_layer": 3}])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_state_of_another_shape_is_refused(optimizer, change):
    state = optim.optimizer_state(*trained(optimizer))
    model = GPT(GPTConfig(**{**vars(SHAPE), **change}))
    with pytest.raises(ValueError, match="saved .* of "):
        optim.load_optimizer_state(model, build(model, optimizer), state)


def test_the_state_of_parameters_that_are_not_here_is_refused():
    state = optim.optimizer_state(*trained("adamw", GPTConfig(**{**vars(SHAPE), "n_layer": 3})))
    model = GPT(SHAPE)
    with pytest.raises(ValueError, match=r"transformer\.h\.2"):
        optim.load_optimizer_state(model, build(model, "adamw"), state)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("exp_avg", lambda each: each / 0, "holds NaN, infinite or negative values"),
        ("exp_avg_sq", lambda each: -1 - each, "holds NaN, infinite or negative values"),
        ("exp_avg", lambda each: each.double(), "is not a float32 tensor"),
        ("exp_avg", lambda each: each.to("meta"), "is not a float32 tensor"),
        ("exp_avg", lambda each: each.to_sparse(), "is not a float32 tensor"),
        ("step", lambda each: each[None], r"has shape \(1,\), not \(\)"),
        ("step", lambda each: torch.zeros(()).expand(10**12), "has shape"),
    ],
)
def test_a_damaged_moment_is_named(key, change, message):
    state = optim.optimizer_state(*trained("adamw"))
    name = "transformer.h.1.mlp.c_fc.weight"
    state[name][key] = change(state[name][key])
    model = GPT(SHAPE)
    with pytest.raises(ValueError, match=f"the saved {key} of {name} {message}"):
        optim.load_optimizer_state(model, build(model, "adamw"), state)


# --- the default learning rate


@pytest.mark.parametrize(
    "name, n_embd, gentle, rate, source",
    [
        ("muon", 128, False, 0.01, "measured"),
        ("muon", 768, False, 0.0041, "derived from the width"),
        ("muon", 128, True, 0.001, "a tenth of a new model's, measured"),
        ("adamw", 64, False, 0.002, "measured"),
        ("adamw", 768, False, 0.00052, "derived from the width"),
        ("adamw", 1600, True, 0.000025, "a tenth of a new model's, derived from the width"),
    ],
)
def test_the_default_learning_rate_follows_from_the_width(name, n_embd, gentle, rate, source):
    assert optim.default_learning_rate(name, n_embd, gentle) == (rate, source)
