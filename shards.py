"""Parameters that are spread over processes as DTensors, which FSDP2's fully_shard makes: their parts, and their sums.

A process has a part of each, possibly of another size than its neighbour's, possibly none. What a step must know of a
whole tensor is a sum over its elements, so the parts' sums are added up over the processes, in float64.
"""

import torch

from kernels import plain


def local(x):
    """This process's part of a DTensor; any other tensor as it is."""
    return x.to_local() if hasattr(x, 'device_mesh') else x


def groups(x):
    """The process groups over which the parts of x are spread: of each mesh dimension that it is not replicated in."""
    if not hasattr(x, 'device_mesh'):
        return ()
    return tuple(x.device_mesh.get_group(i) for i, p in enumerate(x.placements) if not p.is_replicate())


def like(p, value):
    """`value`, if it is whole and p a DTensor of its shape, spread as p is: every process takes its part of its own."""
    if not hasattr(p, 'device_mesh') or hasattr(value, 'device_mesh') or value.shape != p.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


def add_up(vectors, groups):
    """Replace the float64 `vectors`, one a batch, by their sums over the processes of that batch's `groups`.

    One all-reduce for all batches whose groups are the same, however many tensors they have.
    """
    for over in dict.fromkeys(groups):
        members = [i for i, g in enumerate(groups) if g == over]
        total = torch.cat([vectors[i] for i in members])
        for group in over if total.numel() else ():
            torch.distributed.all_reduce(total, group=group)
        for i, part in zip(members, total.split([vectors[i].numel() for i in members]), strict=True):
            vectors[i] = part


class Whole:
    """The whole tensors that `params` are parts of, as kernels.plain's decisions ask for them."""

    def __init__(self, params, reg_function):
        self.reg_function, self.over = reg_function, groups(params[0])
        self.numel = torch.tensor([max(p.numel(), 1) for p in params], dtype=torch.float32, device=params[0].device)

    def parts(self, tensors, count, regularizer):
        """What the parts in `tensors` add to the R of the first `count` of them: float64, for `take` when added up.

        regularizer: gives R of the parts, (count,), where R is a sum over elements.
        """
        if self.reg_function != 'std':
            return regularizer(slice(0, count)).double()
        sums = []
        for x in tensors[:count]:  # each around its own mean, so that no digits of a small std get lost in float32
            var, mean = torch.var_mean(x.float(), correction=0) if x.numel() else (x.new_zeros(()), x.new_zeros(()))
            var, mean = var.double(), mean.double()
            sums += [x.numel() * mean, x.numel() * (var + mean * mean)]
        return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64, device=self.numel.device)

    def take(self, sums):
        if self.reg_function == 'std':
            n = self.numel[: sums.numel() // 2].double()
            mean, squares = sums[0::2] / n, sums[1::2]
            self.mean = mean.float()
            sums = ((squares - n * mean * mean).clamp(min=0) / (n - 1).clamp(min=1)).sqrt()
        self.values = sums.float()

    def R(self, span):
        return self.values[span]

    def centred(self, decay):
        """std's correction d * (theta - mean) / ((n - 1) std) as a decay a and what it leaves too little, a * mean."""
        count = self.values.numel()
        a = torch.zeros_like(decay)
        a[:count] = torch.where(self.values > 0, decay[:count] / ((self.numel[:count] - 1) * self.values), 0.0)
        return a, a[:count] * self.mean


def regularizer(params, reg_function):
    """R_j of each tensor, whole, (len(params),) float32 (kernels.plain.regularizer), be they DTensors or not."""
    values = torch.empty(len(params), dtype=torch.float32, device=params[0].device)
    together = {}
    for j, p in enumerate(params):
        together.setdefault(groups(p), []).append(j)
    for over, members in together.items():
        parts = [local(params[j]) for j in members]
        if over:
            whole = Whole([params[j] for j in members], reg_function)
            sums = [whole.parts(parts, len(parts), lambda _, parts=parts: plain.regularizer(parts, reg_function))]
            add_up(sums, [over])
            whole.take(sums[0])
        values[members] = whole.values if over else plain.regularizer(parts, reg_function)
    return values
