"""Made-up items in the layouts of the real data sets, and a model with random weights for them."""

import json
import random
from pathlib import Path

from conftest import save_checkpoint

from model import GPT, GPTConfig
from plaingpt.evaluation.tasks import TASKS
from plaingpt.text.tokenizer import Tokenizer
from tools import eval

TEXT = "the cat ran far away, but nobody saw it; [step] a naïve dog's 3 green eyes. [title]"
WORDS = TEXT.split()
FILES = [task.file or name for name, task in TASKS.items()]


def checkpoint(folder: Path, text: str, block_size: int) -> Path:
    tokenizer = Tokenizer.train([text], 500)
    shape = GPTConfig(tokenizer.vocab_size, block_size, n_layer=2, n_head=2, n_embd=32)
    model = GPT(shape).init_weights(0)
    for parameter in model.parameters():
        parameter.data *= 4  # the choices differ clearly
    return save_checkpoint(folder, model, tokenizer)


def items_of(name: str, count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    def record() -> dict:
        if name.startswith("hellaswag"):
            about = {"activity_label": words(1, 2), "ctx_a": words(1, 30), "ctx_b": words(0, 4)}
            about["ctx"] = f"{about['ctx_a']} {about['ctx_b']}".strip()
            return about | {
                "endings": [words(1, 12) for _ in range(4)],
                "label": str(rng.randrange(4)),
            }
        if name == "lambada_openai":
            return {"text": words(2, 60)}
        if name.startswith("arc"):
            labels = list(rng.choice(["ABCD", "1234", "ABCDE"]))
            choices = {"text": [words(1, 6) for _ in labels], "label": labels}
            return {"question": words(1, 30), "choices": choices, "answerKey": rng.choice(labels)}
        if name == "piqa":
            return {
                "goal": words(1, 9),
                "sol1": words(1, 20),
                "sol2": words(1, 20),
                "label": rng.randrange(2),
            }
        sentence = f"{words(0, 9)} _ {words(1, 9)}."
        options = {"option1": words(1, 2), "option2": words(1, 2)}
        return {"sentence": sentence.strip(), **options, "answer": rng.choice("12")}

    return [record() for _ in range(count)]


def write(path: Path, records: list) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def write_tasks(folder: Path, count: int = 12) -> None:
    for seed, name in enumerate(FILES):
        write(folder / f"{name}.jsonl", items_of(name, count, seed))
        if name != "lambada_openai":  # which has no training split
            write(folder / f"{name}_train.jsonl", items_of(name, count, seed + 100))


def score(checkpoint: Path, task: str, folder: Path | None = None, **settings) -> eval.Result:
    given = {"task_dir": str(folder) if folder else None, "device": "cpu", "dtype": "float32"}
    cfg = eval.EvalConfig(str(checkpoint), tasks=(task,), **given | settings)
    [result] = eval.score(cfg)
    return result
