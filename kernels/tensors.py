"""The tensors that a pass works on, and for gpu.py and cpu.py where they lie in memory."""

import torch

CHUNK = 8192  # elements that a kernel works on at a time, and whose sums it leaves


class Tensors:
    """n tensors of one dtype on one device. Of DTensors a pass works on this process's shards.

    params, grads, exp_avgs, exp_avg_sqs: lists, an entry a tensor. grads: None without a gradient
    in this step. exp_avgs, exp_avg_sqs: float32, None until set. reg_function: which R. numel: of
    all tensors. captured: what CUDA graphs of a step read when they are replayed.
    """

    def __init__(self, params, reg_function='l2'):
        self.params, self.reg_function = [local(p.detach()) for p in params], reg_function
        self.device, self.numel = self.params[0].device, sum(p.numel() for p in self.params)
        self.grads, self.exp_avgs, self.exp_avg_sqs = ([None] * len(params) for _ in range(3))
        self._places, self.captured = [(p.data_ptr(), p.numel()) for p in self.params], []

    def have_moved(self, params):
        return self._places != [(p.data_ptr(), p.numel()) for p in params]

    def set_moments(self, j, exp_avg, exp_avg_sq):
        self.exp_avgs[j], self.exp_avg_sqs[j] = local(exp_avg), local(exp_avg_sq)

    def set_grads(self, grads):
        """Take the gradients of a step; copy those of another dtype or layout than the weight's."""
        self.grads = list(grads)
        for j, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is not None and (g.dtype != p.dtype or g.stride() != p.stride()):
                self.grads[j] = as_laid_out(p, g, p.dtype)


class Table(Tensors):
    """Dense tensors, whose gradients and moments have the same strides, as a table of addresses.

    addresses: (n, 4) int64 on the device: theta, grad, exp_avg, exp_avg_sq; 0: no such tensor.
    chunks: (c, 3) int64. Each tensor is cut into chunks of CHUNK elements of its memory, the last
    one shorter and possibly empty: a chunk's tensor, where in it the chunk starts, and its size.
    first: (n + 1,) int64, a tensor's first chunk. sums, grad_sums, moment_sums: (c, 3) float32, a
    chunk's part of reg_sums and grad_squares (columns 0 and 1), and of what moments_ returns.
    """

    def __init__(self, params, reg_function='l2'):
        super().__init__(params, reg_function)
        chunks, first = [], [0]
        for j, p in enumerate(self.params):
            starts = range(0, max(p.numel(), 1), CHUNK)
            chunks += [(j, start, min(CHUNK, p.numel() - start)) for start in starts]
            first.append(len(chunks))
        self.chunks, self.first = (torch.tensor(x, device=self.device) for x in (chunks, first))
        sums = torch.zeros(3, len(chunks), 3, dtype=torch.float32, device=self.device)
        self.sums, self.grad_sums, self.moment_sums = sums.unbind()
        self._rows = [[address, 0, 0, 0] for address, _ in self._places]
        self._uploaded, self._spare, self._recorded = False, None, False
        self._versions = [None] * len(params)

    def set_moments(self, j, exp_avg, exp_avg_sq):
        super().set_moments(j, exp_avg, exp_avg_sq)
        self._rows[j][2:] = self.exp_avgs[j].data_ptr(), self.exp_avg_sqs[j].data_ptr()
        self._uploaded = False

    def set_grads(self, grads):
        super().set_grads(grads)
        for row, grad in zip(self._rows, self.grads, strict=True):
            address = 0 if grad is None else grad.data_ptr()
            if row[1] != address:
                row[1], self._uploaded = address, False
        if not self._uploaded:
            self._upload(is_capturing(self.device))
        if is_capturing(self.device):
            self._recorded = True
            self.captured.append(self.addresses)
        elif self._recorded:  # a capture records passes without running them: `sums` may be old
            self._recorded, self._versions = False, [None] * len(self.params)

    def _upload(self, capturing):
        """Copy the table to the device. A capture cannot allocate host memory: it takes a spare."""
        if not capturing:
            host, self._spare = self._pinned(), self._pinned()
        elif self._spare is None:
            raise RuntimeError('before another capture, take a step of the optimizer outside of it')
        else:
            host, self._spare = self._spare.copy_(torch.tensor(self._rows)), None
            self.captured.append(host)
        self.addresses = host.to(self.device, non_blocking=True)
        self._uploaded = not capturing  # else the copy runs only when the graph is replayed

    def _pinned(self):
        return torch.tensor(self._rows, pin_memory=self.device.type == 'cuda')

    def sums_are_current(self):
        """Return whether `sums` is of the weights as they are, by PyTorch's count of writes."""
        return self._versions == [p._version for p in self.params]

    def mark_sums_current(self):
        self._versions = [p._version for p in self.params]

    def mark_written(self, summed=False):
        """Count a kernel's write of the tensors that have a gradient, summed by it or not."""
        written = [j for j, g in enumerate(self.grads) if g is not None]
        torch.autograd.graph.increment_version([self.params[j] for j in written])
        for j in written if summed else ():
            self._versions[j] = self.params[j]._version


def local(x):
    """Return this process's shard of a DTensor; any other tensor as it is."""
    return x.to_local() if hasattr(x, 'device_mesh') else x


def is_capturing(device):
    """Return whether a CUDA graph records what is done on a device, instead of doing it."""
    return device.type == 'cuda' and torch.cuda.is_current_stream_capturing()


def sum_dtype(device):
    """Return the dtype of sums over whole tensors."""
    return torch.float32 if device.type == 'mps' else torch.float64  # Metal has no float64


def is_dense(x):
    """Return whether the elements of x fill its memory without gaps or overlaps."""
    return x.is_contiguous() or x.stride() == torch.empty_like(x, device='meta').stride()


def as_laid_out(p, x, dtype):
    """Return x, or a copy of it in this dtype, on p's device and with p's strides."""
    same = x.stride() == p.stride() or x.is_contiguous() and p.is_contiguous()
    if same and x.dtype == dtype and x.device == p.device:
        return x
    return torch.empty_like(p, dtype=dtype).copy_(x)
