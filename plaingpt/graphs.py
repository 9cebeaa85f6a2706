"""The GPU's work for one token, recorded as a CUDA graph and launched at once: Python takes longer
to launch a small model's kernels one by one than the GPU takes to run them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model import KVCache

WORTH = 8  # tokens of one shape, after which recording them pays
Forward = Callable[[Tensor], Tensor]


class Recorded:
    """Calls a function of the next ids (B, 1) of B texts that reads and extends their cache, and
    gives their logits (B, V). They are overwritten by the next call.

    There is a graph for each number of texts and for each span of the cache that attention sees.
    All put their logits in the same place, and share their memory, since only one of them runs at a
    time: many graphs take little more memory than one."""

    def __init__(self, cache: KVCache, vocab_size: int) -> None:
        self.cache = cache
        device, size = cache.entries.device, cache.entries.size(1)
        self.logits = torch.empty(size, vocab_size, device=device)
        self.uses: Counter[tuple[int, int]] = Counter()
        self.graphs: dict[tuple[int, int], Forward] = {}
        # Of memory; not one for the whole process, because it ends with its last graph (pytorch
        # issue 175276).
        self.pool: Any = None

    def __call__(self, function: Forward, idx: Tensor) -> Tensor:
        cache = self.cache
        key = (len(idx), cache.span(cache.end + 1))
        self.uses[key] += 1
        if self.uses[key] < WORTH or not cache.end:  # a first token sees only itself
            return function(idx)
        if key not in self.graphs:
            lengths, end = cache.lengths.clone(), cache.end

            def forward(ids: Tensor) -> Tensor:
                cache.end = end
                return self.logits[: len(ids)].copy_(function(ids))

            self.graphs[key] = self.record(forward, idx)
            cache.lengths.copy_(lengths)
            cache.end = end
        logits = self.graphs[key](idx)
        cache.end += 1  # as the function does on the host; the graph does the rest
        return logits

    def record(self, function: Forward, example: Tensor) -> Forward:
        """The function as a CUDA graph, for arguments of the shape of `example`."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        with torch.cuda.device(example.device):  # a thread begins with the first GPU
            given, graph = example.clone(), torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function(given)  # libraries allocate what they need on their first call
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                result = function(given)

        def replay(argument: Tensor) -> Tensor:
            given.copy_(argument)
            graph.replay()
            return result

        return replay
