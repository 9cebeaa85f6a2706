"""Models that are placed for writing, and what they compute on a CPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import tiny, tokens
from torch.nn import functional as F

from configurator import UserError
from model import Block, KVCache, Linear
from plaingpt import compiled, kernels, packing, runtime

REPO = Path(__file__).parents[1]
HELD = [("float32", None), ("auto", None), ("auto", "int8")]


def placed(model, dtype="auto", quantize=None):
    return packing.place(model, runtime.start("cpu", "float32"), dtype, quantize)


@pytest.mark.parametrize(
    "dtype, quantize, error",
    [("float32", None, 1e-5), ("auto", None, 0.005), ("auto", "int8", 0.15)],
)
@pytest.mark.parametrize(
    "changes", [{}, {"bias": False}, {"tie_weights": False}, {"n_embd": 36, "n_head": 3}]
)
def test_compiled_models_give_the_logits_of_the_model(changes, dtype, quantize, error):
    expected = tiny(**changes)(tokens(2, 16))
    with torch.inference_mode():
        found = placed(tiny(**changes), dtype, quantize)(tokens(2, 16))
    assert (found - expected).abs().max() < error * expected.std()
    assert found.dtype == torch.float32


@pytest.mark.parametrize("dtype, quantize", HELD)
@pytest.mark.parametrize("changes", [{}, {"n_embd": 36, "n_head": 3}])
def test_a_token_has_the_same_bits_however_it_is_computed(changes, dtype, quantize):
    model, idx = placed(tiny(**changes), dtype, quantize), tokens(12, 16)
    with torch.inference_mode():
        whole = model(idx)
        for count in (1, 2, 4, 5, 7, 9):
            assert torch.equal(model(idx[:count]), whole[:count])
        cache = KVCache(model, batch_size=3)
        parts = [model(idx[:3, a:b], cache=cache) for a, b in ((0, 9), (9, 10), (10, 16))]
        assert torch.equal(torch.cat(parts, dim=1), whole[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("inputs, outputs", [(1, 1), (7, 16), (40, 33), (64, 257)])
def test_products_are_those_of_the_weights_that_are_held(dtype, inputs, outputs):
    torch.manual_seed(1)
    layer = Linear(inputs, outputs)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    found, x = compiled.CompiledLinear(layer, dtype), torch.randn(11, inputs)
    held = layer.weight.to(torch.float16).float()
    if dtype == torch.float32:
        held = layer.weight
    elif dtype == torch.int8:
        scales = layer.weight.abs().amax(1, keepdim=True) / 127
        held = (layer.weight / scales).round() * scales
    for rows in (1, 2, 4, 5, 11):
        expected = F.linear(x[:rows], held, layer.bias)
        torch.testing.assert_close(found(x[:rows]), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found(x.repeat(1, 2)[:, :inputs]), found(x))  # of other strides


OLDER = """
import sys
import pytest
from llvmlite import binding
features = binding.get_host_cpu_features()
features.update({name: False for name in features if name.startswith("avx512")})
binding.get_host_cpu_features = lambda: features
sys.exit(pytest.main(["tests/test_packing.py", "-k", "products or bits"]))
"""


@pytest.mark.skipif(not kernels.HAS_AVX512, reason="the other tests show it")
def test_a_cpu_without_avx512_computes_the_same(tmp_path):
    """Numba compiles for the features that LLVM reports."""
    run = subprocess.run(
        [sys.executable, "-c", OLDER],
        cwd=REPO,
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert list(tmp_path.iterdir())  # compiled code of its own


def test_the_exponential_is_that_of_numpy():
    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    found = np.array([kernels.exp(each) for each in x])
    np.testing.assert_allclose(found, np.exp(x.astype(np.float64)), rtol=1e-5)
    assert kernels.exp(np.float32(0)) == 1
    assert np.isnan(kernels.exp(np.float32("nan")))
    assert kernels.exp(np.float32("-inf")) < 1e-37


def test_weights_that_16_bits_do_not_hold_are_refused():
    model = tiny()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = 1e5
    with pytest.raises(UserError, match="above 65,504 do not fit in 16 bits: use --dtype=float32"):
        placed(model)
    placed(model, quantize="int8")  # whose scales fit any weight


def test_on_other_devices_int8_is_refused_and_the_blocks_stay():
    rt = runtime.Runtime(torch.device("meta"), torch.bfloat16)
    with pytest.raises(UserError, match="quantize=int8 is for CPUs, and the device is meta"):
        packing.place(tiny(), rt, quantize="int8")
    assert all(type(block) is Block for block in packing.place(tiny(), rt).transformer.h)


def test_compiled_code_is_not_kept_where_there_is_no_room(monkeypatch):
    def successor(x):
        return x + 1

    assert kernels.jit({})(successor).stats.cache_path
    usage = shutil.disk_usage(REPO)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    found = kernels.jit({})(successor)
    assert found.stats.cache_path is None and found(1) == 2


def test_as_many_threads_as_pytorch_has(monkeypatch):
    import numba

    for threads, expected in ((1, 1), (1000, numba.config.NUMBA_NUM_THREADS)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        kernels.use_threads()
        assert numba.get_num_threads() == expected
