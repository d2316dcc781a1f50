"""Measure what the project claims, in this one process, in turns: medians of the same minutes.

python bench.py --what=optimizer     an optimizer's step with clipping, against torch's
python bench.py --what=host          the host's share of a step on a GPU; needs no GPU
python bench.py --what=train         CPU: an iteration of train.py against the parts it has
python bench.py --what=throughput    tokens a second of GPT-2; on a GPU --what=train is this
python bench.py --what=prepare --data_files=corpus.parquet --bpe_file=gpt2.tiktoken --repeats=3
"""

import filecmp
import gc
import os
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import model
from configurator import check, configure
from cpr import AdamCPR, AdamW, AdamWN
from runtime.device import setup
from runtime.errors import fail

what = 'optimizer'  # 'optimizer', 'host', 'train', 'throughput' or 'prepare'
repeats = 15  # rounds; each runs every contender once
device = 'auto'  # of the tensors
impl = 'auto'  # of this project's optimizers: 'triton', 'numba', 'torch'; 'auto': each that runs
sizes = '124M,char'  # whose tensors are updated: of 'char,124M,350M,774M,1.5B' and 'tiny'
batches = '12,32,64'  # throughput: sequences an iteration
block_size = 1024  # throughput: tokens a sequence
grad_clip = 1.0  # total gradient norm to clip to
grad_norm = 10.0  # total gradient norm before clipping; below grad_clip nothing is clipped
# train: what is trained
train_arguments = 'config/train_char_cpr.py --max_iters=150 --eval_iters=1 --out_dir=out-bench'
data_files = ''  # prepare: local files of text, as data/openwebtext/prepare.py takes them
bpe_file = ''  # prepare: GPT-2's vocabulary, in place of tiktoken's own
# ----
configure(globals())
check(
    globals(),
    {
        'one of optimizer host train throughput prepare': 'what',
        '>= 1': 'repeats block_size',
        '>= 0': 'grad_clip grad_norm',
        'one of auto triton numba torch': 'impl',
    },
)
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
for size in sizes.split(','):
    if size not in SIZES:
        fail(f"sizes='{sizes}' names {size}; there are {', '.join(SIZES)}")


def milliseconds(step, rt, times=1):
    """Time of one of `times` calls in a row, with everything done that they started."""
    rt.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        step()
    rt.synchronize()
    return (time.perf_counter() - start) * 1e3 / times


def copy_bandwidth(rt):
    """Bytes a second that a copy of 1 GB reads and writes here (fastest of five times ten)."""
    x = torch.empty(1 << 28, device=rt.device)
    y = torch.empty_like(x)
    fastest = min(milliseconds(lambda: y.copy_(x), rt, times=10) for _ in range(5))
    return 2 * x.nbytes / fastest * 1e3


def contenders(params, impl):
    """{name: (optimizer, bytes a parameter of a step with clipping or None, whether it clips)}."""
    common = dict(lr=1e-4, betas=(0.9, 0.95))
    # kappa so low that every bound is active from the first step on
    bound = dict(kappa_init_method='uniform', kappa_init_param=1e-6)
    ours = dict(**common, max_grad_norm=grad_clip, impl=impl)
    matrices, vectors = ([p for p in params if (p.dim() >= 2) == wide] for wide in (True, False))

    def groups(**of_vectors):
        return [{'params': matrices}, {'params': vectors, **of_vectors}]

    decayed = dict(weight_decay=0.1, **common)
    torchs = {
        kind: torch.optim.AdamW(groups(weight_decay=0.0), **{kind: True}, **decayed)
        for kind in ('fused', 'foreach')
    }
    every = {PAIR: (torchs['fused'], 40, False), FOREACH: (torchs['foreach'], None, False)}
    every['AdamW'] = AdamW(groups(weight_decay=0.0), weight_decay=0.1, **ours), 32, True
    for cls, options in ((AdamCPR, bound), (AdamWN, dict(ratio=2.0))):
        for order, moved in (('before', 32), ('after', 40)):
            optimizer = cls(groups(regularize=False), order=order, **options, **ours)
            every[f"{cls.__name__}, order='{order}'"] = optimizer, moved, True
    try:
        import pytorch_cpr
    except ImportError:
        print('pytorch_cpr is not installed (requirements-dev.txt): left out')
        return every
    theirs = [{'params': matrices, 'regularize': True}, {'params': vectors, 'regularize': False}]
    every[THEIRS] = pytorch_cpr.AdamCPR(theirs, **common, **bound), None, False
    return every


def bench_optimizer():
    rt = setup(device)
    bandwidth = copy_bandwidth(rt)
    every = (
        ('triton' if rt.device_type == 'cuda' else 'numba', 'torch') if impl == 'auto' else (impl,)
    )
    for name in sizes.split(','):
        for each in every:
            optimizer_table(name, each, bandwidth, rt)
            gc.collect()  # the next one needs the memory
            if rt.device_type == 'cuda':
                torch.cuda.empty_cache()


def optimizer_table(size, impl, bandwidth, rt):
    """All contenders on the same weights and gradients, in turns; each has its own state."""
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

    for i in range(repeats + 1):
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
        f'{_machine(rt)}; gradient norm {grad_norm:g} clipped to {grad_clip:g}; medians of '
        f'{repeats} rounds; copy {bandwidth / 1e9:.0f} GB/s\n'
    )
    print(f'{"":52}{"ms":>8}{"fastest":>9}{"ratio":>7}{"bytes":>7}{"of copy":>9}')
    for name, (_, moved, _) in every.items():
        line = f'{name:52}{medians[name]:8.2f}{min(times[name]):9.2f}'
        line += f'{medians[name] / medians[PAIR]:7.2f}'
        if moved:
            line += f'{moved:7}{moved * count / medians[name] * 1e3 / bandwidth:9.0%}'
        print(line)


class NoGPU:
    """A driver for Triton with no GPU behind it: compiles for sm_90, launches nothing."""

    utils = launcher_cls = property(lambda self: self)

    def __call__(self, *arguments):
        return lambda *launch: None

    def get_current_target(self):
        return triton_target('cuda', 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_device_properties(self, device):
        return {'max_shared_mem': 232448, 'warpSize': 32}

    def load_binary(self, *arguments):
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads at most


def bench_host():
    """The host's time of a step on a GPU: all but the kernels, small operations being the CPU's."""
    global triton_target
    import triton
    from triton.backends.compiler import GPUTarget as triton_target

    from nanonorm.kernels import gpu

    triton.runtime.driver.set_active(NoGPU())
    gpu.INTERPRETED = True  # no GPU is asked for
    torch.set_num_threads(1)
    print(f"the host's time of a step on a GPU, medians of {10 * repeats} steps, one thread\n")
    for size in sizes.split(','):
        with torch.device('meta'):
            shapes = [p.shape for p in model.GPT(model.GPTConfig(**SIZES[size])).parameters()]
        params = [torch.nn.Parameter(torch.empty(shape)) for shape in shapes]  # never read
        for p in params:
            p.grad = torch.empty_like(p)
        for name, (optimizer, _, clips) in contenders(params, 'triton').items():
            if clips:
                for p in params:
                    moments = {'exp_avg': torch.empty_like(p), 'exp_avg_sq': torch.empty_like(p)}
                    optimizer.state[p] = {'step': torch.zeros(()), **moments}
                times = [milliseconds(optimizer.step, setup('cpu')) for _ in range(10 * repeats)]
                print(f'{size:6}{len(params):5} tensors  {name:28}', end='')
                print(f'{statistics.median(times):7.2f} ms, fastest {min(times):.2f}', flush=True)


def bench_throughput():
    """Tokens a second of whole iterations, and the step's share; one loop for every optimizer.

    hours: what 100k iterations of config/train_gpt2_*.py, of 491,520 tokens, would take.
    """
    rt = setup(device, seed=1337)
    size = sizes.split(',')[0]
    shape = dict(SIZES[size], block_size=block_size, bias=False)
    config = model.GPTConfig(**shape)
    print(
        f'GPT-2 {size}, block {block_size}, {rt.dtype}, {_machine(rt)}, torch {torch.__version__}; '
        f'medians of {repeats} iterations\n\n{"":52}{"batch":>6}{"tokens/s":>10}{"hours":>9}'
        f'{"mfu":>7}{"GB":>7}{"forward":>9}{"backward":>10}{"step":>7}'
    )
    for batch in map(int, batches.split(',')):
        gpt = model.GPT(config).to(rt.device)
        run = torch.compile(gpt) if rt.device_type == 'cuda' else gpt
        x, y = torch.randint(config.vocab_size, (2, batch, block_size), device=rt.device).unbind()
        params = list(gpt.parameters())
        for name in (PAIR, 'AdamW', "AdamCPR, order='before'", "AdamWN, order='after'"):
            optimizer, _, clips = contenders(params, impl)[name]
            parts = [[], [], []]
            if rt.device_type == 'cuda':
                torch.cuda.reset_peak_memory_stats()
            for i in range(repeats + 3):
                marks = [_now(rt)]
                with rt.autocast():
                    _, loss = run(x, y)
                marks.append(_now(rt))
                loss.backward()
                marks.append(_now(rt))
                if not clips:
                    torch.nn.utils.clip_grad_norm_(params, grad_clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                marks.append(_now(rt))
                rt.synchronize()
                if i >= 3:
                    for part, start, end in zip(parts, marks, marks[1:], strict=False):
                        part.append(
                            start.elapsed_time(end)
                            if rt.device_type == 'cuda'
                            else (end - start) * 1e3
                        )
            forward, backward, step = map(statistics.median, parts)
            ms = statistics.median(map(sum, zip(*parts, strict=True)))
            mfu = peak = '-'
            if rt.peak_flops:
                mfu = f'{gpt.estimate_mfu(batch, ms / 1e3, rt.peak_flops):.1%}'
            if rt.device_type == 'cuda':
                peak = f'{torch.cuda.max_memory_allocated() / 1e9:.1f}'
            speed = batch * block_size / ms * 1e3  # tokens a second
            print(
                f'{name:52}{batch:6}{speed:10,.0f}{100e3 * 491520 / speed / 3600:9,.0f}{mfu:>7}'
                f'{peak:>7}{forward / ms:9.1%}{backward / ms:10.1%}{step / ms:7.1%}',
                flush=True,
            )
            del optimizer  # and with it its moments


def _now(rt):
    if rt.device_type != 'cuda':
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def bench_train():
    """On a GPU the throughput; on the CPU what train.py's loop adds to forward, backward, step."""
    if setup(device).device_type == 'cuda':
        bench_throughput()
    else:
        bench_loop()


def bench_loop():
    """Runs train.py as it is, with a clock at the edges of its forward, backward and step."""
    parts, iterations, last_end = [0.0], [], [None]
    forward, backward = model.GPT.forward, torch.Tensor.backward

    def timed(function):
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            parts[0] += time.perf_counter() - start
            return result

        return wrapper

    def step_starts(*_):
        parts[0] -= time.perf_counter()

    def step_ends(*_):
        now = time.perf_counter()
        parts[0] += now
        if last_end[0] is not None:
            iterations.append((now - last_end[0], parts[0]))
        last_end[0], parts[0] = now, 0.0

    handles = [
        register_optimizer_step_pre_hook(step_starts),
        register_optimizer_step_post_hook(step_ends),
    ]
    model.GPT.forward, torch.Tensor.backward = timed(forward), timed(backward)
    sys.argv = ['train.py', *train_arguments.split()]
    try:
        names = runpy.run_path('train.py', run_name='__main__')
    finally:
        model.GPT.forward, torch.Tensor.backward = forward, backward
        for handle in handles:
            handle.remove()
    if len(iterations) < 20:
        fail(f'{len(iterations)} iterations are too few; raise --max_iters in train_arguments')
    iterations = iterations[10:]  # the first ones warm up
    whole, inside = (statistics.median(x) * 1e3 for x in zip(*iterations, strict=True))
    ratio = statistics.median(whole / inside for whole, inside in iterations)
    print(
        f'\n{train_arguments}\n{_machine(names["rt"])}, median of {len(iterations)} iterations: '
        f'{whole:.2f} ms an iteration, {inside:.2f} ms in forward, backward and step; '
        f'iteration / parts: {ratio:.4f}'
    )


def bench_prepare():
    """From loaded text to files, beside nanoGPT's recipe; the script's memory; and a batch."""
    if not data_files:
        fail('--what=prepare needs --data_files=PATTERN: files with a column or lines of text')
    import datasets
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    from data.openwebtext.prepare import load, prepare
    from data.tokenizers import GPT2Tokenizer
    from data.tokens import TokenData
    from data.writer import cores

    gpt2 = GPT2Tokenizer(bpe_file or None)
    theirs = tiktoken.Encoding(
        'gpt2',
        pat_str=r50k_pat_str,
        mergeable_ranks=gpt2.encoding._mergeable_ranks,
        special_tokens={'<|endoftext|>': gpt2.end},
    )  # tiktoken.get_encoding('gpt2')

    def encode(row):
        ids = [*theirs.encode_ordinary(row['text']), gpt2.end]
        return {'ids': ids, 'len': len(ids)}

    def nanogpt(folder, rows):
        split = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        split['val'] = split.pop('test')
        for name, part in split.map(encode, remove_columns=['text'], num_proc=cores()).items():
            ids = np.memmap(
                folder / f'{name}.bin', np.uint16, 'w+', shape=(int(np.sum(part['len'])),)
            )
            shards, end = min(1024, len(part)), 0
            for i in range(shards):
                shard = np.concatenate(
                    part.shard(shards, i, contiguous=True).with_format('numpy')['ids']
                )
                ids[end : end + len(shard)] = shard
                end += len(shard)
            ids.flush()

    datasets.disable_progress_bars()
    times, same = {'nanoGPT': [], 'ours': []}, True
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for i in range(repeats):
            texts = load(
                folder / f'cache{i}', data_files
            )  # each round its own, or map() finds the last one's results
            rows = datasets.concatenate_datasets(
                [datasets.Dataset.from_file(path) for path in texts.files]
            )
            for name, work in (
                ('nanoGPT', lambda out, rows=rows: nanogpt(out, rows)),
                ('ours', lambda out, texts=texts: prepare(out, texts, gpt2, {})),
            ):
                (folder / name).mkdir(exist_ok=True)
                start, used = time.perf_counter(), _processor_time()
                work(folder / name)
                os.sync()  # what it left to be written is its own, not the next one's
                times[name].append((time.perf_counter() - start, _processor_time() - used))
            same &= all(
                filecmp.cmp(
                    folder / 'nanoGPT' / f'{s}.bin', folder / 'ours' / f'{s}.bin', shallow=False
                )
                for s in ('train', 'val')
            )
            shutil.rmtree(folder / f'cache{i}')
        medians = {
            name: [statistics.median(t) for t in zip(*both, strict=True)]
            for name, both in times.items()
        }
        tokens = TokenData(folder / 'ours').meta['train_tokens']
        print(
            f'{len(texts):,} documents, {tokens / 1e6:.1f} M tokens, {cores()} cores; '
            f'medians of {repeats}'
        )
        for name, (seconds, used) in medians.items():
            print(
                f'{name:8}{seconds:8.2f} s{len(texts) / seconds:10,.0f} documents/s'
                f'{tokens / seconds / 1e6:8.2f} M tokens/s{used:8.2f} s of processor time'
            )
        ratio, of_used = (theirs / ours for theirs, ours in zip(*medians.values(), strict=True))
        print(
            f'ratio {ratio:.2f}, of processor time {of_used:.2f}; '
            f'files byte for byte the same: {"yes" if same else "NO"}'
        )

        # a process begins with the peak of its parent, so a small one stands between
        between = (
            'import os, sys; pid = os.posix_spawn(sys.executable, sys.argv[1:], os.environ); '
            '_, status, usage = os.wait4(pid, 0); '
            'print("the whole script: peak memory", usage.ru_maxrss >> 10, "MB"); sys.exit(status)'
        )
        script = [
            'data/openwebtext/prepare.py',
            f'--data_files={data_files}',
            f'--out_dir={folder / "out"}',
        ]
        script += [f'--bpe_file={bpe_file}'] if bpe_file else []
        subprocess.run([sys.executable, '-c', between, sys.executable, *script], check=True)
        data, batches = TokenData(folder / 'ours', 1024), []
        for i in range(200):
            start = time.perf_counter()
            data.batch('train', 1, i, 12)
            batches.append(time.perf_counter() - start)
        print(f'gathering a batch of 12 x 1024 tokens: {statistics.median(batches) * 1e3:.3f} ms')


def _processor_time():
    """Seconds of processor time of this process and its ended children, finer than os.times()."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _machine(rt):
    if rt.device_type == 'cuda':
        return torch.cuda.get_device_name(rt.device)
    return f'{rt.device}, {torch.get_num_threads()} threads'


{
    'optimizer': bench_optimizer,
    'host': bench_host,
    'train': bench_train,
    'throughput': bench_throughput,
    'prepare': bench_prepare,
}[what]()
