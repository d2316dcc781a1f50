"""Train a GPT with AdamW, AdamCPR, AdamWN or AdamH, on one device or, started by torchrun, on many.

    python train.py config/train_char_cpr.py                     a config file over the defaults
    python train.py config/train_char_cpr.py --max_iters=500     and single settings over that
    python train.py --help                                       all settings
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_cpr.py --init_from=auto

The settings are nanoGPT's, with its names and defaults, and those of the optimizers. out_dir gets
ckpt.pt (runtime/checkpoint.py) and log.jsonl (runtime/log.py). --init_from=auto resumes exactly.
"""

import atexit
import math
import os
import signal
import sys

import torch

from configurator import adopt, check, configure
from data.tokens import TokenData, prefetch, to_device
from model import GPT, GPTConfig
from runtime import checkpoint
from runtime.device import setup
from runtime.distributed import device_of_rank, start
from runtime.errors import border_from_here, fail
from runtime.log import Clock, RunLog, Watch, final_ratios
from runtime.norms import largest_gradients, norm_entry, norms_of

# ---- settings: GPT-2 124M on OpenWebText; a config file and --key=value override them
# input and output
out_dir = 'out'  # where ckpt.pt and log.jsonl go
eval_interval = 2000  # iterations between evaluations, each followed by a checkpoint
log_interval = 1  # iterations between two lines of training loss
eval_iters = 200  # batches of each split in an evaluation; 0: all of val.bin, each token once
eval_only = False  # evaluate once and leave, writing nothing
always_save_checkpoint = True  # False: only after the best evaluation so far and when stopped
checkpoint_interval = 0  # iterations between two additional checkpoints; 0: none
sharded_checkpoint = False  # torchrun: write folders ckpt-ITERATION, a file a process, not ckpt.pt
keep_checkpoints = 2  # the newest is ckpt.pt; ckpt.1.pt, ... are used where that is damaged
init_from = 'scratch'  # 'scratch', 'resume', 'auto' (if possible), 'gpt2*', a checkpoint's path
norm_log_interval = 100  # iterations between two records of every matrix's norm, kappa and lambda
loss_spike = 2.0  # the log marks a loss over this multiple of its running average; 0.0: none
max_skipped_steps = 100  # stop after so many steps in a row without a finite gradient; 0: never
# charts
tensorboard_log = False  # also draw the log with TensorBoard: tensorboard --logdir OUT_DIR
wandb_log = False  # also report to Weights & Biases
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data
dataset = 'openwebtext'  # a folder in data/
gradient_accumulation_steps = 5 * 8  # micro-steps an iteration, of all processes together
batch_size = 12  # sequences a micro-step
block_size = 1024  # tokens a sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining, 0.1 and more for finetuning
bias = False  # biases in Linear and LayerNorm layers, as in GPT-2
init_std = 0.02  # standard deviation of the initial weights, as in GPT-2
# optimizer
optimizer = 'adamw'  # 'adamcpr' bounds each weight norm, 'adamwn' steers it, 'adamh' holds it
learning_rate = 6e-4  # the highest of the schedule
max_iters = 600000
weight_decay = 1e-1  # adamw only
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # clip the gradients to this total norm; 0.0 does not
order = 'auto'  # correct 'before' or 'after' the Adam update; 'auto': cpr before, wn after
impl = 'auto'  # 'triton' (GPU), 'numba' (float32 on a CPU), 'torch'; 'auto': the first that fits
switch_optimizer = False  # resume with another optimizer: keep Adam's moments, nothing else
# AdamCPR, under the names of pytorch_cpr.AdamCPR
kappa_init_method = 'inflection_point'  # or 'warm_start', 'uniform', 'dependent': kappa's origin
kappa_init_param = 1000.0  # warm_start: steps; uniform: kappa; dependent: kappa over R at start
reg_function = 'l2'  # what is bounded: 'l2', 'l1', 'std' or 'huber'
kappa_update = 1.0  # mu: how fast lambda follows the violation of the bound
reg_step_size = 200  # inflection_point: steps between two looks at the growth
reg_ema_decay = 0.99  # inflection_point: decay of the average of R
reg_embedding = False  # bound wte, which is also the output layer, and wpe
reg_by_lr = False  # multiply the correction by the learning rate
# AdamWN
wn_ratio = 1.0  # target norm over the norm at the start, reached at the end of the ramp
wn_rate = 1e-2  # k: the share of the way to the target that a step goes
wn_ramp_iters = 2500  # iterations over which the target goes from 1 to wn_ratio
wn_scope = 'tensor'  # steer each tensor's norm, or 'global': the joint norm
wn_vectors = False  # steer LayerNorm weights as well; any optimizer then logs their norms
wn_from = ''  # out_dir of a finished run: its final ratios, one a tensor, in place of wn_ratio
# AdamH
adamh_step_scale = 10.0  # a held tensor's step over its norm, per unit of learning rate
# learning rate schedule
decay_lr = True  # False: learning_rate throughout
warmup_iters = 2000  # linear from near 0
lr_decay_iters = 600000  # where the cosine ends; as long as max_iters, after Chinchilla
min_lr = 6e-5  # the lowest; a tenth of learning_rate, after Chinchilla
# system
parallel = 'ddp'  # torchrun: 'ddp', 'zero' (shard gradients and state), 'fsdp' (parameters too)
fsdp_shard_size = 0  # zero, fsdp: processes that hold one copy, such as a node's; 0: all
device = 'auto'  # 'cuda', 'cuda:1', 'mps', 'cpu'; 'auto' takes the first of them that is there
dtype = 'auto'  # 'float32', 'bfloat16', 'float16'; 'auto': bfloat16 if the GPU has it
compile = True  # torch.compile the model
seed = 1337  # of the initial weights and of the batches
# ----
border_from_here()  # what the system or a file refuses becomes one `error:` line
settings, given = configure(globals())
limits = {  # of the settings, new ones included
    '>= 1': 'eval_interval keep_checkpoints log_interval norm_log_interval '
    'gradient_accumulation_steps batch_size block_size n_layer n_head n_embd reg_step_size',
    '> 0': 'init_std',
    '>= 0': 'eval_iters fsdp_shard_size checkpoint_interval loss_spike max_skipped_steps '
    'max_iters learning_rate min_lr weight_decay grad_clip kappa_init_param kappa_update '
    'wn_ratio wn_ramp_iters adamh_step_scale warmup_iters lr_decay_iters seed',
    'in [0, 1)': 'dropout beta1 beta2 reg_ema_decay',
    'in [0, 1]': 'wn_rate',
    'one of adamw adamcpr adamwn adamh': 'optimizer',
    'one of auto before after': 'order',
    'one of auto triton numba torch': 'impl',
    'one of inflection_point warm_start uniform dependent': 'kappa_init_method',
    'one of l2 l1 std huber': 'reg_function',
    'one of tensor global': 'wn_scope',
    'one of ddp zero fsdp': 'parallel',
}
check(settings, limits)
if decay_lr and lr_decay_iters < warmup_iters:
    fail(f'{lr_decay_iters=} ends before {warmup_iters=}; raise it, or set decay_lr=False')

# ---- device, processes, and where to start from
rt = setup(device_of_rank(device), dtype, seed)
ranks = start(parallel, rt.device_type)
micro_steps = ranks.divide(gradient_accumulation_steps, 'gradient_accumulation_steps')
if sharded_checkpoint and not ranks.engine:
    fail('sharded_checkpoint=True is for several processes; start train.py with torchrun')
init_from, resume_path, damaged = checkpoint.find(init_from, out_dir, ranks)

# ---- model and data
model, saved = None, None  # saved: what the checkpoint to start from holds
if resume_path:
    saved = checkpoint.load(resume_path, checked=init_from == 'resume')
    adopt(settings, given, saved['model_args'], 'the checkpoint')
    model = checkpoint.model_of(saved, dropout=dropout)
elif init_from != 'scratch':
    model = GPT.from_pretrained(init_from, override_args=dict(dropout=dropout))
    model.crop_block_size(min(block_size, model.config.block_size))
    adopt(settings, given, model.config.model_args(), init_from)
block_size = settings['block_size']

data = TokenData(os.path.join('data', dataset), block_size, model and model.config.vocab_size)
if init_from == 'scratch':
    sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size)
    sizes.update(vocab_size=data.vocab_size, bias=bias)
    model = GPT(GPTConfig(dropout=dropout, **sizes), init_std)

compiled = ranks.wrap(model, rt, compile, fsdp_shard_size)  # the gradients stay with `model`
weights = model.weights(wn_vectors)  # whose norms are logged
init_norms = norms_of(weights)

# ---- optimizer, and what a checkpoint says of it
wn_ratios = {}  # AdamWN's targets of single tensors
if wn_from:
    wn_ratio, ratios = final_ratios(wn_from, init_norms)
    if wn_scope == 'tensor':
        wn_ratios = {weights[name]: ratio for name, ratio in ratios.items()}
opt = model.configure_optimizer(settings, wn_ratio)
scaler = torch.amp.GradScaler(rt.device_type, enabled=rt.dtype == 'float16')
watch = Watch(loss_spike)
iter_num, best_val_loss, loss_sum = 0, math.inf, torch.zeros(())
if saved:
    iter_num, best_val_loss = int(saved['iter_num']), float(saved['best_val_loss'])
    init_norms.update(saved.get('init_norms', {}))  # of the run's start, not of this resume
    watch.average = saved.get('loss_average', watch.average)
    checkpoint.read_shards(saved, resume_path, model)
    if not eval_only:
        checkpoint.restore(saved, settings, opt, scaler)
    saved = None  # frees a copy of the weights and the moments
if optimizer == 'adamwn' and wn_scope == 'tensor':
    opt.set_ratios(wn_ratios)  # not those of the run that is resumed


# ---- schedules, evaluation, checkpoints, batches
def learning_rate_at(iteration):
    """Linear warm-up, then a cosine down to min_lr."""
    if not decay_lr:
        return learning_rate
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    if iteration >= lr_decay_iters:
        return min_lr
    done = (iteration - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (learning_rate - min_lr)


def wn_ramp_at(iteration):
    """AdamWN's way from the norm at the start to the target, in [0, 1] (arXiv 2311.11446, 4)."""
    return min(1.0, (iteration + 1) / max(wn_ramp_iters, 1))


@torch.no_grad()
def estimate_loss():
    """Return the mean loss a token of both splits, on the same batches for any seed and world."""

    def loss_of(x, y):
        x, y = to_device((x, y), rt.device)
        with rt.autocast():
            return compiled(x, y)[1]

    model.eval()
    batches = [data.evaluation(split, batch_size, eval_iters) for split in ('train', 'val')]
    losses = [ranks.mean_loss(each, loss_of) for each in batches]
    model.train()
    return losses


def save():
    """Write the checkpoint of iteration iter_num in the background."""
    run = dict(iter_num=iter_num, best_val_loss=best_val_loss, config=settings)
    writer.save(model, opt, scaler, init_norms=init_norms, loss_average=watch.average, **run)


def micro_batch(i):
    """Return micro-batch i of this process, a part of the batch of iteration i // micro_steps."""
    iteration, micro_step = divmod(i, micro_steps)
    first = (ranks.rank * micro_steps + micro_step) * batch_size
    rows = slice(first, first + batch_size)
    return to_device(data.batch('train', seed, iteration, sequences, rows), rt.device)


# ---- nothing to train
nothing_left = iter_num >= max_iters > 0
if eval_only:
    train_loss, val_loss = estimate_loss()
    print(f'iteration {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}')
elif nothing_left:
    print(f'{init_from}: already at iteration {iter_num} of {max_iters=}, nothing is left to train')
if eval_only or nothing_left:
    ranks.close()
    sys.exit()

# ---- log and checkpoints
ranks.catch_signals()  # from now on a signal ends the run after an iteration, with a checkpoint
first_iter = iter_num if init_from == 'resume' else 0  # another run's history is elsewhere
log = RunLog(settings, first_iter, writes=ranks.rank == 0)
writer = checkpoint.Writer(out_dir, keep_checkpoints, ranks, sharded_checkpoint)
if ranks.rank == 0 and init_from != 'resume':
    checkpoint.put_aside(writer.path)  # else init_from='auto' would take it for this run's
elif ranks.rank == 0 and damaged:
    checkpoint.put_in_place(writer.path, resume_path, damaged)
    for path, reason in damaged.items():
        log.write('damaged', iter=iter_num, path=path, reason=reason, used=resume_path)

sequences = batch_size * gradient_accumulation_steps
parameters = model.get_num_params()
machine = dict(device=rt.device, dtype=rt.dtype, torch=torch.__version__)
log.write('config', config=settings, parameters=parameters, **machine)
ranks.say(
    f'{parameters / 1e6:.2f}M parameters, {sequences * block_size:,} tokens an iteration, '
    f'{optimizer} on {rt.device} in {rt.dtype}, from {init_from} at iteration {iter_num}'
)

# ---- the loop
batches = prefetch(micro_batch, iter_num * micro_steps)
atexit.register(batches.close)  # its thread must end before the interpreter does
model.train()
clock = Clock(iter_num, max_iters, eval_interval)
while True:
    # evaluate, save
    finished = iter_num >= max_iters
    save_now = checkpoint_interval > 0 and iter_num % checkpoint_interval == 0
    if iter_num % eval_interval == 0 or finished:
        with clock.evaluation(iter_num):
            train_loss, val_loss = estimate_loss()
        ranks.say(f'step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}')
        log.write('eval', iter=iter_num, train_loss=train_loss, val_loss=val_loss)
        save_now = save_now or val_loss < best_val_loss or always_save_checkpoint
        best_val_loss = min(best_val_loss, val_loss)
    # checkpoints from before the run broke down must stay
    if save_now and iter_num > first_iter and (finished or ranks.all_finite(model, loss_sum)):
        save()
    if finished:
        log.write('norms', iter=iter_num, **norm_entry(opt, weights, init_norms))
        break

    # schedules
    lr = learning_rate_at(iter_num)
    for group in opt.param_groups:
        group['lr'] = lr
        if optimizer == 'adamwn':
            group['ramp'] = wn_ramp_at(iter_num)

    # forward, backward, step
    loss_sum = 0.0
    for micro_step in range(micro_steps):
        x, y = next(batches)
        if dropout > 0:  # drop the same of a micro-batch after a resume and on any rank
            number = iter_num * gradient_accumulation_steps + ranks.rank * micro_steps + micro_step
            torch.manual_seed((seed + number) % (1 << 63))
        with ranks.micro_step(last=micro_step == micro_steps - 1):
            with rt.autocast():
                _, loss = compiled(x, y)
                loss = loss / micro_steps
            scaler.scale(loss).backward()
        loss_sum = loss_sum + loss.detach()
    if iter_num % norm_log_interval == 0:
        old_weights = {name: p.detach().clone() for name, p in weights.items()}
    scaler.step(opt)  # clips; skips gradients that are not finite; leaves alone what has none
    scaler.update()

    # log
    if iter_num % norm_log_interval == 0:
        log.write('norms', iter=iter_num, **norm_entry(opt, weights, init_norms, old_weights))
        del old_weights
    if iter_num % log_interval == 0:
        loss = ranks.sum(loss_sum).item() / ranks.world_size  # waits for the device
        ms = clock.lap(iter_num + 1) * 1e3
        tokens_per_s = sequences * block_size / ms * 1e3
        peak = ranks.world_size * (rt.peak_flops or 0)
        mfu = model.estimate_mfu(sequences, ms / 1e3, peak) if peak else None
        grad_norm, skipped = opt.grad_norm.item(), opt.skipped_steps.item()
        entry = dict(loss=loss, lr=lr, grad_norm=grad_norm, ms=ms)
        entry.update(tokens_per_s=tokens_per_s, mfu=mfu, skipped_steps=skipped)
        line = f'iter {iter_num}: loss {loss:.4f}, lr {lr:.2e}, grad norm {grad_norm:.2f}, '
        line += f'{ms:.1f} ms, {tokens_per_s:,.0f} tokens/s' + (f', mfu {mfu:.1%}' if mfu else '')
        if watch.is_spike(loss):
            entry['spike'] = True
            line += ', SPIKE'
        log.write('train', iter=iter_num, **entry)
        ranks.say(f'{line}, {clock.left()}')
        if 0 < max_skipped_steps <= watch.skipped_in_a_row(iter_num, skipped):
            problem = f'no finite gradient in {max_skipped_steps} steps up to iteration {iter_num}'
            remedy = 'resume with a lower learning_rate'
            fail(f'{problem}; the largest: {largest_gradients(model)}; {remedy}')
    opt.zero_grad(set_to_none=True)
    iter_num += 1

    # stop on a signal; after the last iteration only an evaluation is left
    stop_signal = ranks.stop_signal()
    if stop_signal and iter_num < max_iters:
        if sound := ranks.all_finite(model, loss_sum):
            save()
        break

# ---- the end
batches.close()
writer.wait()
log.close()
ranks.close()
if not finished:
    stopped = f'stopped by {signal.Signals(stop_signal).name} after iteration {iter_num - 1}'
    written = writer.path if sound else 'no checkpoint, since the loss or a weight is not finite'
    ranks.say(f'{stopped}: wrote {written}; resume with --init_from=auto')
    sys.exit(128 + stop_signal)
