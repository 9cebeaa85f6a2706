"""The benchmarks run, and measure what they claim to."""

import json

import pytest

from tools import bench, bench_train


@pytest.mark.parametrize("documents", ["txt", "tiny"])
def test_prepare_is_measured_beside_tiktoken(tmp_path, capsys, documents):
    output = tmp_path / "out" / "bench.json"
    arguments = ["--corpus_mb=0.2", "--repeats=1", "--tokenizer=bytes", f"--output={output}"]
    arguments += [f"--documents={documents}", f"--folder={tmp_path}"]
    assert bench.main(["prepare", *arguments]) == 0
    result = json.loads(output.read_text())
    table = result["table"]
    assert len(table["ratio"]) == len(table["prepare.py, MB/s"]) == 1
    assert 0.02 < table["peak memory of prepare.py, GiB"][0] < 0.2  # torch would take more
    assert "ratio" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


NANOGPT = """
import sys
given = dict(word[2:].split("=") for word in sys.argv[1:])
assert given["n_embd"] == "16" and given["batch_size"] == "2"
assert given["gradient_accumulation_steps"] == "2" and given["compile"] == "False"
assert given["max_iters"] == "5"
for step, ms in enumerate((90, 80, 70, 50, 40, 60)):
    print(f"iter {step}: loss 5.0, time {ms}.00ms, mfu 1%")
"""


def test_training_is_measured_beside_its_parts_and_nanogpt(tmp_path, capsys):
    output, nanogpt = tmp_path / "bench.json", tmp_path / "nanogpt"
    nanogpt.mkdir()
    (nanogpt / "train.py").write_text(NANOGPT)
    shape = "--n_layer=1 --n_head=1 --n_embd=16 --block_size=32 --batch_size=4"
    arguments = [f"--settings={shape} --micro_batch_size=2 --device=cpu", "--steps=5"]
    arguments += ["--repeats=1", f"--nanogpt={nanogpt}", f"--output={output}"]
    assert bench.main(["train", *arguments]) == 0
    table = json.loads(output.read_text())["table"]
    (mine,), (other,) = table["train.py, tokens/s"], table["nanoGPT, tokens/s"]
    assert other == pytest.approx(4 * 32 / 0.05) and table["ratio to nanoGPT"] == [mine / other]
    assert 0 < table["ratio to products and attention"][0] < 1
    assert 0 < table["ratio to a matrix product"][0] < 1
    assert 0 < table["of these, attention, %"][0] < 100
    for part in ("a micro-step", "an update by AdamW", "an update by Muon"):
        assert table[f"{part}, ms"][0] > 0
    assert "products and attention, tokens/s" in capsys.readouterr().out
    assert bench.main(["train", "--settings=--n_layer=no", "--repeats=1"]) == 2
    assert "error: train.py failed: error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "--repeats=0", "--corpus_mb=0"], "repeats must be at least 1, not 0"),
        (["prepare", "--repeats=0", "--corpus_mb=0"], "corpus_mb must be a number above 0"),
        (["train", "--steps=3"], "steps must be at least 4, not 3"),
        (["train", "--settings='"], "No closing quotation"),
        (["train", "--settings=--plan --device=cpu"], "train.py reported 0 steps"),
    ],
)
def test_bad_settings_are_one_line(capsys, arguments, message):
    assert bench.main(arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_benchmark_must_be_named(capsys):
    assert bench.main([]) == bench.main(["nothing"]) == 2
    assert "python -m tools.bench prepare" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "products"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize96x64x32", "products"),
        ("triton_per_fused_native_layer_norm_3", "generated kernels"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_clone_2", "generated kernels"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::multi_tensor_apply_kernel", "others"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel, kind):
    assert bench_train.kind_of(kernel) == kind
