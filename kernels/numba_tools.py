"""What the Numba kernels stand on: compilation, arrays made from addresses, threads.

Compiled code on disk is made anew after an edit of cpu.py, not of this file: then delete the files
*.nb* in kernels/__pycache__.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import torch
from numba import carray, njit, types
from numba.extending import intrinsic

options = dict(error_model='numpy', fastmath={'contract', 'nsz', 'arcp'}, cache=True)
try:
    njit(**options)(lambda: 0)
except RuntimeError:  # no folder for compiled code can be written
    options['cache'] = False
in_vectors = options | {'fastmath': {*options['fastmath'], 'reassoc'}}  # for sums
element = njit(**options, no_cpython_wrapper=True, no_cfunc_wrapper=True)  # for kernels to call


@intrinsic
def pointer(_, address):
    """An address as a pointer: of an array made of it within a kernel, no index wraps."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), generate


@njit(**options, inline='always')
def array(table, chunk, column):
    """The chunk's theta, grad, exp_avg or exp_avg_sq; empty if it has no address."""
    chunks, addresses = table
    j, start, size = chunks[chunk, 0], chunks[chunk, 1], chunks[chunk, 2]
    return carray(pointer(addresses[j, column] + 4 * start), size if addresses[j, column] else 0)


@njit(**options, inline='always')
def arrays(table, k):
    return array(table, k, 0), array(table, k, 1), array(table, k, 2), array(table, k, 3)


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
