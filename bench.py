"""Measure the speed of nanoNorm beside that of PyTorch, pytorch-cpr and nanoGPT.

    python bench.py --what=optimizer     a step with clipping of each optimizer
    python bench.py --what=host          the host's share of a step on a GPU; needs no GPU
    python bench.py --what=train         CPU: an iteration of train.py and the parts it has
    python bench.py --what=throughput    tokens a second of GPT-2; on a GPU --what=train does this
    python bench.py --what=prepare --data_files=corpus.parquet --bpe_file=gpt2.tiktoken --repeats=3

The contenders take turns in one process. Times are medians of the rounds.
"""

import filecmp
import gc
import itertools
import os
import re
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import model
from configurator import check, configure
from cpr import AdamCPR, AdamH, AdamW, AdamWN
from runtime.device import setup
from runtime.errors import border, fail

what = 'optimizer'  # 'optimizer', 'host', 'train', 'throughput' or 'prepare'
repeats = 15  # rounds; each contender runs once in each
device = 'auto'  # of the tensors
impl = 'auto'  # of this project's optimizers: 'triton', 'numba', 'torch'; 'auto': each that runs
# whose tensors are updated: of 'char,124M,350M,774M,1.5B' and 'tiny';
# '': 124M,1.5B for what='host', else 124M,char
sizes = ''
batches = '12,32,64'  # throughput: sequences an iteration
block_size = 1024  # throughput: tokens a sequence
grad_clip = 1.0  # total gradient norm to clip to
grad_norm = 10.0  # total gradient norm before clipping; below grad_clip nothing is clipped
# train: what is trained
train_arguments = 'config/train_char_cpr.py --max_iters=150 --eval_iters=1 --out_dir=out-bench'
data_files = ''  # prepare: local files of text, as data/openwebtext/prepare.py takes them
bpe_file = ''  # prepare: GPT-2's vocabulary, in place of tiktoken's own
# ----
limits = {
    'one of optimizer host train throughput prepare': 'what',
    '>= 1': 'repeats block_size',
    '> 0': 'grad_clip grad_norm',
    'one of auto triton numba torch': 'impl',
}
with border():
    settings, _ = configure(globals())
    check(settings, limits)
sizes = sizes or ('124M,1.5B' if what == 'host' else '124M,char')

PAIR = 'clip_grad_norm_ + torch.optim.AdamW(fused=True)'
FOREACH = 'clip_grad_norm_ + torch.optim.AdamW(foreach=True)'
THEIRS = 'clip_grad_norm_ + pytorch_cpr.AdamCPR'
GPT2 = dict(vocab_size=50304, block_size=1024, bias=True)
SIZES = {
    'tiny': dict(n_layer=2, n_head=2, n_embd=64, **GPT2),
    'char': dict(n_layer=4, n_head=4, n_embd=128, vocab_size=100, block_size=128, bias=False),
    '124M': dict(n_layer=12, n_head=12, n_embd=768, **GPT2),
    '350M': dict(n_layer=24, n_head=16, n_embd=1024, **GPT2),
    '774M': dict(n_layer=36, n_head=20, n_embd=1280, **GPT2),
    '1.5B': dict(n_layer=48, n_head=25, n_embd=1600, **GPT2),
}


def milliseconds(step, rt, times=1):
    """Return the time of one of `times` calls of step() in a row, until the device is done."""
    rt.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        step()
    rt.synchronize()
    return (time.perf_counter() - start) * 1e3 / times


def copy_bandwidth(rt):
    """Return the bytes a second that a copy of 1 GB reads and writes, the fastest of five."""
    x = torch.empty(1 << 28, device=rt.device)
    y = torch.empty_like(x)
    fastest = min(milliseconds(lambda: y.copy_(x), rt, times=10) for _ in range(5))
    return 2 * x.nbytes / fastest * 1e3


def machine(rt):
    if rt.device_type == 'cuda':
        return torch.cuda.get_device_name(rt.device)
    return f'{rt.device}, {torch.get_num_threads()} threads'


def contenders(params, impl):
    """Return {name: (optimizer, bytes a parameter that a step with clipping moves, clips)}.

    The bytes are None if unknown. clips: the step clips the gradients itself.
    """
    matrices, vectors = ([p for p in params if (p.dim() >= 2) == wide] for wide in (True, False))

    def groups(**of_vectors):
        return [{'params': matrices}, {'params': vectors, **of_vectors}]

    common = dict(lr=1e-4, betas=(0.9, 0.95))
    ours = dict(**common, max_grad_norm=grad_clip, impl=impl)
    # kappa so low that every bound is active from the first step on
    bound = dict(kappa_init_method='uniform', kappa_init_param=1e-6)
    found = {}
    for name, kind, moved in ((PAIR, 'fused', 40), (FOREACH, 'foreach', None)):
        options = {kind: True, 'weight_decay': 0.1, **common}
        found[name] = torch.optim.AdamW(groups(weight_decay=0.0), **options), moved, False
    found['AdamW'] = AdamW(groups(weight_decay=0.0), weight_decay=0.1, **ours), 32, True
    for cls, options in ((AdamCPR, bound), (AdamWN, dict(ratio=2.0))):
        for order, moved in (('before', 32), ('after', 40)):
            optimizer = cls(groups(regularize=False), order=order, **options, **ours)
            found[f"{cls.__name__}, order='{order}'"] = optimizer, moved, True
    found['AdamH'] = AdamH(groups(regularize=False), **ours), 44, True
    if find_spec('pytorch_cpr') is None:
        return found
    import pytorch_cpr

    theirs = [{'params': matrices, 'regularize': True}, {'params': vectors, 'regularize': False}]
    found[THEIRS] = pytorch_cpr.AdamCPR(theirs, **common, **bound), None, False
    return found


def bench_optimizer():
    rt = setup(device)
    if find_spec('pytorch_cpr') is None:
        print('pytorch_cpr is not installed (requirements-dev.txt): left out')
    bandwidth = copy_bandwidth(rt)
    compiled = 'triton' if rt.device_type == 'cuda' else 'numba'
    impls = [compiled, 'torch'] if find_spec(compiled) else ['torch']
    for size in sizes.split(','):
        for each in impls if impl == 'auto' else [impl]:
            optimizer_table(size, each, bandwidth, rt)
            gc.collect()  # the next one needs the memory
            if rt.device_type == 'cuda':
                torch.cuda.empty_cache()


def optimizer_table(size, impl, bandwidth, rt):
    """Time all contenders on the same weights and gradients; each has its own state."""
    with torch.device(rt.device):
        params = list(model.GPT(model.GPTConfig(**SIZES[size])).parameters())
    for p in params:
        p.grad = torch.randn_like(p)
    grads, every = [p.grad for p in params], contenders(params, impl)
    count, times = sum(p.numel() for p in params), {name: [] for name in every}
    # in a row, so that launching a step on a GPU hides behind the last, and a short one is timed
    in_a_row = 1 if rt.device_type == 'cpu' and count > 1e7 else 10

    def scale_gradients():
        torch._foreach_mul_(grads, grad_norm / torch.nn.utils.get_total_norm(grads).item())

    for i in range(repeats + 1):  # the first round warms up
        for name, (optimizer, _, clips) in every.items():

            def step(optimizer=optimizer, clips=clips):
                if not clips:
                    torch.nn.utils.clip_grad_norm_(params, grad_clip)
                optimizer.step()

            scale_gradients()
            step()  # others have written the weights: their norms are summed anew
            scale_gradients()
            ms = milliseconds(step, rt, in_a_row)
            if i > 0:
                times[name].append(ms)
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    print(
        f'\n{size}: {count / 1e6:.1f}M parameters in {len(params)} tensors, float32, {impl}, '
        f'{machine(rt)}; gradient norm {grad_norm:g} clipped to {grad_clip:g}; medians of '
        f'{repeats} rounds; copy {bandwidth / 1e9:.0f} GB/s\n'
    )
    print(f'{"":52}{"ms":>8}{"fastest":>9}{"ratio":>7}{"bytes":>7}{"of copy":>9}')
    for name, (_, moved, _) in every.items():
        ms = medians[name]
        line = f'{name:52}{ms:8.2f}{min(times[name]):9.2f}{ms / medians[PAIR]:7.2f}'
        if moved:
            line += f'{moved:7}{moved * count / ms * 1e3 / bandwidth:9.0%}'
        print(line)


class NoGPU:
    """A driver for Triton without a GPU: compiles for sm_90, launches nothing."""

    utils = launcher_cls = property(lambda self: self)

    def __call__(self, *arguments):
        return lambda *launch: None

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget('cuda', 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_device_properties(self, device):
        return {'max_shared_mem': 232448, 'warpSize': 32}

    def load_binary(self, *arguments):
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads at most


def bench_host():
    """Time all of a step on a GPU but the kernels. The CPU takes the place of the GPU."""
    try:
        import triton

        from nanonorm.kernels import gpu
    except ImportError:
        fail('what=host needs Triton, which is for Linux: pip install triton')

    triton.runtime.driver.set_active(NoGPU())
    gpu.INTERPRETED = True  # no GPU is asked for
    torch.set_num_threads(1)
    rt = setup('cpu')
    print(f"the host's time of a step on a GPU, medians of {10 * repeats} steps, one thread\n")
    for size in sizes.split(','):
        with torch.device('meta'):
            shapes = [p.shape for p in model.GPT(model.GPTConfig(**SIZES[size])).parameters()]
        params = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]  # never read
        for p in params:
            p.grad = torch.empty_like(p)
        for name, (optimizer, _, clips) in contenders(params, 'triton').items():
            if not clips:
                continue
            for p in params:
                moments = {'exp_avg': torch.empty_like(p), 'exp_avg_sq': torch.empty_like(p)}
                optimizer.state[p] = {'step': torch.zeros(()), **moments}
            times = [milliseconds(optimizer.step, rt) for _ in range(10 * repeats)]
            print(
                f'{size:6}{len(params):5} tensors  {name:28}{statistics.median(times):7.2f} ms, '
                f'fastest {min(times):.2f}',
                flush=True,
            )


def bench_throughput():
    """Time whole iterations of GPT-2, the same loop for each optimizer.

    hours: of 100k iterations of config/train_gpt2_*.py, which have 491,520 tokens each.
    """
    rt = setup(device, seed=1337)
    size = sizes.split(',')[0]
    config = model.GPTConfig(**{**SIZES[size], 'block_size': block_size, 'bias': False})
    print(
        f'GPT-2 {size}, block {block_size}, {rt.dtype}, {machine(rt)}, torch {torch.__version__}; '
        f'medians of {repeats} iterations\n\n{"":52}{"batch":>6}{"tokens/s":>10}{"hours":>9}'
        f'{"mfu":>7}{"forward":>9}{"backward":>10}{"step":>7}'
    )
    for batch in map(int, batches.split(',')):
        throughput_table(config, batch, rt)
        gc.collect()  # the next one needs the memory
        if rt.device_type == 'cuda':
            torch.cuda.empty_cache()


def throughput_table(config, batch, rt):
    """Time all optimizers on the same model; each has its own state."""
    gpt = model.GPT(config).to(rt.device)
    run = torch.compile(gpt) if rt.device_type == 'cuda' else gpt
    tokens = torch.randint(config.vocab_size, (2, batch, block_size), device=rt.device)
    params = list(gpt.parameters())
    names = (PAIR, 'AdamW', "AdamCPR, order='before'", "AdamWN, order='after'", 'AdamH')
    optimizers, times = contenders(params, impl), {name: [] for name in names}
    for i in range(repeats + 3):  # the first three rounds warm up
        for name in names:
            optimizer, _, clips = optimizers[name]
            clip = None if clips else params
            # others have written the weights: the first of two iterations sums their norms anew
            iteration(run, tokens, optimizer, clip, rt)
            durations = iteration(run, tokens, optimizer, clip, rt)
            if i >= 3:
                times[name].append(durations)
    for name in names:
        forward, backward, step = map(statistics.median, zip(*times[name], strict=True))
        ms = statistics.median(map(sum, times[name]))
        mfu = '-'
        if rt.peak_flops:
            mfu = f'{gpt.estimate_mfu(batch, ms / 1e3, rt.peak_flops):.1%}'
        speed = batch * block_size / ms * 1e3  # tokens a second
        print(
            f'{name:52}{batch:6}{speed:10,.0f}{100e3 * 491520 / speed / 3600:9,.0f}{mfu:>7}'
            f'{forward / ms:9.1%}{backward / ms:10.1%}{step / ms:7.1%}',
            flush=True,
        )


def iteration(run, tokens, optimizer, clip, rt):
    """Return the milliseconds of forward, backward and step.

    clip: the parameters whose gradients are clipped before the step, or None.
    """
    x, y = tokens
    marks = [now(rt)]
    with rt.autocast():
        _, loss = run(x, y)
    marks.append(now(rt))
    loss.backward()
    marks.append(now(rt))
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(clip, grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    marks.append(now(rt))
    rt.synchronize()
    return [milliseconds_between(*pair) for pair in itertools.pairwise(marks)]


def now(rt):
    if rt.device_type != 'cuda':
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds_between(start, end):
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


class Clock:
    """Time the iterations of train.py, and how much of each is forward, backward and step."""

    def __init__(self):
        self.inside, self.last_end, self.iterations = 0.0, None, []

    def timed(self, function):
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.inside += time.perf_counter() - start
            return result

        return wrapper

    def step_starts(self, *_):
        self.inside -= time.perf_counter()

    def step_ends(self, *_):
        end = time.perf_counter()
        if self.last_end is not None:
            self.iterations.append((end - self.last_end, self.inside + end))
        self.last_end, self.inside = end, 0.0


def bench_train():
    """On a CPU time what train.py adds to forward, backward and step, on a GPU the throughput."""
    if setup(device).device_type == 'cuda':
        return bench_throughput()
    clock = Clock()
    forward, backward = model.GPT.forward, torch.Tensor.backward
    hooks = [
        register_optimizer_step_pre_hook(clock.step_starts),
        register_optimizer_step_post_hook(clock.step_ends),
    ]
    model.GPT.forward, torch.Tensor.backward = clock.timed(forward), clock.timed(backward)
    sys.argv = ['train.py', *train_arguments.split()]
    try:
        runpy.run_path('train.py', run_name='__main__')
    finally:
        model.GPT.forward, torch.Tensor.backward = forward, backward
        for hook in hooks:
            hook.remove()
    iterations = clock.iterations[10:]  # the first ones warm up
    if len(iterations) < 10:
        fail('too few iterations to measure; raise --max_iters in train_arguments')
    total, inside = (statistics.median(times) * 1e3 for times in zip(*iterations, strict=True))
    ratio = statistics.median(total / inside for total, inside in iterations)
    print(
        f'\n{train_arguments}\n{machine(setup(device))}, median of {len(iterations)} iterations: '
        f'{total:.2f} ms an iteration, {inside:.2f} ms in forward, backward and step; '
        f'iteration / parts: {ratio:.4f}'
    )


def bench_prepare():
    """Time prepare.py and nanoGPT's recipe from loaded text to files, and prepare.py's memory."""
    if not data_files:
        fail('--what=prepare needs --data_files=PATTERN: files with a column or lines of text')
    import datasets

    from data.openwebtext.prepare import load, prepare
    from data.tokenizers import GPT2Tokenizer
    from data.tokens import TokenData
    from data.writer import cores

    gpt2 = GPT2Tokenizer(bpe_file or None)
    datasets.disable_progress_bars()
    times, same = {'nanoGPT': [], 'ours': []}, True
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        theirs, ours = folder / 'nanoGPT', folder / 'ours'
        theirs.mkdir()
        ours.mkdir()
        for i in range(repeats):
            # a cache for each round, or map() would find the last one's results
            texts = load(folder / f'cache{i}', data_files)
            rows = datasets.concatenate_datasets(
                [datasets.Dataset.from_file(path) for path in texts.files]
            )
            times['nanoGPT'].append(wall_and_processor_time(nanogpt_recipe, theirs, rows, gpt2))
            times['ours'].append(wall_and_processor_time(prepare, ours, texts, gpt2, {}))
            for name in ('train.bin', 'val.bin'):
                same = same and filecmp.cmp(theirs / name, ours / name, shallow=False)
            shutil.rmtree(folder / f'cache{i}')

        tokens = TokenData(ours).meta['train_tokens']
        print(
            f'{len(texts):,} documents, {tokens / 1e6:.1f} M tokens, {cores()} cores; '
            f'medians of {repeats}'
        )
        medians = []
        for name, pairs in times.items():
            seconds, used = (statistics.median(column) for column in zip(*pairs, strict=True))
            medians.append((seconds, used))
            print(
                f'{name:8}{seconds:8.2f} s{len(texts) / seconds:10,.0f} documents/s'
                f'{tokens / seconds / 1e6:8.2f} M tokens/s{used:8.2f} s of processor time'
            )
        ratio, of_used = (theirs / ours for theirs, ours in zip(*medians, strict=True))
        print(
            f'ratio {ratio:.2f}, of processor time {of_used:.2f}; '
            f'files byte for byte the same: {"yes" if same else "NO"}'
        )
        print_peak_memory(folder / 'out')
        data, rt = TokenData(ours, 1024), setup('cpu')
        numbers = itertools.count()
        ms = [
            milliseconds(lambda: data.batch('train', 1, next(numbers), 12), rt) for _ in range(200)
        ]
        print(f'gathering a batch of 12 x 1024 tokens: {statistics.median(ms):.3f} ms')


def nanogpt_recipe(folder, rows, gpt2):
    """Write train.bin and val.bin as nanoGPT's data/openwebtext/prepare.py does."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    from data.writer import cores

    encoding = tiktoken.Encoding(
        'gpt2',
        pat_str=r50k_pat_str,
        mergeable_ranks=gpt2.encoding._mergeable_ranks,
        special_tokens={'<|endoftext|>': gpt2.end},
    )  # tiktoken.get_encoding('gpt2')

    def encode(row):
        ids = [*encoding.encode_ordinary(row['text']), gpt2.end]
        return {'ids': ids, 'len': len(ids)}

    split = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    split['val'] = split.pop('test')
    for name, part in split.map(encode, remove_columns=['text'], num_proc=cores()).items():
        length = int(np.sum(part['len']))
        ids = np.memmap(folder / f'{name}.bin', np.uint16, 'w+', shape=(length,))
        shards, end = min(1024, len(part)), 0
        for i in range(shards):
            shard = part.shard(shards, i, contiguous=True).with_format('numpy')
            shard = np.concatenate(shard['ids'])
            ids[end : end + len(shard)] = shard
            end += len(shard)
        ids.flush()


def wall_and_processor_time(work, *arguments):
    """Return the seconds that work(*arguments) takes, until what it wrote is on the disk."""
    start, used = time.perf_counter(), processor_time()
    work(*arguments)
    os.sync()
    return time.perf_counter() - start, processor_time() - used


def processor_time():
    """Return the seconds of this process and its ended children, finer than os.times()."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def print_peak_memory(out_dir):
    """Run prepare.py as a process and print the most memory that it takes."""
    # a process begins with the peak of its parent, so a small one stands between
    between = (
        'import os, sys; pid = os.posix_spawn(sys.executable, sys.argv[1:], os.environ); '
        '_, status, usage = os.wait4(pid, 0); '
        'print("the whole script: peak memory", usage.ru_maxrss >> 10, "MB"); '
        'sys.exit(os.waitstatus_to_exitcode(status))'
    )
    script = ['data/openwebtext/prepare.py', f'--data_files={data_files}', f'--out_dir={out_dir}']
    script += [f'--bpe_file={bpe_file}'] if bpe_file else []
    subprocess.run([sys.executable, '-c', between, sys.executable, *script], check=True)


benchmarks = {
    'optimizer': bench_optimizer,
    'host': bench_host,
    'train': bench_train,
    'throughput': bench_throughput,
    'prepare': bench_prepare,
}
with border():
    for size in sizes.split(','):
        if size not in SIZES:
            fail(f"sizes='{sizes}' names {size}; there are {', '.join(SIZES)}")
    if not re.fullmatch('[1-9][0-9]*(,[1-9][0-9]*)*', batches):
        fail(f"batches='{batches}' must be whole numbers, at least 1, as in 12,24")
    benchmarks[what]()
