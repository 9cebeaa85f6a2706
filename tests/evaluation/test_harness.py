"""The figures and the choice on each item equal those of lm-evaluation-harness itself."""

from pathlib import Path

import made_up
import pytest
import yaml

pytest.importorskip("lm_eval")

SPLITS = {"hellaswag": "validation", "piqa": "validation", "winogrande": "validation"}
YAMLS = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_text):
    return made_up.checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_text, block_size=96)


def by_harness(checkpoint: Path, folder: Path, shots: int) -> dict:
    """The harness's own declarations of the tasks, on the files in `folder`."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = Path(lm_eval.__file__).parent / "tasks"
    for name, path in YAMLS.items():
        files = {SPLITS.get(name, "test"): str(folder / f"{name}.jsonl")}
        if name != "lambada_openai":
            files["train"] = str(folder / f"{name}_train.jsonl")
        arguments = {"data_files": files, "cache_dir": str(folder / "cache")}
        config = {
            "include": str(tasks / path),
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": arguments,
        }
        (folder / f"{name}.yaml").write_text(yaml.dump(config))
    names = [name for name in YAMLS if not shots or name != "lambada_openai"]
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=3),
        tasks=[f"local_{name}" for name in names],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        num_fewshot=shots,
        bootstrap_iters=0,
    )


@pytest.mark.parametrize("shots", [0, 2])
def test_every_task_equals_the_harness(checkpoint, tmp_path, shots):
    made_up.write_tasks(tmp_path)
    theirs = by_harness(checkpoint, tmp_path, shots)
    for name in theirs["results"]:
        ours = made_up.score(checkpoint, name.removeprefix("local_"), tmp_path, shots=shots)
        for figure, value in ours.figures.items():
            assert value == pytest.approx(theirs["results"][name][f"{figure},none"], rel=1e-4)
        samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(ours.items)
        for sample, item in zip(samples, ours.items):
            values = [value for ((value, _),) in sample["resps"]]
            assert item["log_likelihoods"] == pytest.approx(values, abs=1e-4)
            for figure in {"acc", "acc_norm"} & ours.figures.keys():
                assert item[figure] == sample[figure]
            if len(values) > 1:
                assert item["choice"] == values.index(max(values))
