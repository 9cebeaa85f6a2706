"""A GPU's part of a token as a CUDA graph, which is launched as a whole: one by one, the kernels of
a small model take less time than Python needs to launch them."""

from collections import Counter
from collections.abc import Callable
from functools import cache as once
from typing import Any

import torch
from torch import Tensor

from model import KVCache

WORTH = 8  # tokens of one shape, after which recording them pays
Forward = Callable[[Tensor], Tensor]


class Recorded:
    """A function of the next ids (B, 1) of B texts that reads and extends their cache, and gives
    their logits (B, V). They are overwritten when it is called again.

    There is a graph for each number of texts and for each span of the cache that attention sees."""

    def __init__(self, function: Forward, cache: KVCache) -> None:
        self.function, self.cache = function, cache
        self.uses: Counter[tuple[int, int]] = Counter()
        self.graphs: dict[tuple[int, int], Forward] = {}

    def __call__(self, idx: Tensor) -> Tensor:
        cache = self.cache
        key = (len(idx), cache.span(cache.end + 1))
        self.uses[key] += 1
        if self.uses[key] < WORTH:
            return self.function(idx)
        if key not in self.graphs:
            lengths, end = cache.lengths.clone(), cache.end

            def forward(ids: Tensor) -> Tensor:
                cache.end = end
                return self.function(ids)

            self.graphs[key] = recorded(forward, idx)
            cache.lengths.copy_(lengths)
            cache.end = end
        logits = self.graphs[key](idx)
        cache.end += 1  # as the function does on the host; the graph does the rest
        return logits


def recorded(function: Forward, example: Tensor) -> Forward:
    """The function as a CUDA graph, for arguments of the shape of `example`."""
    given, graph = example.clone(), torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(given)  # libraries allocate what they need on their first call
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, pool=memory(), capture_error_mode="thread_local"):
        result = function(given)

    def replay(argument: Tensor) -> Tensor:
        given.copy_(argument)
        graph.replay()
        return result

    return replay


@once
def memory() -> Any:
    """Memory that all graphs share; the results of each stay where they are."""
    return torch.cuda.graph_pool_handle()
