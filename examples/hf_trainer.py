"""
Continue training a plainGPT checkpoint with Hugging Face's own Trainer, on plainGPT's shards.

    pip install transformers accelerate
    python examples/hf_trainer.py out/stdlib/step_001750 data/stdlib out/trainer 100

Arguments: a checkpoint folder (ours or any GPT-2), a data folder, an output folder, steps.
"""

import sys
from pathlib import Path

if __name__ == "__main__" and len(sys.argv) != 5:  # before the imports, which take seconds
    print(__doc__.strip())
    sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)

try:
    import accelerate  # noqa: F401  (which Trainer needs)
    import torch
    from transformers import AutoTokenizer, GPT2LMHeadModel, Trainer, TrainingArguments
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed: pip install transformers accelerate")

sys.path.insert(0, str(Path(__file__).parents[1]))
from configurator import UserError, one_line
from plaingpt.checkpoint import folders
from plaingpt.text.dataset import open_dataset
from plaingpt.text.tokenizer import Tokenizer


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
    """Raises UserError for a checkpoint or data that cannot be opened, or that do not match."""
    if not steps.isdecimal() or int(steps) == 0:
        raise UserError(f"steps must be a positive integer, not {steps!r}")
    folder = folders.find(checkpoint)
    if Tokenizer.load(folder).fingerprint != open_dataset(data_dir).tokenizer.fingerprint:
        raise UserError(f"{checkpoint} and {data_dir} have different tokenizers")
    model = GPT2LMHeadModel.from_pretrained(folder)
    arguments = TrainingArguments(
        out_dir, max_steps=int(steps), per_device_train_batch_size=8, learning_rate=1e-4
    )
    windows = {name: Windows(data_dir, name, model.config.n_positions) for name in ("train", "val")}
    trainer = Trainer(model, arguments, train_dataset=windows["train"], eval_dataset=windows["val"])
    print("before:", trainer.evaluate()["eval_loss"], flush=True)
    trainer.train()
    print("after:", trainer.evaluate()["eval_loss"], flush=True)
    trainer.save_model(out_dir)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out_dir)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
