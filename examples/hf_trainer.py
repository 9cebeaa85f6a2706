"""
Continue training a plainGPT checkpoint with Hugging Face's own Trainer, on plainGPT's shards.

    pip install transformers accelerate
    python examples/hf_trainer.py out/stdlib/step_001500 data/stdlib out/trainer 100

Arguments: a checkpoint folder (ours or any GPT-2), a data folder, an output folder, steps.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))
from plaingpt.text.dataset import open_dataset


class Windows(torch.utils.data.Dataset):
    """The windows of a split as Trainer expects them: ids, and as labels the same ids, because the
    model shifts them; -100 where a token does not count in the loss."""

    def __init__(self, data_dir: str, name: str, length: int) -> None:
        self.split = open_dataset(data_dir).split(name)
        self.length = length

    def __len__(self) -> int:
        return len(self.split) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start, stop = index * self.length, (index + 1) * self.length
        ids = torch.from_numpy(self.split[start:stop])
        mask = self.split.mask(start, stop)
        labels = ids if mask is None else ids.masked_fill(torch.from_numpy(mask) == 0, -100)
        return {"input_ids": ids, "labels": labels}


def main(checkpoint: str, data_dir: str, out_dir: str, steps: str) -> None:
    model = GPT2LMHeadModel.from_pretrained(checkpoint)
    arguments = TrainingArguments(
        out_dir, max_steps=int(steps), per_device_train_batch_size=8, learning_rate=1e-4
    )
    windows = {name: Windows(data_dir, name, model.config.n_positions) for name in ("train", "val")}
    trainer = Trainer(model, arguments, train_dataset=windows["train"], eval_dataset=windows["val"])
    print("before:", trainer.evaluate()["eval_loss"])
    trainer.train()
    print("after:", trainer.evaluate()["eval_loss"])
    trainer.save_model(out_dir)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(out_dir)


if __name__ == "__main__":
    main(*sys.argv[1:])
