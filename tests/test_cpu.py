"""The layers that exist for the speed of CPUs compute what the plain ones do."""

import copy

import pytest
import torch
from test_model import tiny, tokens
from torch.nn import functional as F

from model import Attention
from plaingpt import cpu


@pytest.mark.parametrize("length", [16, 256, 300, 700, 1100])  # below, at and above BLOCK, LONGEST
def test_attention_in_blocks_is_flash_attention(length):
    q, k, v = (torch.randn(2, 2, length, 8, requires_grad=True) for _ in range(3))
    ours = cpu.BlockedAttention()(q, k, v, None, dropout=0.0)
    flash = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, flash)
    for mine, reference in zip(
        torch.autograd.grad(ours.square().sum(), (q, k, v)),
        torch.autograd.grad(flash.square().sum(), (q, k, v)),
    ):
        torch.testing.assert_close(mine, reference)


def test_attention_drops_as_many_weights_as_it_is_told():
    torch.manual_seed(0)
    q, k, v = torch.zeros(1, 1, 400, 4), torch.zeros(1, 1, 400, 4), torch.ones(1, 1, 400, 4)
    mixed = cpu.BlockedAttention()(q, k, v, None, dropout=0.25)
    assert mixed[0, 0, 100:].mean().item() == pytest.approx(1, abs=0.02)
    assert 0.02 < mixed[0, 0, 100:].std().item() < 0.1


def test_the_gelu_of_bf16_is_gelu():
    x = torch.linspace(-9, 9, 2001).bfloat16()
    ours, reference = x.clone().requires_grad_(), x.float().requires_grad_()
    y, expected = cpu.GELU(approximate="tanh")(ours), F.gelu(reference, approximate="tanh")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=0.01, rtol=0.01)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad.float(), reference.grad, atol=0.02, rtol=0.02)
    assert torch.equal(
        cpu.GELU(approximate="tanh")(x.float()), F.gelu(x.float(), approximate="tanh")
    )


def test_a_sped_up_model_has_the_same_weights_and_logits():
    plain, idx = tiny(), tokens(2, 16)
    fast = copy.deepcopy(plain)
    cpu.speed_up(fast)
    kinds = [type(layer) for layer in fast.modules()]
    assert kinds.count(cpu.BlockedAttention) == kinds.count(cpu.GELU) == 2
    assert Attention not in kinds and torch.nn.GELU not in kinds
    assert fast.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(fast(idx), plain(idx))


@pytest.mark.parametrize("probe", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_either_instruction_set_makes_a_cpu_multiply_in_bf16(monkeypatch, probe):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == probe, raising=False)
    assert cpu.has_bf16()
    monkeypatch.delattr(torch.cpu, probe)
    assert not cpu.has_bf16()
