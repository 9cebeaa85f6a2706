"""The benchmark of sampling: every program writes the tokens that it is timed by."""

import json
import os
import sys
from dataclasses import replace

import pytest
import torch

from configurator import UserError
from model import GPT, GPTConfig
from plaingpt import packing
from plaingpt.checkpoint import store
from tools import bench, bench_peers, bench_sample, processes
from tools.bench_sample import SampleBench, Task

SHAPE = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 32}

LLAMA_BENCH = f"""#!{sys.executable}
import json, sys
words = sys.argv[1:]
given = dict(zip(words[::2], words[1::2]))
assert (given["-p"], given["-n"], given["-d"], given["-ngl"]) == ("0", "6", "4", "0"), words
assert int(given["-t"]) > 0 and json.load(open(given["-m"])) == "f32"
print(json.dumps([{{"avg_ts": 50.0}}]))
"""
CONVERTER = """
import json, sys
def main():
    words = sys.argv[1:]
    kind, out = (words[words.index(name) + 1] for name in ("--outtype", "--outfile"))
    json.dump(kind, open(out, "w"))
"""


@pytest.fixture
def tiny_size(tmp_path, monkeypatch):
    """124m is a tiny model, on a CPU."""
    lines = [f"{name} = {value}" for name, value in SHAPE.items()]
    (tmp_path / "gpt2_124m.py").write_text("\n".join(lines))
    monkeypatch.setattr(bench_sample, "CONFIGS", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def llama_cpp(tmp_path):
    """A stand-in whose llama-bench checks its arguments."""
    folder = tmp_path / "llama.cpp"
    (folder / "build" / "bin").mkdir(parents=True)
    program = folder / bench_sample.BENCH
    program.write_text(LLAMA_BENCH)
    program.chmod(0o755)
    (folder / "conversion").mkdir()
    (folder / "conversion" / "base.py").write_text("class TextModel: pass")
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with a #! line")
def test_writing_is_measured_beside_llama_cpp(tmp_path, tiny_size, llama_cpp, capsys):
    output = tmp_path / "bench.json"
    arguments = ["--prompt_tokens=4", "--new_tokens=6", "--repeats=1", f"--output={output}"]
    arguments += ["--against=llama.cpp", f"--llama_cpp={llama_cpp}", "--precisions=float32"]
    arguments.append(f"--folder={tmp_path / 'new' / 'weights'}")
    assert bench.main(["sample", *arguments]) == 0
    result = json.loads(output.read_text())
    assert result["command"] == "sample" and result["settings"]["size"] == "124m"
    table = result["table"]
    [ours] = table["float32, tokens/s"]
    assert table["llama.cpp f32, tokens/s"] == [50]
    assert table["ratio to llama.cpp f32"] == [ours / 50]
    [moved], [memory] = table["float32, weights read, GB/s"], table["float32, memory alone, GB/s"]
    assert moved == pytest.approx(ours * 4 * (12 * 16**2 + 50257 * 16) / 1e9)
    assert table["float32, share of it, %"] == [pytest.approx(100 * moved / memory)]
    assert "float32 drawn, tokens/s" in capsys.readouterr().out


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Two texts to write, with a model on disk."""
    task = Task("weights", str(tmp_path_factory.mktemp("bench") / "model"), SHAPE, 4, 6, 2, "auto")
    found = bench_peers.write_weights(task)
    assert {"float32", "auto"} <= set(found["precisions"]) and found["threads"] > 0
    return replace(task, device="cpu")


@pytest.fixture
def counted(monkeypatch):
    """How many tokens each timing had."""
    counts = []
    speed = bench_peers.speed

    def noted(task, began, times):
        assert sorted(times) == times and times[0] > began
        counts.append(len(times))
        return speed(task, began, times)

    monkeypatch.setattr(bench_peers, "speed", noted)
    return counts


@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_ours_is_timed_by_all_new_tokens(task, precision, counted, monkeypatch):
    monkeypatch.setattr(bench_peers, "memory_speed", lambda device: 10.0)
    found = bench_peers.ours(replace(task, precision=precision))
    assert counted == [bench_peers.WARMUP_TOKENS, 6, 6]
    assert found[", share of it, %"] == pytest.approx(10 * found[", weights read, GB/s"])


@pytest.mark.parametrize(("precision", "size"), [("float32", 4), ("auto", 2), ("int8", 1)])
def test_weights_count_in_the_bytes_that_they_are_held_in(precision, size):
    rt = bench_peers.runtime.start("cpu", "float32" if precision == "float32" else "bfloat16")
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64)).init_weights(1)
    matrices = sum(weight.numel() for weight in model.weights().values() if weight.dim() == 2)
    matrices -= model.transformer.wpe.weight.numel()
    dtype = "float32" if precision == "float32" else "auto"
    packing.place(model, rt, dtype, "int8" if precision == "int8" else None)
    assert bench_peers.moved_gigabytes(model) == pytest.approx(matrices * size / 1e9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_is_timed_by_all_new_tokens(task, dtype, counted):
    found = bench_peers.of_transformers(replace(task, precision=dtype))
    assert counted == [6] and found[", tokens/s"] > 0 < found[", first token, ms"]


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_ctranslate2_is_timed_by_all_new_tokens(task, kind, counted):
    pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    threads = torch.get_num_threads()
    try:
        found = bench_peers.of_ctranslate2(replace(task, precision=kind))
    finally:
        torch.set_num_threads(threads)  # CTranslate2 sets them for the whole process
    assert counted == [6] and found[", tokens/s"] > 0 < found[", first token, ms"]


def test_the_tokenizer_has_gpt2s_size_and_spells_every_prompt(task):
    model, tokenizer = store.load(task.folder)
    assert tokenizer.vocab_size == model.config.vocab_size == 50257
    for ids in bench_peers.prompts(task):
        assert len(ids) == 4 and tokenizer.decode(ids).isalpha()


def test_peers_take_turns_with_ours():
    cfg = SampleBench(against=("transformers", "ctranslate2"), repeats=2)
    once = [("float32", "transformers"), ("float32", "ctranslate2"), ("int8", "ctranslate2")]
    assert list(bench_sample.turns(cfg, ["float32", "int8"])) == once * 2
    assert list(bench_sample.turns(SampleBench(repeats=1), ["auto"])) == [("auto", None)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"against": ("transformers",)}, "against=transformers needs: pip install transformers"),
        ({"against": ("ctranslate2",)}, "needs: pip install ctranslate2 transformers"),
        ({"against": ("llama.cpp",)}, "needs --llama_cpp=FOLDER, a copy of it where you ran cmake"),
        ({"against": ("llama.cpp",), "batch_size": 2}, "batch_size must be 1, not 2"),
        ({"prompt_tokens": 1000}, "new_tokens=200 exceed the context of 1,024 tokens"),
        ({"new_tokens": 1}, "new_tokens must be at least 2, not 1"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_runs(settings, message, monkeypatch):
    monkeypatch.setattr(bench_sample.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_sample, "run_writer", None)
    with pytest.raises(UserError) as error:
        bench_sample.measure(SampleBench(**settings))
    assert message in str(error.value)


def test_a_failing_writer_is_one_line(task):
    wrong = replace(task, act="sample.py", folder="nowhere")
    with pytest.raises(UserError, match=r"^sample\.py failed: nowhere does not exist"):
        bench_sample.run_writer(wrong)


def test_other_programs_wait_for_their_threads_in_their_own_way(monkeypatch, tmp_path):
    command = [sys.executable, "-c", "import os; print(os.environ.get('GOMP_SPINCOUNT'))"]
    for given, expected in (("2000", "None"), ("77", "77")):
        monkeypatch.setitem(os.environ, "GOMP_SPINCOUNT", given)
        assert processes.output_of("it", command, tmp_path).strip() == expected
