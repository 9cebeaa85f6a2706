"""The layers that exist for the speed of CPUs compute what the plain ones do."""

import copy
import math

import pytest
import torch
from test_model import tiny, tokens
from torch.nn import functional as F

from model import Attention, CrossEntropy
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


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("mask", [None, (torch.arange(70) % 3 > 0).float(), torch.zeros(70)])
def test_the_compiled_loss_is_the_loss(dtype, rounding, mask):
    logits = (4 * torch.randn(70, 1500)).to(dtype)
    logits[3, :], logits[4, 9], logits[5, 7] = -1e4, -math.inf, 300.0
    targets = torch.randint(1500, (70,))
    plain, fast = (logits.clone().to(d).requires_grad_() for d in (torch.float32, dtype))
    expected = CrossEntropy()(plain, targets, mask)
    (0.3 * expected).backward()
    loss = cpu.CompiledCrossEntropy()(fast + 0, targets, mask)
    (0.3 * loss).backward()
    assert loss.dtype == torch.float32 and fast.grad.dtype == dtype
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(fast.grad.float(), plain.grad, rtol=rounding, atol=1e-9)
    with torch.no_grad():
        assert torch.equal(cpu.CompiledCrossEntropy()(logits, targets, mask), loss)


def test_the_compiled_loss_leaves_float16_to_pytorch_and_refuses_other_ids():
    logits, targets = torch.randn(3, 1100), torch.tensor([0, 5, 1099])
    loss = cpu.CompiledCrossEntropy()
    half = logits.half()
    assert torch.equal(loss(half, targets, None), CrossEntropy()(half, targets, None))
    for wrong in (1100, -1, -100):
        with pytest.raises(IndexError, match=r"outside range\(1100\)"):
            loss(logits, torch.tensor([0, wrong, 1]), None)


def test_the_compiled_loss_has_the_same_bits_with_any_number_of_threads():
    logits, targets = torch.randn(200, 1100).bfloat16(), torch.randint(1100, (200,))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ours = logits.clone().requires_grad_()
            loss = cpu.CompiledCrossEntropy()(ours + 0, targets, None)
            loss.backward()
            assert torch.get_num_threads() == threads
            found.append((loss.item(), ours.grad))
    finally:
        torch.set_num_threads(before)
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", [float("nan"), -float("nan"), float("inf")])
def test_the_compiled_loss_shows_what_is_not_finite(dtype, broken):
    logits = torch.zeros(2, 1100, dtype=dtype)
    logits[1, 1000] = broken
    ours = logits.requires_grad_()
    loss = cpu.CompiledCrossEntropy()(ours + 0, torch.tensor([1, 2]), None)
    loss.backward()
    assert loss.isnan() and ours.grad[1].isnan().all() and ours.grad[0].isfinite().all()


def test_a_small_vocabulary_keeps_the_plain_loss():
    for size, kind in ((1023, CrossEntropy), (1024, cpu.CompiledCrossEntropy)):
        model = tiny(vocab_size=size)
        cpu.speed_up(model)
        assert type(model.loss) is kind


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
