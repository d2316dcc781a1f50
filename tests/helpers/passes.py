"""One pass over memory at a time, on the same tensors in two of the files of kernels/."""

import torch

REGS = ['l2', 'std', 'l1', 'huber']


class Problem:
    """Tensors of some sizes for the passes of one module, the same for every module.

    offset: elements by which the memory of every tensor is shifted from an aligned address.
    missing: indices of tensors without a gradient.
    """

    def __init__(self, kernels, sizes, reg='l2', dtype=torch.float32, offset=0, missing=()):
        self.kernels, generator = kernels, torch.Generator().manual_seed(0)
        interpreted = getattr(kernels, 'INTERPRETED', True)
        self.device = 'cpu' if interpreted else 'cuda'

        def tensor(n, dtype, square=False):
            x = torch.randn(n, generator=generator)
            memory = torch.empty(n + offset, dtype=dtype, device=self.device)
            memory[offset:] = x.square() if square else x
            return memory[offset:]

        self.t = kernels.Tensors([tensor(n, dtype) for n in sizes], reg)
        for j, n in enumerate(sizes):
            moments = tensor(n, torch.float32), tensor(n, torch.float32, square=True)
            self.t.set_moments(j, *moments)
        grads = [tensor(n, dtype) for n in sizes]
        self.t.set_grads([None if j in missing else g for j, g in enumerate(grads)])
        decays, mean = [0.03 * (j % 3) for j in range(len(sizes))], 0.3 if reg == 'std' else 0.0
        rows = [[d, d * mean, 0.1 + 0.1 * j, 3.0] for j, d in enumerate(decays)]
        self.coefficients = torch.tensor(rows, device=self.device)
        self.hyper = torch.tensor([0.7, 0.9, 0.1, 0.95, 0.05, 1e-8], device=self.device)
        self.proceed = torch.tensor(True, device=self.device)

    @property
    def tensors(self):
        """theta, exp_avg and exp_avg_sq of every tensor."""
        return [*self.t.params, *self.t.exp_avgs, *self.t.exp_avg_sqs]

    def grad_squares(self):
        return self.kernels.grad_squares(self.t).cpu()

    def reg_sums(self):
        return self.kernels.reg_sums(self.t).cpu()

    def adam_(self):
        self.kernels.adam_(self.t, self.coefficients, self.hyper, self.proceed)

    def moments_(self):
        return self.kernels.moments_(self.t, self.coefficients, self.hyper, self.proceed).cpu()

    def apply_(self):
        self.kernels.apply_(self.t, self.coefficients, self.hyper, self.proceed)

    def correct_(self):
        # a tensor without a gradient is not corrected: cpr.py gives it a d of 0
        moving = torch.tensor([[g is not None] for g in self.t.grads], device=self.device)
        self.kernels.correct_(self.t, self.coefficients * moving, self.proceed)


def difference(ours, theirs):
    """How far tensors are apart, at most, relative to their values where those are above 1."""
    worst = 0.0
    for x, y in zip(ours, theirs, strict=True):
        x, y = x.detach().cpu().double(), y.detach().cpu().double()
        assert x.shape == y.shape and torch.equal(x.isfinite(), y.isfinite())
        if x.numel():
            worst = max(worst, ((x - y).abs() / y.abs().clamp(min=1)).max().item())
    return worst
