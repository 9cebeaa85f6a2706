"""Weights that are packed for writing."""

import pytest
import torch
from test_model import tiny, tokens

from configurator import UserError
from model import Block, KVCache
from plaingpt import packing, runtime

FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
needs_fbgemm = pytest.mark.skipif(not FBGEMM, reason="needs PyTorch's kernels for x86")


def placed(model, dtype="auto", quantize=None):
    return packing.place(model, runtime.start("cpu", "float32"), dtype, quantize)


@pytest.mark.parametrize(
    "dtype, quantize, error",
    [("float32", None, 1e-5), ("auto", None, 0.005), ("auto", "int8", 0.2)],
)
@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"tie_weights": False}])
def test_packed_weights_give_the_logits_of_the_model(changes, dtype, quantize, error):
    if quantize and not FBGEMM:
        pytest.skip("needs PyTorch's kernels for x86")
    idx, expected = tokens(2, 16), tiny(**changes)(tokens(2, 16))
    model = placed(tiny(**changes), dtype, quantize)
    spread = expected.std()
    with torch.inference_mode():
        whole = model(idx)
        cache = KVCache(model, batch_size=2)
        parts = [model(idx[:, :9], cache=cache), model(idx[:, 9:10], cache=cache)]
        alone = KVCache(model, batch_size=1)
        rows = [model(idx[:1, t : t + 1], cache=alone) for t in range(10)]
    assert (whole - expected).abs().max() < error * spread
    torch.testing.assert_close(torch.cat(parts, dim=1), whole[:, :10], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(rows, dim=1), whole[:1, :10], atol=1e-4, rtol=1e-4)
    assert whole.dtype == torch.float32


@needs_fbgemm
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_row_has_the_same_bits_whatever_the_others_are(quantize):
    model, idx = placed(tiny(), "auto", quantize), tokens(12, 16)
    with torch.inference_mode():
        whole = model(idx)
        for count in (1, 2, 7):
            assert torch.equal(model(idx[:count]), whole[:count])


def test_float32_weights_are_shared_between_the_threads(monkeypatch):
    for threads in (1, 2, 3, 100):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        plain = tiny().transformer.h[0].mlp.c_proj
        layer = packing.SharedLinear(plain)
        for shape in ((1, 1), (2, 1), (1, 3)):
            x = torch.randn(*shape, plain.in_features)
            torch.testing.assert_close(layer(x), plain(x))


@needs_fbgemm
def test_weights_that_16_bits_do_not_hold_are_refused():
    model = tiny()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = 1e5
    with pytest.raises(UserError, match="above 65,504 do not fit 16 bits: use --dtype=float32"):
        placed(model)


def test_without_the_kernels_int8_is_refused_and_the_blocks_stay(monkeypatch):
    monkeypatch.setattr(packing, "can_pack", lambda device: False)
    with pytest.raises(UserError, match="quantize=int8: PyTorch has no kernels for it on cpu"):
        placed(tiny(), quantize="int8")
    assert all(type(block) is Block for block in placed(tiny()).transformer.h)


@needs_fbgemm
@pytest.mark.parametrize("levels", [63, 127])
def test_int8_products_of_the_largest_numbers_are_right(monkeypatch, levels):
    """Sums of 16 bits would overflow: 127 levels are only for CPUs with VNNI."""
    if levels > packing.input_levels():
        pytest.skip("needs VNNI")
    monkeypatch.setattr(packing, "input_levels", lambda: levels)
    plain = tiny().transformer.h[0].mlp.c_fc
    with torch.no_grad():
        plain.weight.fill_(0.3)
        plain.weight[::2] *= -1
    torch.backends.quantized.engine = "fbgemm"
    layer = packing.Int8Linear(plain)
    x = torch.full((3, plain.in_features), 2.0)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-3, atol=1e-3)
