"""Norms of weights, steps and gradients, which may be DTensors: every rank must call these."""

import math

import torch

from nanonorm.kernels.dtensor import square_sums


def norms_of(tensors):
    """Return {name: norm} of {name: tensor}."""
    norms = square_sums([*tensors.values()]).sqrt().tolist() if tensors else []
    return dict(zip(tensors, norms, strict=True))


@torch.no_grad()
def norm_entry(opt, params, init_norms, before=None):
    """Return the fields of a 'norms' entry of the log.

    params: {name: parameter}. before: {name: tensor} before the optimizer's last step. If given,
    its norms and the step are returned, and its tensors are overwritten; otherwise the norms of
    `params`. init_norms: {name: norm} at the start.
    """
    init_norms = {name: init_norms[name] for name in params}
    after = norms_of(params)
    norms = norms_of(before) if before else after
    steps = norms_of({name: x.sub_(params[name]) for name, x in before.items()}) if before else {}
    tensors = {}
    for name, norm in norms.items():
        ratio = norm / init_norms[name] if init_norms[name] else math.nan
        tensors[name] = dict(norm=norm, ratio=ratio)
        if steps and norm:
            tensors[name].update(step_fields(norm, after[name], steps[name]))
        state = opt.state.get(params[name], {})
        tensors[name].update({k: state[k].item() for k in ('kappa', 'lagmul') if k in state})
    start, now, then, step = (math.hypot(*x.values()) for x in (init_norms, norms, after, steps))
    joint = step_fields(now, then, step) if steps else {}
    return dict(ratio=now / start, **joint, tensors=tensors)


def step_fields(before, after, step):
    """Return a step's length over the norm, and the angle in degrees by which it turns the weights.

    The three norms are the sides of a triangle. The angle is the one opposite `step`.
    """
    across, along = step**2 - (before - after) ** 2, (before + after) ** 2 - step**2
    turned = 2 * math.atan2(math.sqrt(max(across, 0.0)), math.sqrt(max(along, 0.0)))
    return dict(step=step / before, angle=math.degrees(turned))


def largest_gradients(model, count=3):
    """Name the `count` tensors with the largest gradient norms: 'NAME 1.2e+03, ...'.

    Norms that are not finite come first. Every rank must call it.
    """
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = norms_of(grads)
    largest = sorted(norms, key=lambda name: (math.isfinite(norms[name]), -norms[name]))[:count]
    return ', '.join(f'{name} {norms[name]:.3g}' for name in largest)
