"""What the Numba kernels stand on: compilation, arrays made from addresses, threads.

Compiled code on disk is made anew after an edit of cpu.py, not of this file: then delete the files
*.nb* in kernels/__pycache__.
"""

import gc
import os
from collections import deque
from contextlib import contextmanager, suppress
from itertools import pairwise
from queue import SimpleQueue
from threading import RLock, Thread

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


one_at_a_time = RLock()  # a fork waits for it, or the child would find Numba's own lock held


@contextmanager
def loading():
    """Load or compile a kernel without searching for garbage: its 70,000 objects all stay."""
    with one_at_a_time:
        enabled = gc.isenabled()
        try:
            gc.disable()
            yield
        finally:
            if enabled:
                gc.enable()


threads, tasks = [], SimpleQueue()  # threads are started when they are first needed


def _do_tasks():
    while True:
        lock, *task = tasks.get()
        with lock:
            _do_spans(*task)
        del lock, task  # of an optimizer that may go before the next task comes


def _do_spans(spans, errors, function, arguments):
    """Call the function on spans until none is left. Add what it raises to `errors`."""
    with suppress(IndexError):  # no span is left
        while True:
            span = spans.popleft()
            try:
                function(*span, *arguments)
            except BaseException as error:
                errors.append(error)


def share(function, count, work, *arguments):
    """Split range(count) into spans and call function(begin, end, *arguments), on several threads.

    There are as many spans as PyTorch has threads, but at most one for each 2 ** 17 of `work`,
    which is counted in elements of Adam's pass, and at least one: waking a thread for less takes
    longer than doing the work. This thread does spans until none is left, so that it waits for no
    other to wake. What the function raises in any thread is raised here, after all have ended.
    """
    number = min(torch.get_num_threads(), work >> 17)
    if number < 2:
        function(0, count, *arguments)
        return
    while len(threads) < number - 1:
        thread = Thread(target=_do_tasks, daemon=True)
        thread.start()
        threads.append(thread)
    edges = [count * i // number for i in range(number + 1)]
    spans, errors = deque(pairwise(edges)), []
    task = spans, errors, function, arguments
    locks = [RLock() for _ in range(number - 1)]  # a thread holds one while it works
    try:
        for lock in locks:
            tasks.put((lock, *task))
        _do_spans(*task)
    finally:  # other threads write to addresses that must not be freed: wait even after Ctrl-C
        while locks:
            try:
                spans.clear()
                with locks[-1]:
                    locks.pop()
            except BaseException as error:
                errors.append(error)
    for error in errors:
        raise error


def _start_anew():
    """Forget the threads in a forked child, which has none of its parent's."""
    global threads, tasks
    threads, tasks = [], SimpleQueue()
    one_at_a_time.release()


os.register_at_fork(
    before=one_at_a_time.acquire,
    after_in_parent=one_at_a_time.release,
    after_in_child=_start_anew,
)
