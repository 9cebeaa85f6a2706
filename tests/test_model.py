"""The network against `transformers`, and the cache against no cache."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPT, GPTConfig, KVCache
from plaingpt.checkpoint import hugging_face

TINY = GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=4, n_embd=32)


def tiny(**changes) -> GPT:
    model = GPT(replace(TINY, **changes)).init_weights(seed=1).eval()
    with torch.no_grad():  # weights that differ enough for a mistake to show
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) / 5
            )
    return model


def tokens(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


def huggingface(model: GPT) -> GPT2LMHeadModel:
    config = GPT2Config(**hugging_face.to_config_json(model.config))
    theirs = GPT2LMHeadModel(config).eval()
    left = theirs.load_state_dict(
        hugging_face.to_file_layout(model.weights(), model.config), strict=False
    )
    assert not left.unexpected_keys
    assert set(left.missing_keys) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_logits_and_loss_are_those_of_transformers(bias, tie_weights):
    model, idx = tiny(bias=bias, tie_weights=tie_weights), tokens(3, 16)
    theirs = huggingface(model)(idx, labels=idx)
    torch.testing.assert_close(model(idx), theirs.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(idx[:, :-1], idx[:, 1:]), theirs.loss, atol=1e-5, rtol=0)


def test_gradients_are_those_of_transformers():
    model, idx = tiny().train(), tokens(3, 16)
    theirs = huggingface(model)
    model(idx[:, :-1], idx[:, 1:]).backward()
    theirs(idx, labels=idx).loss.backward()
    for name, parameter in theirs.named_parameters():
        ours = dict(model.named_parameters())[name].grad
        if name.endswith(hugging_face.TRANSPOSED):
            ours = ours.t()
        torch.testing.assert_close(ours, parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prefill", [1, 7, 16])
def test_cached_logits_are_the_uncached_ones(prefill):
    model, idx = tiny(), tokens(2, 16)
    cache = KVCache(model, batch_size=2)
    parts = [model(idx[:, :prefill], cache=cache)]
    parts += [model(idx[:, t : t + 1], cache=cache) for t in range(prefill, 16)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(idx), atol=1e-5, rtol=1e-4)


def test_cache_takes_several_tokens_after_a_prefix():
    model, idx = tiny(), tokens(2, 16)
    cache = KVCache(model, batch_size=2)
    parts = [model(idx[:, a:b], cache=cache) for a, b in ((0, 5), (5, 9), (9, 16))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(idx), atol=1e-5, rtol=1e-4)


def test_sequences_of_different_lengths_share_a_cache():
    model, idx = tiny(), tokens(3, 16)
    cache = KVCache(model, batch_size=3)
    lengths = (2, 9, 5)
    for row, length in enumerate(lengths):  # each prompt is read alone
        alone = KVCache(model, batch_size=1)
        model(idx[row : row + 1, :length], cache=alone)
        cache.entries[:, row] = alone.entries[:, 0]
        cache.lengths[row] = length
    cache.end = max(lengths)
    for step in range(4):
        new = torch.stack([idx[row, length + step] for row, length in enumerate(lengths)])
        logits = model(new[:, None], cache=cache)[:, 0]
        for row, length in enumerate(lengths):
            expected = model(idx[row : row + 1, : length + step + 1])[0, -1]
            torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-4)


def test_cached_logits_are_those_of_transformers():
    model, idx = tiny(), tokens(2, 16)
    cache = KVCache(model, batch_size=2)
    parts = [model(idx[:, a:b], cache=cache) for a, b in itertools.pairwise((0, 5, *range(6, 17)))]
    theirs = huggingface(model)(idx).logits
    torch.testing.assert_close(torch.cat(parts, dim=1), theirs, atol=1e-4, rtol=0)


def test_a_full_context_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="17 tokens do not fit block_size=16"):
        model(tokens(1, 17))
    cache = KVCache(model, batch_size=1)
    model(tokens(1, 16), cache=cache)
    with pytest.raises(ValueError, match="17 tokens do not fit a cache of 16"):
        model(tokens(1, 1), cache=cache)


def test_the_mask_chooses_the_targets_that_count():
    model, x, y = tiny(), tokens(2, 16), tokens(2, 16, seed=4)
    mask = (torch.arange(32).view(2, 16) % 3 == 0).float()
    losses = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
    torch.testing.assert_close(model(x, y, mask), losses[mask.flatten() == 1].mean())
    assert model(x, y, torch.zeros(2, 16)).item() == 0.0


def test_dropout_acts_in_training_only():
    model, idx = tiny(dropout=0.5), tokens(1, 16)
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))


def test_fresh_weights_have_gpt2s_scale_and_depend_on_the_seed_alone():
    config = GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=4, n_embd=64)
    model = GPT(config).init_weights(seed=1)
    std = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
    for name, value in std.items():
        wanted = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
        assert value == pytest.approx(wanted, rel=0.1), name
    assert model.transformer.h[0].attn.c_attn.bias.eq(0).all()
    assert model.transformer.ln_f.weight.eq(1).all()
    again, other = GPT(config).init_weights(seed=1), GPT(config).init_weights(seed=2)
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_openai_sizes_have_their_parameter_counts():
    sizes = {(12, 12, 768): 124_439_808, (24, 16, 1024): 354_823_168}
    sizes |= {(36, 20, 1280): 774_030_080, (48, 25, 1600): 1_557_611_200}
    for (n_layer, n_head, n_embd), count in sizes.items():
        with torch.device("meta"):
            model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
        assert model.num_params() == count


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_head": 5}, "n_embd=32 is not divisible by n_head=5; .* n_head=4"),
        ({"n_layer": 0}, "n_layer must be a positive integer, not 0"),
        ({"dropout": 1.0}, "dropout must be in"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_what_the_cpu_does():
    model, idx = tiny(), tokens(3, 16)
    expected = model(idx)
    torch.testing.assert_close(model.cuda()(idx.cuda()).cpu(), expected, atol=1e-4, rtol=1e-4)


def test_a_residual_stream_in_bf16_changes_little_and_only_training():
    x, y, dtypes, found = tokens(2, 16), tokens(2, 16, seed=4), [], []
    for dtype in (None, torch.bfloat16):
        model = tiny().train()
        model.transformer.stream_dtype = dtype
        model.transformer.h[1].register_forward_hook(lambda *each: dtypes.append(each[2].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, y)
            loss.backward()
            model.eval()(x, y)
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    (loss, gradient), (other_loss, other_gradient) = found
    assert abs(loss - other_loss) < 0.005
    assert 0 < (gradient - other_gradient).norm() < 0.02 * gradient.norm()
