"""
What a process of `python -m tools.bench sample` does: write a model to disk, or write texts with it
and time their tokens, by our own code or a peer's.
"""

import json
import math
import sys
import time
from itertools import product
from pathlib import Path
from string import ascii_letters
from typing import Any

import torch

from configurator import DType, UserError
from model import GPT, GPTConfig
from plaingpt import drawing, generation, packing, runtime
from plaingpt.checkpoint import store
from plaingpt.compiled import CompiledLinear
from plaingpt.sampling import Sampling
from plaingpt.text.bpe import single_bytes
from plaingpt.text.tokenizer import Tokenizer
from tools.bench_sample import Task

WARMUP_TOKENS = 8  # written before the clock starts


def main(argument: str) -> None:
    """Print what the task that `argument` describes finds, as JSON."""
    task = Task(**json.loads(argument))
    acts = {
        "weights": write_weights,
        "sample.py": ours,
        "transformers": of_transformers,
        "ctranslate2": of_ctranslate2,
    }
    try:
        print(json.dumps(acts[task.act](task)))
    except UserError as error:
        sys.exit(str(error))


def write_weights(task: Task) -> dict[str, Any]:
    """Write a model of random weights; say where and in which precisions sample.py would run it."""
    tokenizer, rt = letters(), runtime.start()
    config = GPTConfig(tokenizer.vocab_size, **task.shape)  # type: ignore[arg-type]
    Path(task.folder).mkdir()
    weights = GPT(config).init_weights(seed=1).weights()
    store.write_model(Path(task.folder), config, weights, tokenizer)
    return {
        "device": str(rt.device),
        "threads": torch.get_num_threads(),
        "precisions": ["float32", "auto", *(["int8"] if rt.device.type == "cpu" else [])],
    }


def letters() -> Tokenizer:
    """As many tokens as GPT-2 has, of up to three letters, without files to download."""
    words = (bytes(word) for n in (2, 3) for word in product(ascii_letters.encode(), repeat=n))
    ranks = single_bytes()
    ranks.update(zip(words, range(len(ranks), GPTConfig.vocab_size - 1)))
    return Tokenizer(ranks)


def prompts(task: Task) -> list[list[int]]:
    """The ids that are continued: of letters, which every program can spell."""
    generator = torch.Generator().manual_seed(2)
    shape = (task.batch_size, task.prompt_tokens)
    return torch.randint(256, GPTConfig.vocab_size - 1, shape, generator=generator).tolist()


def speed(task: Task, began: float, times: list[float]) -> dict[str, float]:
    """Tokens/s after the first, given when each token of the first text came."""
    seconds = times[-1] - times[0]
    return {
        ", tokens/s": task.batch_size * (len(times) - 1) / seconds,
        ", first token, ms": 1000 * (times[0] - began),
    }


# --- ours


def ours(task: Task) -> dict[str, float]:
    """What sample.py does, greedily and drawn, and the share of the memory's speed that it uses."""
    dtype: DType = "float32" if task.precision == "float32" else "auto"
    rt = runtime.start(task.device, dtype)
    model, tokenizer = store.load(task.folder)
    packing.place(model, rt, dtype, "int8" if task.precision == "int8" else None)
    greedy = Sampling(task.new_tokens, temperature=0, seed=1)
    drawn = Sampling(task.new_tokens, top_k=drawing.CANDIDATES, seed=1)
    timed(model, tokenizer, task, Sampling(WARMUP_TOKENS, top_k=drawing.CANDIDATES, seed=1))
    found = timed(model, tokenizer, task, greedy)
    gigabytes = moved_gigabytes(model) * found[", tokens/s"] / task.batch_size
    memory = memory_speed(rt.device)
    return {
        **found,
        " drawn, tokens/s": timed(model, tokenizer, task, drawn)[", tokens/s"],
        ", weights read, GB/s": gigabytes,
        ", memory alone, GB/s": memory,
        ", share of it, %": 100 * gigabytes / memory,
    }


def timed(model: GPT, tokenizer: Tokenizer, task: Task, sampling: Sampling) -> dict[str, float]:
    batch = generation.Batch(
        model, tokenizer, task.batch_size, task.prompt_tokens + sampling.max_new_tokens
    )
    texts = [generation.Text(prompt, sampling, tokenizer) for prompt in prompts(task)]
    began = time.perf_counter()
    written = generation.write(batch, texts)
    times = [(time.perf_counter(), tokens) for text, tokens in written if text is texts[0]]
    return speed(task, began, [moment for moment, tokens in times for _ in tokens])


def moved_gigabytes(model: GPT) -> float:
    """The size of the matrices that each token meets, as they are held."""
    config, head = model.config, model.lm_head
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    held = head.matrix.tiles if isinstance(head, CompiledLinear) else head.weight
    return weights * held.itemsize / 1e9


def memory_speed(device: torch.device) -> float:
    """GB/s of the memory alone, the best of five: read by a CPU's threads, or copied by a GPU."""
    large = torch.ones(2**28, device=device)  # 1 GiB, far more than any cache holds
    copy = None if device.type == "cpu" else torch.empty_like(large)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        if copy is None:
            large.sum()
        else:
            copy.copy_(large)[0].item()  # waits for the GPU
        best = min(best, time.perf_counter() - began)
    return large.nbytes * (1 if copy is None else 2) / best / 1e9


# --- peers, greedily


def of_transformers(task: Task) -> dict[str, float]:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    dtype = getattr(torch, task.precision)
    model: Any = transformers.GPT2LMHeadModel.from_pretrained(task.folder, dtype=dtype)
    model.to(task.device).eval()
    model.generation_config.eos_token_id = None  # which would end the text
    idx = torch.tensor(prompts(task), device=task.device)
    times: list[float] = []

    class Clock(transformers.StoppingCriteria):
        def __call__(self, ids: torch.Tensor, scores: Any, **rest: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    for tokens in (WARMUP_TOKENS, task.new_tokens):
        times.clear()
        began = time.perf_counter()
        model.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            do_sample=False,
            max_new_tokens=tokens,
            stopping_criteria=transformers.StoppingCriteriaList([Clock()]),
        )
    return speed(task, began, times)


def of_ctranslate2(task: Task) -> dict[str, float]:
    import ctranslate2

    converted = Path(f"{task.folder}.ctranslate2")
    if not converted.exists():
        ctranslate2.converters.TransformersConverter(task.folder).convert(str(converted))
    generator = ctranslate2.Generator(
        str(converted),
        device=torch.device(task.device).type,
        compute_type=task.precision,
        intra_threads=task.threads,
    )
    words = json.loads((converted / "vocabulary.json").read_text(encoding="utf-8"))
    tokens = [[words[token] for token in prompt] for prompt in prompts(task)]
    times: list[float] = []

    def note(step: Any) -> bool:
        if step.batch_id == 0:
            times.append(time.perf_counter())
        return False

    for count in (WARMUP_TOKENS, task.new_tokens):
        times.clear()
        began = time.perf_counter()
        generator.generate_batch(
            tokens,
            max_length=count,
            min_length=count,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=note,
        )
    return speed(task, began, times)
