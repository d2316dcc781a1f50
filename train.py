"""Train a GPT with AdamW, AdamCPR or AdamWN, on one device or, started by torchrun, on many.

    python train.py config/train_char_cpr.py                     a config file over the defaults
    python train.py config/train_char_cpr.py --max_iters=500     and single settings over that
    python train.py --help                                       all settings
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_cpr.py --init_from=auto

The settings are nanoGPT's, under its names and with its defaults, and those of the optimizers.
out_dir receives ckpt.pt (checkpoint.py) and log.jsonl (runlog.py). With --init_from=auto an
interrupted run resumes exactly where it stopped.
"""

import atexit
import math
import os
import signal
import sys
import time
from itertools import zip_longest

import torch

import checkpoint
import runlog
from configurator import check, configure
from cpr import AdamCPR, AdamW, AdamWN, weight_norms
from data.tokens import TokenData, prefetch, to_device
from model import GPT, GPTConfig
from parallel import device_of_rank, largest_gradients, start
from runtime import fail, setup

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
norm_log_interval = 100  # iterations between two records of every tensor's norm, kappa and lambda
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
# optimizer
optimizer = 'adamw'  # 'adamw', 'adamcpr' (bounds each norm), 'adamwn' (steers it to a target)
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
reg_ema_decay = 0.99  # inflection_point: of the moving average that is looked at
reg_embedding = False  # bound the embeddings too
reg_by_lr = False  # multiply the correction by the learning rate
# AdamWN
wn_ratio = 1.0  # target norm over the norm at the start, reached at the end of the ramp
wn_rate = 1e-2  # k: the share of the way to the target that a step goes
wn_ramp_iters = 2500  # iterations over which the target goes from 1 to wn_ratio
wn_scope = 'tensor'  # steer each tensor's norm, or 'global': the joint norm
wn_from = ''  # out_dir of a finished run: its final ratios, one a tensor, in place of wn_ratio
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
signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is to be saved yet: Ctrl-C ends the process
settings, given = configure(globals())
limits = {
    '>= 1': 'eval_interval keep_checkpoints log_interval norm_log_interval '
    'gradient_accumulation_steps batch_size block_size n_layer n_head n_embd reg_step_size',
    '>= 0': 'eval_iters fsdp_shard_size checkpoint_interval loss_spike max_skipped_steps '
    'max_iters learning_rate min_lr weight_decay grad_clip kappa_init_param kappa_update wn_ratio '
    'wn_ramp_iters warmup_iters lr_decay_iters seed',
    'in [0, 1)': 'dropout beta1 beta2 reg_ema_decay',
    'in [0, 1]': 'wn_rate',
    'one of adamw adamcpr adamwn': 'optimizer',
    'one of auto before after': 'order',
    'one of auto triton numba torch': 'impl',
    'one of inflection_point warm_start uniform dependent': 'kappa_init_method',
    'one of l2 l1 std huber': 'reg_function',
    'one of tensor global': 'wn_scope',
    'one of ddp zero fsdp': 'parallel',
}
check(settings, limits)
if decay_lr and lr_decay_iters < warmup_iters:
    problem = f'lr_decay_iters={lr_decay_iters} ends before warmup_iters={warmup_iters}'
    fail(f'{problem}; raise it, or set decay_lr=False')

rt = setup(device_of_rank(device), dtype, seed)
ranks = start(parallel, rt.device_type)
if sharded_checkpoint and not ranks.engine:
    fail('sharded_checkpoint=True is for several processes; start train.py with torchrun')
# those of this process
micro_steps = ranks.share(gradient_accumulation_steps, 'gradient_accumulation_steps')
if ranks.rank > 0:
    wandb_log = tensorboard_log = False

# ---- the checkpoint to start from
ckpt_path = os.path.join(out_dir, 'ckpt.pt')
is_ckpt = checkpoint.is_at(init_from)
if init_from == 'auto':
    init_from = ranks.ask_first(lambda: 'resume' if checkpoint.all_of(ckpt_path) else 'scratch')
elif is_ckpt and os.path.exists(ckpt_path) and os.path.samefile(init_from, ckpt_path):
    init_from = 'resume'
elif is_ckpt and os.path.dirname(os.path.realpath(init_from)) == os.path.realpath(out_dir):
    problem = f"init_from='{init_from}' lies in out_dir, whose checkpoints a new run replaces"
    fail(f'{problem}; give another --out_dir')


def take_over(source, theirs, *keys):
    """Set the settings `keys` to those of the model in `source`. Fails where others are given."""
    for key in keys:
        value = theirs.get(key, settings[key])
        if key in given and settings[key] != value:
            problem = f'{key}={settings[key]} but {source} has {key}={value}'
            fail(f'{problem}; leave {key} out or start from scratch')
        globals()[key] = settings[key] = value


resumed = None  # the checkpoint that this run continues
if init_from == 'resume' or checkpoint.is_at(init_from):
    intact, damaged = init_from, {}
    if init_from == 'resume':
        intact, damaged = ranks.ask_first(lambda: checkpoint.newest(ckpt_path))
    resumed = checkpoint.load(intact, checked=init_from == 'resume')
    architecture = 'n_layer', 'n_head', 'n_embd', 'bias', 'block_size'
    take_over('the checkpoint', resumed['model_args'], *architecture)
    before = {'optimizer': 'adamw', **resumed['config']}  # nanoGPT has no such setting
    of_state = ['optimizer']  # what the optimizer's state in the checkpoint depends on
    if optimizer == 'adamcpr':
        of_state += ['kappa_init_method', 'reg_function', 'reg_embedding']
        of_state += ['kappa_init_param'] * (kappa_init_method in ('uniform', 'dependent'))
    switched = [key for key in of_state if before.get(key, settings[key]) != settings[key]]
    if switched and not switch_optimizer and not eval_only:
        was, now = (', '.join(f'{key}={c[key]}' for key in switched) for c in (before, settings))
        fail(
            f'the checkpoint was trained with {was}, not {now}: --switch_optimizer=True keeps the '
            f"weights, Adam's moments and the iteration and sets up anew what {optimizer} adds"
        )
elif init_from != 'scratch' and not init_from.startswith('gpt2') and not os.path.isdir(init_from):
    if '/' not in init_from or init_from.endswith('.pt'):  # else it may be a name on the hub
        fail(
            f"init_from='{init_from}' is none of 'scratch', 'resume', 'auto', 'gpt2*', the path "
            'of a checkpoint or of a folder with a GPT-2, or its name on the hub, OWNER/NAME'
        )

# ---- model and data
try:
    if resumed:
        model = GPT(GPTConfig(**{**resumed['model_args'], 'dropout': dropout}))
        if 'model' in resumed:  # a folder has the tensors elsewhere
            model.load_state_dict(resumed['model'])
    elif init_from == 'scratch':
        model = None
    else:
        model = GPT.from_pretrained(init_from, override_args=dict(dropout=dropout))
        if block_size < model.config.block_size:
            model.crop_block_size(block_size)
        block_size = settings['block_size'] = model.config.block_size
        take_over(init_from, model.config.model_args(), 'n_layer', 'n_head', 'n_embd', 'bias')
    vocab_size = model.config.vocab_size if model else None
    data = TokenData(os.path.join('data', dataset), block_size, vocab_size)
    if model is None:
        # GPT-2's 50257 tokens, rounded up to a multiple of 64
        vocab_size = data.meta['vocab_size'] if data.meta else 50304
        sizes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size)
        model = GPT(GPTConfig(vocab_size=vocab_size, dropout=dropout, bias=bias, **sizes))
except (TypeError, ValueError, RuntimeError) as e:  # model_args or weights that do not fit
    fail(e)
compiled = ranks.wrap(model, rt, compile, fsdp_shard_size)
params = dict(model.named_parameters())
init_norms = weight_norms(model)
if resumed:
    known = resumed.get('init_norms', {})
    init_norms.update({name: known[name] for name in init_norms if name in known})
init_norm = math.hypot(*init_norms.values())

# ---- optimizer
final_ratio, final_ratios = wn_ratio, {}  # AdamWN's targets: of all tensors, and of single ones
if wn_from:
    last = next((e for e in reversed(runlog.read(wn_from)) if e.get('kind') == 'norms'), None)
    problem = f'the run in {wn_from}'
    if last is None:
        fail(f'{problem} recorded no norms; train it again with --norm_log_interval=100')
    if last['tensors'].keys() != init_norms.keys():
        fail(f'{problem} has other tensors than this one; train both with the same n_layer')
    final_ratios = {params[name]: last['tensors'][name]['ratio'] for name in init_norms}
    if None in (last['ratio'], *final_ratios.values()):
        fail(f'{problem} ended with norms that are not all finite numbers; take another run')
    if wn_scope == 'global':
        final_ratio, final_ratios = last['ratio'], {}
common = dict(lr=learning_rate, betas=(beta1, beta2), max_grad_norm=grad_clip, impl=impl)
if order != 'auto' and optimizer != 'adamw':
    common['order'] = order
try:
    if optimizer == 'adamw':
        opt = AdamW(model, weight_decay=weight_decay, **common)
    elif optimizer == 'adamcpr':
        opt = AdamCPR(
            model,
            kappa_init_method=kappa_init_method,
            kappa_init_param=kappa_init_param,
            reg_function=reg_function,
            kappa_update=kappa_update,
            reg_step_size=reg_step_size,
            reg_ema_decay=reg_ema_decay,
            reg_embedding=reg_embedding,
            reg_by_lr=reg_by_lr,
            **common,
        )
    else:
        opt = AdamWN(model, rate=wn_rate, ratio=final_ratio, scope=wn_scope, **common)
except ValueError as e:
    fail(e)
scaler = torch.amp.GradScaler(rt.device_type, enabled=rt.dtype == 'float16')
iter_num, best_val_loss = 0, math.inf
if resumed:
    iter_num, best_val_loss = int(resumed['iter_num']), float(resumed['best_val_loss'])
if resumed and 'model' not in resumed:
    import folders  # here, because its import takes a single process long

    resumed['optimizer'] = {'state': folders.read(intact, model)}
if resumed and not eval_only:
    try:
        state = resumed['optimizer']['state']
        if switched:
            kept = 'step', 'exp_avg', 'exp_avg_sq'
            state = {i: {k: s[k] for k in kept} for i, s in state.items()}
        # the state is the checkpoint's, the options are this run's
        opt.load_state_dict({**opt.state_dict(), 'state': state})
    except (KeyError, TypeError, ValueError) as e:
        problem = f'the checkpoint has no optimizer state of this model ({e})'
        fail(f'{problem}; start from scratch, or only sample from it')
    opt.skipped_steps.fill_(resumed.get('skipped_steps', 0))
    if scaler.is_enabled() and resumed.get('scaler'):  # a run in another dtype has none
        scaler.load_state_dict(resumed['scaler'])
if optimizer == 'adamwn' and wn_scope == 'tensor':
    opt.set_ratios(final_ratios)  # not those of the run that is resumed
watch = runlog.Watch(loss_spike, *(resumed or {}).get('loss_average', ()))
resumed = state = None  # frees a copy of the weights and the moments


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


EVAL_SEED = 1 << 40  # above any run's seed: all runs are evaluated on the same batches


@torch.no_grad()
def estimate_loss():
    """Return {split: mean loss a token}, on the same batches for any seed and number of ranks."""
    model.eval()
    losses = {}
    count = eval_iters or math.ceil(len(data.splits['val']) / (batch_size * block_size))
    for split in ('train', 'val'):
        pairs = (data.batch(split, EVAL_SEED, i, batch_size) for i in range(count))
        if split == 'val' and eval_iters == 0:
            pairs = data.sequential('val', batch_size)
        nats, tokens = [], []  # of every batch; 0 nats where another process has it
        # a batch for each rank; in the last round some may have None, and repeat the first
        for batches in zip_longest(*[pairs] * ranks.world_size):
            x, y = to_device(batches[ranks.rank] or batches[0], rt.device)
            with rt.autocast():
                _, loss = compiled(x, y)
            sizes = [y.numel() for _, y in filter(None, batches)]
            nats += [loss.item() * size if i == ranks.rank else 0.0 for i, size in enumerate(sizes)]
            tokens += sizes
        nats = ranks.sum(torch.tensor(nats, dtype=torch.float64))
        losses[split] = nats.sum().item() / sum(tokens)
    model.train()
    return losses


def norms():
    """Return the log's record of every weight tensor: norm, ratio, and AdamCPR's kappa, lambda."""
    tensors = {}
    for name, norm in weight_norms(model).items():
        state = opt.state.get(params[name], {})
        bound = {k: state[k].item() for k in ('kappa', 'lagmul') if k in state}
        ratio = norm / init_norms[name] if init_norms[name] else math.nan
        tensors[name] = dict(norm=norm, ratio=ratio, **bound)
    norm = math.hypot(*(t['norm'] for t in tensors.values()))
    return dict(ratio=norm / init_norm, tensors=tensors)


def save():
    """Write the checkpoint of iteration iter_num in the background, or say why it cannot be."""
    run = {
        'scaler': scaler.state_dict(),
        'model_args': model.config.model_args(),
        'iter_num': iter_num,
        'best_val_loss': best_val_loss,
        'config': settings,
        'init_norms': init_norms,
        'skipped_steps': opt.skipped_steps.item(),
        'loss_average': watch.average,
    }
    state = opt.state_dict()
    try:
        if sharded_checkpoint:
            states = {name: opt.state.get(p, {}) for name, p in params.items()}
            run['param_groups'] = state['param_groups']
            writer.save(folders.tensors(params, states), run)
            return
        tensors = {'model': model.state_dict(keep_vars=True), 'optimizer': state}
        tensors = ranks.gather(tensors)
        if ranks.rank == 0:
            writer.save({**tensors, **run})
    except OSError as e:
        not_saved(e)


def written():
    """Return when the last checkpoint is on the disk."""
    try:
        writer.wait()
    except OSError as e:
        not_saved(e)


def not_saved(reason):
    if ranks.rank > 0:
        sys.exit(2)  # rank 0 prints the error
    problem = f'could not write {writer.path} ({reason}); the checkpoint before it is intact'
    fail(f'{problem}, if any: make room, then resume with --init_from=auto')


# ---- the loop
if eval_only:
    losses = estimate_loss()
    print(f'iteration {iter_num}: train loss {losses["train"]:.4f}, val loss {losses["val"]:.4f}')
    ranks.close()
    sys.exit()

if iter_num >= max_iters > 0:
    at = f'already at iteration {iter_num} of max_iters={max_iters}'
    print(f'{init_from}: {at}, nothing is left to train')
    ranks.close()
    sys.exit()

charts = [runlog.TensorBoard(out_dir, iter_num)] if tensorboard_log else []
if wandb_log:
    charts.append(runlog.WandB(wandb_project, wandb_run_name, settings))

stopped_by = 0


def stop(signum, _):
    """End the run after this iteration, with a checkpoint. A second signal ends it at once."""
    global stopped_by
    stopped_by = signum
    if ranks.world_size == 1:  # torchrun repeats the signals that a terminal or a cluster sends
        signal.signal(signum, signal.SIG_DFL)


# the last is for SLURM's --signal=USR1@180
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
try:
    # a checkpoint from elsewhere has its history elsewhere
    continued_iter = iter_num if init_from == 'resume' else 0
    log = runlog.RunLog(out_dir if ranks.rank == 0 else None, continued_iter, charts)
    if sharded_checkpoint:
        import folders

        writer = folders.Writer(out_dir, keep_checkpoints, ranks.rank)
    else:
        writer = checkpoint.Writer(ckpt_path, keep_checkpoints)
    if ranks.rank == 0 and init_from != 'resume':
        checkpoint.put_aside(ckpt_path)  # else init_from='auto' would take it for this run's
    elif ranks.rank == 0 and damaged:
        checkpoint.put_in_place(ckpt_path, intact, damaged)
        for path, reason in damaged.items():
            print(f'{path} is damaged ({reason}): resumes from the one before it, {intact}')
            log.write('damaged', iter=iter_num, path=path, reason=reason, used=intact)
except OSError as e:
    problem = f"out_dir='{out_dir}' cannot be written ({e.strerror})"
    fail(f'{problem}; choose another with --out_dir=PATH')

sequences = batch_size * gradient_accumulation_steps
parameters = model.get_num_params()
machine = dict(device=rt.device, dtype=rt.dtype, torch=torch.__version__)
log.write('config', config=settings, parameters=parameters, **machine)
print(
    f'{parameters / 1e6:.2f}M parameters, {sequences * block_size:,} tokens an iteration, '
    f'{optimizer} on {rt.device} in {rt.dtype}, from {init_from} at iteration {iter_num}'
)


def micro_batch(i):
    """Return micro-batch i of this process, a part of the batch of iteration i // micro_steps."""
    iteration, part = divmod(i, micro_steps)
    first = (ranks.rank * micro_steps + part) * batch_size
    rows = slice(first, first + batch_size)
    return to_device(data.batch('train', seed, iteration, sequences, rows), rt.device)


batches = prefetch(micro_batch, iter_num * micro_steps)
atexit.register(batches.close)  # its thread must end before the interpreter does
model.train()
timed_from, timed_iter = time.perf_counter(), iter_num
saved_iter = continued_iter
while True:
    finished = iter_num >= max_iters
    save_now = checkpoint_interval > 0 and iter_num % checkpoint_interval == 0
    if iter_num % norm_log_interval == 0 or finished:
        log.write('norms', iter=iter_num, **norms())
    if iter_num % eval_interval == 0 or finished:
        losses = estimate_loss()
        train_loss, val_loss = losses['train'], losses['val']
        print(f'step {iter_num}: train loss {train_loss:.4f}, val loss {val_loss:.4f}', flush=True)
        log.write('eval', iter=iter_num, train_loss=train_loss, val_loss=val_loss)
        best = val_loss < best_val_loss
        best_val_loss = min(best_val_loss, val_loss)
        save_now = save_now or best or always_save_checkpoint
        timed_from, timed_iter = time.perf_counter(), iter_num
    # while steps are skipped the weights may be nan: the checkpoints from before must stay
    if save_now and iter_num > saved_iter and (finished or not watch.in_a_row):
        save()
    if finished:
        break

    lr = learning_rate_at(iter_num)
    for group in opt.param_groups:
        group['lr'] = lr
        if optimizer == 'adamwn':
            group['ramp'] = wn_ramp_at(iter_num)
    loss_sum = 0.0
    for part in range(micro_steps):
        x, y = next(batches)
        if dropout > 0:  # drop the same of a micro-batch after a resume and on any rank
            number = iter_num * gradient_accumulation_steps + ranks.rank * micro_steps + part
            torch.manual_seed((seed + number) % (1 << 63))
        with ranks.micro_step(last=part == micro_steps - 1):
            with rt.autocast():
                _, loss = compiled(x, y)
                loss = loss / micro_steps
            scaler.scale(loss).backward()
        loss_sum = loss_sum + loss.detach()
    scaler.step(opt)  # clips, and skips the step where a gradient is not finite
    scaler.update()

    if iter_num % log_interval == 0:
        loss = ranks.sum(loss_sum).item() / ranks.world_size  # waits for the device
        ms = (time.perf_counter() - timed_from) * 1e3 / (iter_num + 1 - timed_iter)
        tokens_per_s = sequences * block_size / ms * 1e3
        peak = ranks.world_size * (rt.peak_flops or 0)
        mfu = model.estimate_mfu(sequences, ms / 1e3, peak) if peak else None
        grad_norm, skipped = opt.grad_norm.item(), opt.skipped_steps.item()
        entry = dict(loss=loss, lr=lr, grad_norm=grad_norm)
        entry.update(ms=ms, tokens_per_s=tokens_per_s, mfu=mfu, skipped_steps=skipped)
        line = f'iter {iter_num}: loss {loss:.4f}, lr {lr:.2e}, grad norm {grad_norm:.2f}, '
        line += f'{ms:.1f} ms, {tokens_per_s:,.0f} tokens/s' + (f', mfu {mfu:.1%}' if mfu else '')
        if watch.is_spike(loss):
            entry['spike'] = True
            line += ', SPIKE'
        log.write('train', iter=iter_num, **entry)
        print(line, flush=True)
        if 0 < max_skipped_steps <= watch.skipped_in_a_row(iter_num, skipped):
            problem = f'no finite gradient in {max_skipped_steps} steps up to iteration {iter_num}'
            largest = f'the largest: {largest_gradients(model)}'
            fail(f'{problem}; {largest}. Resume with a lower learning_rate')
        timed_from, timed_iter = time.perf_counter(), iter_num + 1
    opt.zero_grad(set_to_none=True)
    iter_num += 1
    stop_now = ranks.max(stopped_by)
    if stop_now and iter_num < max_iters:  # after the last iteration only an evaluation is left
        save()
        written()
        stopped = f'stopped by {signal.Signals(stop_now).name} after iteration {iter_num - 1}'
        print(f'{stopped}: wrote {writer.path}; resume with --init_from=auto', flush=True)
        break

batches.close()
written()
log.close()
ranks.close()
if not finished:
    sys.exit(128 + stop_now)
