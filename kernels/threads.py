"""Python threads that share work: for compiled functions that release the GIL."""

import os
from concurrent.futures import ThreadPoolExecutor

import torch

pool = []  # the one ThreadPoolExecutor, made when it is first needed


def share(function, count, elements, *arguments):
    """Call function(begin, end, *arguments) for spans that make up range(count), one a thread.

    There are as many threads as PyTorch has, one for fewer than 2 ** 15 elements each.
    """
    threads = max(1, min(torch.get_num_threads(), elements >> 15))
    edges = [count * i // threads for i in range(threads + 1)]
    if threads > 1 and not pool:
        pool.append(ThreadPoolExecutor(os.cpu_count()))
    spans = list(zip(edges, edges[1:], strict=False))
    others = [pool[0].submit(function, *span, *arguments) for span in spans[1:]]
    function(*spans[0], *arguments)
    for other in others:
        other.result()


os.register_at_fork(after_in_child=pool.clear)  # a child has none of its parent's threads
