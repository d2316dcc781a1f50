"""Draw four pictures of one or several runs of nanoNorm from their log.jsonl.

loss.png    validation and training loss
ratio.png   the norm of the weights over their norm at the start
            (AdamWN paper, arXiv 2311.11446, Figure 3)
step.png    a step's length over the weight norm, and the angle by which it turns the weights
tensor.png  one tensor: squared norm and its bound kappa, growth, lambda, and the validation loss
            (CPR paper, arXiv 2311.09058, Figure 5)

--watch draws them again whenever a log has grown, until Ctrl-C.
"""

import os
import sys
import time

import matplotlib

from runtime import figures
from runtime import log as runlog
from runtime.errors import Arguments, border, fail


@matplotlib.rc_context(figures.STYLE)
def draw_all(args):
    """Write the pictures of the runs in args.out_dirs. Fails if a run has no loss yet."""
    runs = figures.load_all(args.out_dirs)
    for out_dir, run in zip(args.out_dirs, runs, strict=True):
        if not figures.has_loss(run):
            log = os.path.join(out_dir, runlog.NAME)
            fail(f'{log} has no loss yet; let the run reach its first evaluation')
    with_norms = [run for run in runs if run.tensors()]
    tensor = figures.choose_tensor(with_norms, args.tensor)
    drawn = {'loss.png': figures.loss_figure(runs)}
    if with_norms:
        drawn['ratio.png'] = figures.norms_figure(with_norms, figures.RATIO)
        drawn['tensor.png'] = figures.tensor_figure(with_norms, tensor)
    with_steps = [run for run in with_norms if run.has('step')]
    if with_steps:
        drawn['step.png'] = figures.norms_figure(with_steps, figures.STEP)

    out = args.out or (args.out_dirs[0] if len(runs) == 1 else 'plots')
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as e:
        fail(f'cannot make the folder {out} ({e.strerror}); choose another with --out=FOLDER')
    for name, figure in drawn.items():
        figures.save(figure, os.path.join(out, name))
    for run in runs:
        if not run.tensors():
            print(f'note: {run.name} has no norms yet, ratio.png and tensor.png leave it out')


def _size_and_time(path):
    return (os.path.getsize(path), os.path.getmtime(path)) if os.path.isfile(path) else None


def watch(args, seconds=2.0):
    """Draw again whenever a log has changed, once all runs have a loss. Polls every `seconds`."""
    drawn = None
    while True:
        logs = [os.path.join(out_dir, runlog.NAME) for out_dir in args.out_dirs]
        state = [_size_and_time(log) for log in logs]
        if (
            state != drawn
            and None not in state
            and all(map(figures.has_loss, figures.load_all(args.out_dirs)))
        ):
            draw_all(args)
            sys.stdout.flush()
            drawn = state
        time.sleep(seconds)


def main(argv):
    usage = 'python plot.py OUT_DIR... [--out=FOLDER] [--tensor=NAME] [--watch]'
    parser = Arguments(__doc__, usage=usage, allow_abbrev=False)
    text = 'out_dir of a run, where its log.jsonl is'
    parser.add_argument('out_dirs', nargs='+', metavar='OUT_DIR', help=text)
    text = "where to write; default: one run's OUT_DIR, plots for several"
    parser.add_argument('--out', metavar='FOLDER', help=text)
    text = 'tensor.png shows this one; a part of its name will do'
    parser.add_argument('--tensor', metavar='NAME', help=text)
    text = 'draw again whenever a log has grown, until Ctrl-C'
    parser.add_argument('--watch', action='store_true', help=text)
    args = parser.parse_args(argv)
    if not args.watch:
        draw_all(args)
        return
    for out_dir in args.out_dirs:
        if not os.path.isdir(out_dir):
            fail(f'there is no folder {out_dir} to watch; start the run first')
    try:
        watch(args)
    except KeyboardInterrupt:
        print()


if __name__ == '__main__':
    with border():
        main(sys.argv[1:])
