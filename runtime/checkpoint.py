"""Write and read ckpt.pt. The file is complete at any moment, even if the process is killed.

Older checkpoints stand beside it: ckpt.1.pt is the youngest of them, ckpt.2.pt the next. In their
place may be folders, which sharded_checkpoint.py writes.
"""

import math
import os
import pickle
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from textwrap import shorten

import torch

from model import GPT, GPTConfig
from runtime import log as runlog
from runtime import sharded_checkpoint
from runtime.errors import fail
from runtime.files import flush, remove, replacing

MOMENTS = 'exp_avg', 'exp_avg_sq'


def save(path, checkpoint, keep=None):
    """Write `checkpoint` to `path`, or leave `path` as it is.

    checkpoint: a dict that torch.load(weights_only=True) accepts.
    keep: the number of checkpoints to keep, this one included. None leaves older files alone.
    Raises OSError if the file cannot be written.
    """
    with replacing(path) as temporary:
        try:
            with open(temporary, 'wb') as f:
                torch.save(checkpoint, f)
        except RuntimeError as e:  # torch's zip writer wraps what the disk said
            raise OSError(str(e).splitlines()[0]) from e
        if keep is not None:
            flush(temporary)  # before an older one goes
            _move_on(path, keep)


def _older(path, i):
    stem, extension = os.path.splitext(path)
    return f'{stem}.{i}{extension}' if i else path


def _before(path):
    """Return (number, file) of each checkpoint before `path`, the youngest first.

    The numbers run from 1 with gaps of at most one, which a kill in _move_on leaves.
    A file beyond a larger gap, such as ckpt.5000.pt, belongs to the user.
    """
    found, i = [], 1
    while any(os.path.exists(_older(path, j)) for j in (i, i + 1)):
        if os.path.exists(_older(path, i)):
            found.append((i, _older(path, i)))
        i += 1
    return found


def _move_on(path, keep):
    """Rename ckpt.1.pt to ckpt.2.pt and so on, and link ckpt.pt as ckpt.1.pt.

    A link, because ckpt.pt must exist at any moment.
    """
    for i, old in reversed(_before(path)):
        if i >= keep:  # left from a run that kept more
            os.unlink(old)
        elif i + 1 < keep:
            os.replace(old, _older(path, i + 1))
    if keep > 1 and os.path.exists(path):
        link = f'{path}.link'
        remove(link)  # a kill leaves it
        try:
            os.link(path, link)
            os.replace(link, _older(path, 1))
            remove(link)  # os.replace leaves it if ckpt.1.pt is a link to ckpt.pt already
        except OSError:  # a file system without links
            with replacing(_older(path, 1)) as temporary:
                shutil.copyfile(path, temporary)


class Writer:
    """Write a run's checkpoints in the background, and keep the last `keep` of them.

    They are files, out_dir/ckpt.pt, or with `sharded` folders, out_dir/ckpt-ITERATION. Every rank
    must construct it and call its methods. Both fail if the previous checkpoint, or this one, could
    not be written.
    """

    def __init__(self, out_dir, keep, ranks, sharded=False):
        self.out_dir, self.keep, self.ranks, self.pending = out_dir, keep, ranks, None
        self.path = os.path.join(out_dir, 'ckpt.pt')
        self.pool = ThreadPoolExecutor(1, thread_name_prefix='checkpoint')
        # the writing threads need a group that training does not use
        self.group = torch.distributed.new_group(backend='gloo') if sharded else None

    def save(self, model, opt, scaler, **run):
        """Copy the tensors to host memory, then write them and `run` in the background.

        run: iter_num, best_val_loss, config, init_norms, loss_average.
        """
        self.wait()
        run |= {'model_args': model.config.model_args(), 'scaler': scaler.state_dict()}
        run['skipped_steps'] = opt.skipped_steps.item()
        state, is_first = opt.state_dict(), self.ranks.rank == 0
        if self.group is None:
            tensors = {'model': model.state_dict(keep_vars=True), 'optimizer': state}
            tensors = self.ranks.gather(tensors)
            if is_first:
                self.pending = self.pool.submit(save, self.path, {**tensors, **run}, self.keep)
            return
        self.path = os.path.join(self.out_dir, f'ckpt-{run["iter_num"]:06d}')
        try:
            if is_first:
                remove(self.path)  # left by an interrupted save
                os.makedirs(self.path)
                run = {**run, 'param_groups': state['param_groups']}
                save(os.path.join(self.path, sharded_checkpoint.RUN), run)
            states = state['state']
            self.pending = sharded_checkpoint.save(self.path, model, states, self.group)
        except OSError as e:
            self._fail(e)

    def wait(self):
        """Return when the last checkpoint is on the disk."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            if self.group is None:
                return pending.result()
            sharded_checkpoint.finish(pending)
            if self.ranks.rank == 0:
                for old in sharded_checkpoint.folders(self.out_dir)[self.keep :]:
                    remove(old)
        except OSError as e:
            self._fail(e)

    def _fail(self, reason):
        if self.ranks.rank > 0:
            sys.exit(2)  # rank 0 prints the error
        problem = f'could not write {self.path} ({reason}); the checkpoint before it is intact'
        fail(f'{problem}, if any: make room, then resume with --init_from=auto')


def all_of(path):
    """Return all checkpoints of a run, files and folders, the newest first.

    path: the run's newest file.
    """
    files = [f for f in (path, *(old for _, old in _before(path))) if os.path.isfile(f)]
    folders = sharded_checkpoint.folders(os.path.dirname(path))
    if files and folders:
        completed = os.path.getmtime(os.path.join(folders[0], '.metadata'))
        if completed < os.path.getmtime(files[0]):
            return files + folders
    return folders + files


def of_run(out_dir):
    """Return the path of a run's newest checkpoint, which need not be there."""
    newest_file = os.path.join(out_dir, 'ckpt.pt')
    return next(iter(all_of(newest_file)), newest_file)


def find(init_from, out_dir, ranks):
    """Return (init_from, path, damaged): what a run starts from.

    init_from: the setting. 'auto' becomes 'resume' or 'scratch', out_dir's own ckpt.pt 'resume'.
    path: the checkpoint to read, None if the run does not start from one.
    damaged: {newer checkpoint of the run: why it cannot be used}. Prints each.
    Fails if there is nothing to start from.
    """
    own, given = os.path.join(out_dir, 'ckpt.pt'), is_at(init_from)
    if init_from == 'auto':
        init_from = ranks.from_rank0(lambda: 'resume' if all_of(own) else 'scratch')
    elif given and os.path.exists(own) and os.path.samefile(init_from, own):
        init_from = 'resume'
    elif given and os.path.dirname(os.path.realpath(init_from)) == os.path.realpath(out_dir):
        problem = f"init_from='{init_from}' lies in out_dir, whose checkpoints a new run replaces"
        fail(f'{problem}; give another --out_dir')
    if init_from == 'resume':
        path, damaged = ranks.from_rank0(lambda: newest(own))
        for newer, reason in damaged.items():
            print(f'{newer} is damaged ({reason}): starts from the one before it, {path}')
        return 'resume', path, damaged
    if given:
        return init_from, init_from, {}
    is_gpt2 = init_from.startswith('gpt2') or os.path.isdir(init_from)
    on_hub = '/' in init_from and not init_from.endswith('.pt')
    if not (init_from == 'scratch' or is_gpt2 or on_hub):
        fail(
            f"init_from='{init_from}' is none of 'scratch', 'resume', 'auto', 'gpt2*', the path "
            'of a checkpoint or of a folder with a GPT-2, or its name on the hub, OWNER/NAME'
        )
    return init_from, None, {}


def newest(path):
    """Return (a run's newest intact checkpoint, {newer checkpoint: why it cannot be used}).

    Reads each file through, because torch.load does not verify the checksums of tensors.
    Fails if every checkpoint is damaged.
    """
    reasons = {}
    for candidate in all_of(path):
        reason = damage(candidate)
        if reason is None:
            return candidate, reasons
        reasons[candidate] = reason
    if reasons:
        fail(_unreadable(*next(iter(reasons.items()))))
    return path, {}  # there is no checkpoint: load() says so


def _unreadable(path, reason):
    problem = f'{path} is not a readable checkpoint, it may be cut off ({reason})'
    return f'{problem}; restore it or start anew'


def damage(path):
    """Return why the checkpoint at `path` cannot be used, or None.

    Reads a file through. Of a folder's tensor files it checks only the lengths.
    """
    run, reason = '', None
    if os.path.isdir(path):
        run, reason = f'{sharded_checkpoint.RUN}: ', sharded_checkpoint.damage(path)
        path = os.path.join(path, sharded_checkpoint.RUN)
    if reason:
        return reason
    try:
        with zipfile.ZipFile(path) as z:
            broken = z.testzip()
        return broken and f'{run}{broken} in it does not have the checksum that was written'
    except Exception as e:  # what zipfile raises depends on where the damage is
        return run + (str(e) or type(e).__name__)


def put_aside(path):
    """Make room for another run: the newest checkpoint and the log become NAME.old.

    The other checkpoints are deleted. The log of a run that left no checkpoint is overwritten if
    log.jsonl.old is that of an earlier run.
    """
    checkpoints, log = all_of(path), os.path.join(os.path.dirname(path), runlog.NAME)
    moved = checkpoints[:1]
    if os.path.exists(log) and (checkpoints or not os.path.exists(f'{log}.old')):
        moved.insert(0, log)
    for name in moved:
        remove(f'{name}.old')
        os.replace(name, f'{name}.old')
    for old in checkpoints[1:]:
        remove(old)


def put_in_place(path, used, damaged):
    """Make `used` the newest checkpoint and rename each of `damaged` to NAME.damaged.

    If `used` is a file it becomes `path`.
    """
    for name in damaged:
        remove(f'{name}.damaged')
        os.replace(name, f'{name}.damaged')
    if os.path.isfile(used):
        os.replace(used, path)


def is_at(path):
    """Return whether `path` is a file or a checkpoint folder."""
    run = os.path.join(path, sharded_checkpoint.RUN)
    return os.path.isfile(path) or os.path.isfile(run)


def load(path, checked=False):
    """Return the dict that save() or nanoGPT wrote.

    Of a folder the dict lacks 'model' and 'optimizer': read_shards() reads these tensors.
    checked: newest() has found the checkpoint intact.
    Fails if there is no checkpoint, or it is damaged or holds what no trainer writes.
    """
    if not is_at(path):
        fail(f'there is no checkpoint at {path}; train one first, or give the path of another')
    reason = None if checked else damage(path)
    if reason:
        fail(_unreadable(path, reason))
    file = os.path.join(path, sharded_checkpoint.RUN) if os.path.isdir(path) else path
    try:
        checkpoint = torch.load(file, map_location='cpu', weights_only=True)
    except Exception as e:  # its type depends on where the damage is
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        if isinstance(e, pickle.UnpicklingError):  # torch's message advises weights_only=False
            reason = 'it does not hold what torch.save writes of tensors'
        fail(_unreadable(path, reason))
    reason = _wrong_in(checkpoint, tensors=file == path)
    if reason:
        fail(f'{path} {reason}: it is not a checkpoint of train.py, or it is damaged')
    if 'model' in checkpoint:  # nanoGPT may save the names of the compiled model
        model = checkpoint['model'].items()
        checkpoint['model'] = {name.removeprefix('_orig_mod.'): x for name, x in model}
    return checkpoint


def _number(x):
    """Return the number that x is or, as a tensor, holds; nan for anything else."""
    x = x.item() if torch.is_tensor(x) and x.numel() == 1 else x
    return x if isinstance(x, (int, float)) else math.nan


def _is_count(x):
    return isinstance(_number(x), int) and 0 <= _number(x) < 1 << 63


def _are_finite(numbers):
    return all(0 <= _number(x) < math.inf for x in numbers)


SCALER = {'scale', 'growth_factor', 'backoff_factor', 'growth_interval', '_growth_tracker'}
RIGHT = {  # what the entries of a checkpoint must be; an exception says no too
    'model_args': lambda x: all(isinstance(name, str) for name in x.keys()),
    'config': lambda x: all(isinstance(name, str) for name in x.keys()),
    'model': lambda x: all(map(torch.is_tensor, x.values())),
    'optimizer': lambda x: all(isinstance(state, dict) for state in x.get('state', {}).values()),
    'iter_num': _is_count,
    'best_val_loss': lambda x: _number(x) >= 0,
    'init_norms': lambda x: _are_finite(x.values()),
    'skipped_steps': _is_count,
    'loss_average': lambda x: len(x) == 2 and _are_finite(x),
    'scaler': lambda x: x == {} or (x.keys() == SCALER and _are_finite(x.values())),
}


def _wrong_in(checkpoint, tensors):
    """Return what in a checkpoint no run can go on from, or None. tensors: it must have a model."""
    wanted = {'model_args', 'iter_num', 'best_val_loss', 'config', *['model'] * tensors}
    if not isinstance(checkpoint, dict) or wanted - checkpoint.keys():
        return f'lacks {", ".join(sorted(wanted - {*checkpoint}))}'
    for key in RIGHT.keys() & checkpoint.keys():
        try:
            right = RIGHT[key](checkpoint[key])
        except (AttributeError, KeyError, TypeError):
            right = False
        if not right:
            return f'has a wrong {key}'
    for i, state in checkpoint.get('optimizer', {}).get('state', {}).items():
        shape = getattr(state.get('exp_avg'), 'shape', None)
        missing = dict.fromkeys(MOMENTS if 'step' in state else ())
        for key, x in {**missing, **state}.items():
            if not _fits(key, x, shape):
                return f'has a wrong {key} of parameter {i}'
    return None


def _fits(key, x, shape):
    """Return whether x can be entry `key` of the state of a parameter of this shape."""
    if key == 'step' and not _are_finite([x]):
        return False
    if torch.is_tensor(x):
        return x.shape == shape or x.numel() == 1
    return key not in MOMENTS


def model_of(saved, **args):
    """Return the GPT of a checkpoint; `args` replace its model_args.

    Of a folder the weights are still to be read. Fails if they do not fit.
    """
    try:
        model = GPT(GPTConfig(**{**saved['model_args'], **args}))
        if 'model' in saved:
            model.load_state_dict(saved['model'])
    except (TypeError, ValueError, RuntimeError) as e:
        reason = shorten(str(e), 160)  # torch lists every tensor that does not fit
        problem = f'the checkpoint does not hold a model of this program ({reason})'
        fail(f'{problem}; use the program that trained it')
    return model


def load_model(path):
    """Return the GPT of the checkpoint at `path`, and the dict of all that ckpt.pt holds but it.

    Fails if the checkpoint cannot be read or does not fit a GPT.
    """
    saved = load(path)
    model = model_of(saved)
    read_shards(saved, path, model, no_dist=True)
    saved.pop('model', None)
    return model, saved


def read_shards(saved, path, model, no_dist=False):
    """Read of a folder what load() has left out, this rank's shards: into `model` and `saved`."""
    if 'model' not in saved:
        state = sharded_checkpoint.read(path, model, no_dist)
        saved['optimizer'] = {'state': state, 'param_groups': saved.pop('param_groups')}


def restore(saved, settings, opt, scaler):
    """Give the optimizer and the gradient scaler the state in a checkpoint.

    Fails if it is not of this model or, unless switch_optimizer is set, of another optimizer. Of
    another only Adam's part is kept.
    """
    before = {'optimizer': 'adamw', 'wn_vectors': False, **saved['config']}  # nanoGPT has neither
    of_state = ['optimizer']  # the settings that the state depends on
    if settings['optimizer'] == 'adamwn':
        of_state.append('wn_vectors')
    if settings['optimizer'] == 'adamcpr':
        of_state += ['kappa_init_method', 'reg_function', 'reg_embedding']
        if settings['kappa_init_method'] in ('uniform', 'dependent'):
            of_state.append('kappa_init_param')
    other = [key for key in of_state if before.get(key, settings[key]) != settings[key]]
    if other and not settings['switch_optimizer']:
        was, now = (', '.join(f'{key}={c[key]}' for key in other) for c in (before, settings))
        fail(
            f'the checkpoint was trained with {was}, not {now}: --switch_optimizer=True keeps the '
            "weights, Adam's moments and the iteration and sets up anew what "
            f'{settings["optimizer"]} adds'
        )
    try:
        states = saved['optimizer']['state']
        if other:
            kept = 'step', *MOMENTS
            states = {i: {k: state[k] for k in kept} for i, state in states.items()}
        # the state is the checkpoint's, the options are this run's
        opt.load_state_dict({**opt.state_dict(), 'state': states})
    except (KeyError, TypeError, ValueError) as e:
        problem = f'the checkpoint has no optimizer state of this model ({e})'
        fail(f'{problem}; start from scratch, or only sample from it')
    opt.skipped_steps.fill_(saved.get('skipped_steps', 0))
    if scaler.is_enabled() and saved.get('scaler'):  # a run in another dtype has none
        scaler.load_state_dict(saved['scaler'])


def save_folder(path, saved, model):
    """Write what load_model() returned as a folder.

    Raises OSError if it cannot be written, ValueError if it has no optimizer state.
    """
    if not saved.get('optimizer'):
        raise ValueError('it has no optimizer state')
    run = {key: x for key, x in saved.items() if key != 'optimizer'}
    run['param_groups'] = saved['optimizer']['param_groups']
    with replacing(path) as temporary:
        os.makedirs(temporary)
        save(os.path.join(temporary, sharded_checkpoint.RUN), run)
        sharded_checkpoint.save(temporary, model, saved['optimizer']['state'])
