"""Datasets of the Hugging Face hub, streamed by the library `datasets`."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configurator import UserError
from plaingpt.text.network import require_answer
from plaingpt.text.records import BATCH, Row

ADDRESS = re.compile(
    r"hf:(?P<path>[^\s:@#]+)(:(?P<config>[^\s@#]+))?(@(?P<revision>[^\s#]+))?(#(?P<split>\S+))?"
)
Mark = tuple[int, Any]  # records read so far, and the state of the stream behind them


class BrokenStream(OSError):
    """A dataset that could not be read to its end."""


@dataclass(frozen=True)
class HubDataset:
    """The parts of `hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]`."""

    path: str
    config: str | None
    revision: str | None
    split: str | None


def parse_address(text: str) -> HubDataset:
    if not (named := ADDRESS.fullmatch(text)):
        raise UserError(f"source {text!r}: write hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]")
    return HubDataset(**named.groupdict())


def hub_rows(
    name: str, hub: HubDataset, fields: tuple[str, ...], done: int, mark: Mark | None
) -> Iterator[tuple[Row, Mark | None]]:
    """The records after the first `done`, each with the last mark before it. A `mark` from an
    earlier run avoids reading everything before it again.

    `datasets` itself retries for minutes when a connection breaks. Raises UserError for a dataset,
    config or split that does not exist, ConnectionError if the hub does not answer, and
    BrokenStream if the network goes down and stays down.
    """
    stream = hub_stream(name, hub, fields)
    number, state = mark or (0, None)
    if state:
        stream.load_state_dict(state)
    try:
        for batch in stream.iter(BATCH):
            for values in zip(*batch.values()):
                number += 1
                if number > done:
                    yield Row(f"{name}, record {number:,}", dict(zip(batch, values))), mark
            mark = (number, copy.deepcopy(stream.state_dict()))
    except Exception as error:  # the hub's, fsspec's, pyarrow's and httpx' own kinds
        said = " ".join(str(error).split())
        where = f"source {name!r}: reading ended after record {number:,}"
        raise BrokenStream(f"{where} ({type(error).__name__}: {said})") from error


def hub_stream(name: str, hub: HubDataset, fields: tuple[str, ...]) -> Any:
    """A `datasets.IterableDataset` of the named split, else of `train`, else of all splits one
    after another."""
    import datasets  # not at the top: it takes a second

    try:
        splits = streamed_splits(hub_builder(hub), fields)
    except ConnectionError as error:
        raise ConnectionError(
            f"source {name!r}: {error}; is there a network? (for a dataset that you have "
            "downloaded, give its folder as the source)"
        ) from None
    except Exception as error:  # no such dataset or config, a private one, …: many kinds
        raise UserError(f"source {name!r}: {' '.join(str(error).split())}") from None
    wanted = hub.split or "train"
    if wanted in splits:
        return splits[wanted]
    if hub.split:
        raise UserError(f"source {name!r}: no split {wanted!r}, but {', '.join(splits)}")
    try:
        return datasets.concatenate_datasets(list(splits.values()))
    except ValueError as error:  # splits with different columns
        raise UserError(f"source {name!r}: {error}; name one: #{next(iter(splits))}") from None


def streamed_splits(builder: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    """The splits of a `datasets` builder as streams. Of parquet files only the columns `fields`
    are read, if there are any, and BATCH rows at a time, as some files are a single row group."""
    if hasattr(builder.config, "columns"):
        builder.config.batch_size = BATCH
        splits = builder.as_streaming_dataset()
        columns = next(iter(splits.values())).column_names or []
        wanted = [name for name in fields if name in columns]
        if not wanted or set(wanted) == set(columns):
            return splits
        builder.config.columns = wanted
    return builder.as_streaming_dataset()


@contextmanager
def impatient(hubs: list[HubDataset]) -> Iterator[None]:
    """Within this, a broken connection is retried only once: at the start of a run nobody should
    wait for minutes. Raises ConnectionError if the hub of a dataset does not answer."""
    if not hubs:
        yield
        return
    from huggingface_hub import constants  # not at the top, like datasets: it takes a second

    if not constants.HF_HUB_OFFLINE and not all(Path(hub.path).is_dir() for hub in hubs):
        require_answer(constants.ENDPOINT)
    import datasets

    names = ("STREAMING_OPEN_MAX_RETRIES", "STREAMING_READ_MAX_RETRIES")
    usual = {name: getattr(datasets.config, name) for name in names}
    try:
        for name in names:
            setattr(datasets.config, name, 2)
        yield
    finally:
        for name, value in usual.items():
            setattr(datasets.config, name, value)


def hub_builder(hub: HubDataset) -> Any:
    import datasets  # not at the top: it takes a second

    return datasets.load_dataset_builder(hub.path, hub.config, revision=hub.revision)


def hub_hash(hub: HubDataset) -> str:
    """Changes whenever the files of a dataset of the hub change."""
    try:
        return hub_builder(hub).hash
    except Exception as error:  # hub_stream reports what is wrong
        return type(error).__name__
