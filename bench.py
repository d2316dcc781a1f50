"""Measure what the project claims: the time of an optimizer step, and what train.py's loop costs beside its parts.

    python bench.py --what=optimizer        GPT-2 124M's tensors, all optimizers, with clipping
    python bench.py --what=train            an iteration of train.py against the forward, backward and step in it

Everything that is compared runs in this one process, in turns, and the medians are printed: machines are shared and
noisy, ratios within a process are not.
"""

import runpy
import statistics
import sys
import time

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import model
from configurator import check, configure
from cpr import AdamCPR, AdamW, AdamWN
from runtime import fail, setup

what = 'optimizer'  # 'optimizer' or 'train'
repeats = 15  # rounds; each runs every contender once
device = 'auto'  # of the optimizer's tensors
size = '124M'  # of the GPT-2 whose tensors are updated: '124M', '350M', '774M', '1.5B'
grad_clip = 1.0  # total gradient norm to clip to
grad_norm = 10.0  # total gradient norm before clipping; below grad_clip nothing is clipped
train_arguments = 'config/train_char_cpr.py --max_iters=150 --eval_interval=150 --eval_iters=1 --out_dir=out-bench'
# ----
configure(globals())
check(globals(), {'one of optimizer train': 'what', 'one of 124M 350M 774M 1.5B': 'size', '>= 1': 'repeats',
                  '>= 0': 'grad_clip grad_norm'})  # fmt: skip
PAIR = 'clip_grad_norm_ + torch.optim.AdamW(fused=True)'
THEIRS = 'clip_grad_norm_ + pytorch_cpr.AdamCPR'
SIZES = {'124M': (12, 12, 768), '350M': (24, 16, 1024), '774M': (36, 20, 1280), '1.5B': (48, 25, 1600)}


def milliseconds(step, rt):
    """Wall time of one call, with everything done that it started."""
    rt.synchronize()
    start = time.perf_counter()
    step()
    rt.synchronize()
    return (time.perf_counter() - start) * 1e3


def bench_optimizer():
    rt = setup(device)
    layers, heads, channels = SIZES[size]
    config = model.GPTConfig(n_layer=layers, n_head=heads, n_embd=channels, bias=True)
    betas = (0.9, 0.95)
    # kappa so low that every bound is active from the first step on
    bound = dict(lr=1e-4, betas=betas, kappa_init_method='uniform', kappa_init_param=1e-6)
    ours = dict(lr=1e-4, betas=betas, max_grad_norm=grad_clip)
    contenders = {
        PAIR: lambda gpt: torch.optim.AdamW(gpt.parameters(), lr=1e-4, betas=betas, weight_decay=0.1, fused=True),
        'AdamW': lambda gpt: AdamW(gpt, weight_decay=0.1, **ours),
        "AdamCPR, order='before'": lambda gpt: AdamCPR(gpt, **bound, max_grad_norm=grad_clip),
        "AdamCPR, order='after'": lambda gpt: AdamCPR(gpt, **bound, order='after', max_grad_norm=grad_clip),
        "AdamWN, order='before'": lambda gpt: AdamWN(gpt, ratio=2.0, order='before', **ours),
        "AdamWN, order='after'": lambda gpt: AdamWN(gpt, ratio=2.0, **ours),
    }
    try:
        import pytorch_cpr
        contenders[THEIRS] = lambda gpt: pytorch_cpr.AdamCPR(gpt, **bound)
    except ImportError:
        print('pytorch_cpr is not installed (requirements-dev.txt): left out')

    steps, grads = {}, {}
    for name, make in contenders.items():
        gpt = model.GPT(config).to(rt.device)
        params = list(gpt.parameters())
        for p in params:
            p.grad = torch.randn_like(p)
        opt = make(gpt)
        clip = [torch.nn.utils.clip_grad_norm_] if name in (PAIR, THEIRS) else []

        def step(opt=opt, params=params, clip=clip):
            for clip_grad_norm_ in clip:
                clip_grad_norm_(params, grad_clip)
            opt.step()

        steps[name], grads[name] = step, [p.grad for p in params]
    times = {name: [] for name in steps}
    for i in range(repeats + 2):
        for name, step in steps.items():
            current = torch.nn.utils.get_total_norm(grads[name]).item()
            torch._foreach_mul_(grads[name], grad_norm / current)  # clip_grad_norm_ has rewritten them
            ms = milliseconds(step, rt)
            if i >= 2:  # the first two rounds allocate the state and warm up
                times[name].append(ms)
    count = sum(p.numel() for p in params)
    print(f'GPT-2 {size}: {count / 1e6:.1f}M parameters in {len(params)} tensors, float32, {_machine(rt)}; gradient '
          f'norm {grad_norm:g} clipped to {grad_clip:g}; medians of {repeats} interleaved steps')  # fmt: skip
    first = statistics.median(next(iter(times.values())))
    print(f'\n{"":48}{"ms":>8}{"fastest":>9}{"ratio":>7}')
    for name, ms in times.items():
        print(f'{name:48}{statistics.median(ms):8.1f}{min(ms):9.1f}{statistics.median(ms) / first:7.2f}')


def bench_train():
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

    handles = [register_optimizer_step_pre_hook(step_starts), register_optimizer_step_post_hook(step_ends)]
    model.GPT.forward, torch.Tensor.backward = timed(forward), timed(backward)
    sys.argv = ['train.py', *train_arguments.split()]
    try:
        names = runpy.run_path('train.py', run_name='__main__')
    finally:
        model.GPT.forward, torch.Tensor.backward = forward, backward
        for handle in handles:
            handle.remove()
    if names['rt'].device_type != 'cpu':
        fail('--what=train measures the CPU only: on an accelerator the parts run on after their calls return')
    if len(iterations) < 20:
        fail(f'{len(iterations)} iterations are too few to measure; raise --max_iters in train_arguments')
    iterations = iterations[10:]  # the first ones warm up
    whole, inside = (statistics.median(x) * 1e3 for x in zip(*iterations, strict=True))
    ratio = statistics.median(whole / inside for whole, inside in iterations)
    print(f'\n{train_arguments}\n{_machine(names["rt"])}, median of {len(iterations)} iterations: {whole:.2f} ms an '
          f'iteration, {inside:.2f} ms in forward, backward and step; iteration / parts: {ratio:.4f}')  # fmt: skip


def _machine(rt):
    if rt.device_type == 'cuda':
        return torch.cuda.get_device_name(rt.device)
    return f'{rt.device}, {torch.get_num_threads()} threads'


{'optimizer': bench_optimizer, 'train': bench_train}[what]()
