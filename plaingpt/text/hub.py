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
from plaingpt.text.records import BATCH, Row, Rows

ADDRESS = re.compile(
    r"hf:(?P<path>[^\s:@#]+)(:(?P<config>[^\s@#]+))?(@(?P<revision>[^\s#]+))?(#(?P<split>\S+))?"
)


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


@dataclass(frozen=True)
class Shard:
    """A file of a streamed dataset, or whatever `datasets` makes of it."""

    label: str  # in messages: "hf:own/er, record", or of which shard
    stream: Any  # a datasets.IterableDataset
    size: int = 0  # bytes, unknown

    def batches(
        self, fields: tuple[str, ...], state: tuple[int, Any] | None
    ) -> Iterator[tuple[Rows, tuple[int, Any]]]:
        """The records after a `state`, or all, each batch with the state before it.

        `datasets` itself retries for minutes when a connection breaks. Raises BrokenStream if the
        network stays down.
        """
        number, known = state or (0, None)
        try:
            if known:
                self.stream.load_state_dict(known)
            for batch in self.stream.iter(BATCH):
                values = [dict(zip(batch, each)) for each in zip(*batch.values())]
                numbers = range(number + 1, number + 1 + len(values))
                yield Rows(values, self.label, numbers), (number, known)
                number += len(values)
                known = copy.deepcopy(self.stream.state_dict())
        except Exception as error:  # the hub's, fsspec's, pyarrow's and httpx' own kinds
            said = " ".join(str(error).split())
            where = f"source {self.label} {number:,}: reading broke off after it"
            raise BrokenStream(f"{where} ({type(error).__name__}: {said})") from error


def hub_rows(name: str, hub: HubDataset, fields: tuple[str, ...]) -> Iterator[Row]:
    """The records one by one; raises as `hub_shards` and `Shard.batches` do."""
    for shard in hub_shards(name, hub, fields):
        for batch, _ in shard.batches(fields, None):
            yield from batch.each()


def hub_shards(name: str, hub: HubDataset, fields: tuple[str, ...]) -> list[Shard]:
    """The shards of the named split, else of `train`, else of all splits one after another.

    Raises UserError for a dataset, config or split that does not exist, and ConnectionError if the
    hub does not answer.
    """
    streams = hub_streams(name, hub, fields)
    if len(streams) == 1:
        return [Shard(f"{name}, record", streams[0])]
    return [Shard(f"{name}, shard {n:,}, record", each) for n, each in enumerate(streams, 1)]


def hub_streams(name: str, hub: HubDataset, fields: tuple[str, ...]) -> list[Any]:
    """A `datasets.IterableDataset` for each shard of `hub_shards`."""
    import datasets  # not at the top: it takes a second
    from datasets.distributed import split_dataset_by_node

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
    if hub.split and wanted not in splits:
        raise UserError(f"source {name!r}: no split {wanted!r}, but {', '.join(splits)}")
    chosen = [splits[wanted]] if wanted in splits else list(splits.values())
    try:
        datasets.concatenate_datasets(chosen)
    except ValueError as error:  # splits with different columns
        raise UserError(f"source {name!r}: {error}; name one: #{next(iter(splits))}") from None
    return [
        split_dataset_by_node(split, rank=number, world_size=split.num_shards)
        for split in chosen
        for number in range(split.num_shards)
    ]


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
    except Exception as error:  # hub_streams reports what is wrong
        return type(error).__name__
