"""Measure what the project claims: the time of an optimizer step, what train.py's loop costs beside its parts, and the
speed and memory of data/openwebtext/prepare.py.

    python bench.py --what=optimizer        GPT-2 124M's tensors, all optimizers, with clipping
    python bench.py --what=train            on the CPU: an iteration of train.py against the parts it is made of
    python bench.py --what=throughput       tokens a second of GPT-2 124M; on a GPU --what=train is this
    python bench.py --what=prepare --data_files=corpus.parquet --bpe_file=gpt2.tiktoken --repeats=3

Everything that is compared runs in this one process, in turns, and the medians are printed: machines are shared and
noisy, ratios within a process are not.
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
from runtime import fail, setup

what = 'optimizer'  # 'optimizer', 'train', 'throughput' or 'prepare'
repeats = 15  # rounds; each runs every contender once
device = 'auto'  # of the tensors
impl = 'auto'  # of this project's optimizers: 'triton', 'torch', or 'auto': 'triton' on a GPU
sizes = '124M'  # the GPT-2s whose tensors are updated: of '124M,350M,774M,1.5B' and, to try things, 'tiny'
batches = '12,32,64'  # throughput: sequences an iteration
block_size = 1024  # throughput: tokens a sequence
grad_clip = 1.0  # total gradient norm to clip to
grad_norm = 10.0  # total gradient norm before clipping; below grad_clip nothing is clipped
train_arguments = 'config/train_char_cpr.py --max_iters=150 --eval_interval=150 --eval_iters=1 --out_dir=out-bench'
data_files = ''  # prepare: local files of text, as data/openwebtext/prepare.py takes them
bpe_file = ''  # prepare: GPT-2's vocabulary, in place of tiktoken's own
# ----
configure(globals())
check(
    globals(),
    {
        'one of optimizer train throughput prepare': 'what',
        '>= 1': 'repeats block_size',
        '>= 0': 'grad_clip grad_norm',
        'one of auto torch triton': 'impl',
    },
)
PAIR = 'clip_grad_norm_ + torch.optim.AdamW(fused=True)'
THEIRS = 'clip_grad_norm_ + pytorch_cpr.AdamCPR'
SIZES = {
    'tiny': (2, 2, 64),
    '124M': (12, 12, 768),
    '350M': (24, 16, 1024),
    '774M': (36, 20, 1280),
    '1.5B': (48, 25, 1600),
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
    """Bytes a second that a copy of 1 GB reads and writes on this device (fastest of five times ten)."""
    x = torch.empty(1 << 28, device=rt.device)
    y = torch.empty_like(x)
    return (
        2 * x.nbytes / min(milliseconds(lambda: y.copy_(x), rt, times=10) for _ in range(5)) * 1e3
    )


def contenders(params):
    """{name: (optimizer over params, bytes a parameter that a step with clipping moves or None, whether it clips)}."""
    common = dict(lr=1e-4, betas=(0.9, 0.95))
    # kappa so low that every bound is active from the first step on
    bound = dict(kappa_init_method='uniform', kappa_init_param=1e-6)
    ours = dict(**common, max_grad_norm=grad_clip, impl=impl)
    matrices = [
        {'params': [p for p in params if p.dim() >= 2]},
        {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0, 'regularize': False},
    ]

    def groups():
        return [dict(group) for group in matrices]

    def torchs(**kind):
        plain = [{k: v for k, v in group.items() if k != 'regularize'} for group in groups()]
        return torch.optim.AdamW(plain, weight_decay=0.1, **common, **kind)

    every = {
        PAIR: (torchs(fused=True), 40, False),
        'clip_grad_norm_ + torch.optim.AdamW(foreach=True)': (torchs(foreach=True), None, False),
        'AdamW': (AdamW(groups(), weight_decay=0.1, **ours), 32, True),
        "AdamCPR, order='before'": (AdamCPR(groups(), **bound, **ours), 32, True),
        "AdamCPR, order='after'": (AdamCPR(groups(), **bound, order='after', **ours), 40, True),
        "AdamWN, order='before'": (AdamWN(groups(), ratio=2.0, order='before', **ours), 32, True),
        "AdamWN, order='after'": (AdamWN(groups(), ratio=2.0, **ours), 40, True),
    }
    try:
        import pytorch_cpr

        every[THEIRS] = (
            pytorch_cpr.AdamCPR(
                [{**group, 'regularize': group.get('regularize', True)} for group in groups()],
                **common,
                **bound,
            ),
            None,
            False,
        )
    except ImportError:
        print('pytorch_cpr is not installed (requirements-dev.txt): left out')
    return every


def bench_optimizer():
    rt = setup(device)
    bandwidth = copy_bandwidth(rt)
    for name in sizes.split(','):
        optimizer_table(name, bandwidth, rt)
        gc.collect()  # the next size needs the memory
        if rt.device_type == 'cuda':
            torch.cuda.empty_cache()


def optimizer_table(size, bandwidth, rt):
    """All contenders on the same weights and gradients, in turns; each has its own state."""
    layers, heads, channels = SIZES[size]
    config = model.GPTConfig(n_layer=layers, n_head=heads, n_embd=channels, bias=True)
    with torch.device(rt.device):
        params = list(model.GPT(config).parameters())
    for p in params:
        p.grad = torch.randn_like(p)
    grads, every = [p.grad for p in params], contenders(params)
    times = {name: [] for name in every}
    in_a_row = (
        1 if rt.device_type == 'cpu' else 10
    )  # on a GPU, so that launching the next hides behind the last
    for i in range(repeats + 1):
        for name, (optimizer, _, clips) in every.items():

            def step(optimizer=optimizer, clips=clips):
                if not clips:
                    torch.nn.utils.clip_grad_norm_(params, grad_clip)
                optimizer.step()

            torch._foreach_mul_(
                grads, grad_norm / torch.nn.utils.get_total_norm(grads).item()
            )  # they are rewritten
            step()  # the others have written the weights: what it knows of their norms it learns here
            if not clips:
                torch._foreach_mul_(grads, grad_norm / torch.nn.utils.get_total_norm(grads).item())
            ms = milliseconds(step, rt, in_a_row)
            if i > 0:
                times[name].append(ms)
    count = sum(p.numel() for p in params)
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    print(
        f'\nGPT-2 {size}: {count / 1e6:.1f}M parameters in {len(params)} tensors, float32, {_machine(rt)}; gradient '
        f'norm {grad_norm:g} clipped to {grad_clip:g}; medians of {repeats} rounds; copy {bandwidth / 1e9:.0f} GB/s'
    )
    print(f'\n{"":52}{"ms":>8}{"fastest":>9}{"ratio":>7}{"bytes":>7}{"of copy":>9}')
    for name, (_, moved, _) in every.items():
        share = (
            f'{moved:7}{moved * count / medians[name] * 1e3 / bandwidth:9.0%}'
            if moved
            else f'{"-":>7}{"-":>9}'
        )
        print(
            f'{name:52}{medians[name]:8.2f}{min(times[name]):9.2f}{medians[name] / medians[PAIR]:7.2f}{share}'
        )


def bench_throughput():
    """Tokens a second of whole iterations, and what the step is of them; the same loop for every optimizer.

    hours: what 100k iterations of config/train_gpt2_*.py, of 491,520 tokens, would take at that speed.
    """
    rt = setup(device, seed=1337)
    layers, heads, channels = SIZES[sizes.split(',')[0]]
    config = model.GPTConfig(n_layer=layers, n_head=heads, n_embd=channels, block_size=block_size)
    print(
        f'GPT-2 {sizes.split(",")[0]}, block {block_size}, {rt.dtype}, {_machine(rt)}, torch {torch.__version__}; '
        f'medians of {repeats} iterations\n\n{"":52}{"batch":>6}{"tokens/s":>10}{"hours":>9}{"mfu":>7}{"GB":>7}'
        f'{"forward":>9}{"backward":>10}{"step":>7}'
    )
    for batch in map(int, batches.split(',')):
        gpt = model.GPT(config).to(rt.device)
        run = torch.compile(gpt) if rt.device_type == 'cuda' else gpt
        x, y = torch.randint(config.vocab_size, (2, batch, block_size), device=rt.device).unbind()
        params = list(gpt.parameters())
        for name in (PAIR, 'AdamW', "AdamCPR, order='before'", "AdamWN, order='after'"):
            optimizer, _, clips = contenders(params)[name]
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
            mfu = (
                f'{gpt.estimate_mfu(batch, ms / 1e3, rt.peak_flops):.1%}' if rt.peak_flops else '-'
            )
            peak = (
                f'{torch.cuda.max_memory_allocated() / 1e9:.1f}'
                if rt.device_type == 'cuda'
                else '-'
            )
            speed = batch * block_size / ms * 1e3  # tokens a second
            print(
                f'{name:52}{batch:6}{speed:10,.0f}{100e3 * 491520 / speed / 3600:9,.0f}{mfu:>7}{peak:>7}'
                f'{forward / ms:9.1%}{backward / ms:10.1%}{step / ms:7.1%}',
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
    """On a GPU the throughput. On the CPU what train.py's loop costs besides its forward, backward and step."""
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
        fail(
            f'{len(iterations)} iterations are too few to measure; raise --max_iters in train_arguments'
        )
    iterations = iterations[10:]  # the first ones warm up
    whole, inside = (statistics.median(x) * 1e3 for x in zip(*iterations, strict=True))
    ratio = statistics.median(whole / inside for whole, inside in iterations)
    print(
        f'\n{train_arguments}\n{_machine(names["rt"])}, median of {len(iterations)} iterations: {whole:.2f} ms an '
        f'iteration, {inside:.2f} ms in forward, backward and step; iteration / parts: {ratio:.4f}'
    )


def bench_prepare():
    """From the loaded text to the files, beside nanoGPT's recipe; then the memory of the whole script, and a batch."""
    if not data_files:
        fail(
            '--what=prepare needs --data_files=PATTERN: local files with a column or lines of text'
        )
    import datasets
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    from data.openwebtext.prepare import load, prepare
    from data.prepare import GPT2Tokenizer, cores
    from data.tokens import TokenData

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
            f'{len(texts):,} documents, {tokens / 1e6:.1f} M tokens, {cores()} cores; medians of {repeats}'
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

        # a process begins with the peak of the one that it comes from, so a small one stands between
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
    """Seconds that this process and its ended children have used; os.times() counts in steps of 10 ms."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _machine(rt):
    if rt.device_type == 'cuda':
        return torch.cuda.get_device_name(rt.device)
    return f'{rt.device}, {torch.get_num_threads()} threads'


{
    'optimizer': bench_optimizer,
    'train': bench_train,
    'throughput': bench_throughput,
    'prepare': bench_prepare,
}[what]()
