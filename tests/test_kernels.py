"""The passes of kernels/plain.py, above all the branch that an accelerator takes, which here runs on the CPU."""

import pytest
import torch

from cpr import AdamCPR, AdamW, AdamWN
from kernels import plain

SHAPES = [(1,), (7,), (33, 65), (1, 1), (257, 129), (0, 3)]


def tensors(dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


def run_adam(
    steps, params, grads, exp_avgs, exp_avg_sqs, coef, proceed=True, lr=1e-2, on_cpu=True, **options
):
    """One pass. on_cpu=False: as on an accelerator. Returns R of what it wrote."""
    t = plain.Tensors(params, exp_avgs, exp_avg_sqs)
    t.on_cpu = on_cpu
    t.take(grads)
    plain.adam_(
        t,
        steps,
        torch.linspace(0.0, 0.5, len(params)),
        lr=lr,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        grad_coef=torch.tensor(coef),
        proceed=torch.tensor(proceed),
        order='before',
        sums=len(params),
        **options,
    )
    return t.R(slice(0, len(params)))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('coef', [1.0, 0.3])
@pytest.mark.parametrize('lr', [1e-2, 0.0])
def test_the_branch_for_accelerators_computes_what_the_cpus_does(dtype, coef, lr):
    torch.manual_seed(0)
    params, grads = tensors(dtype), tensors(dtype)
    exp_avgs, exp_avg_sqs = tensors(), [x.square() for x in tensors()]
    ours = [[x.clone() for x in xs] for xs in (params, grads, exp_avgs, exp_avg_sqs)]
    theirs = [[x.clone() for x in xs] for xs in (params, grads, exp_avgs, exp_avg_sqs)]
    steps = torch.arange(1.0, len(params) + 1)
    a = run_adam(steps, *ours, coef, lr=lr)
    b = run_adam(steps, *theirs, coef, lr=lr, on_cpu=False)
    for xs, ys in zip(ours, theirs, strict=True):
        for x, y in zip(xs, ys, strict=True):
            torch.testing.assert_close(
                x, y, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-6
            )
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(theirs[1], grads, strict=True)), (
        'gradients are not to be written'
    )


@pytest.mark.parametrize('on_cpu', [True, False])
def test_a_skipped_pass_changes_nothing(on_cpu):
    torch.manual_seed(0)
    before = [
        tensors(),
        [torch.full(s, float('nan')) for s in SHAPES],
        tensors(),
        [x.square() for x in tensors()],
    ]
    after = [[x.clone() for x in xs] for xs in before]
    run_adam(torch.ones(len(SHAPES)), *after, 0.5, proceed=False, on_cpu=on_cpu)
    for i in (0, 2, 3):
        assert all(torch.equal(x, y) for x, y in zip(before[i], after[i], strict=True))


@pytest.mark.parametrize('reg_function', ['l2', 'l1', 'std', 'huber'])
def test_a_correction_rounded_at_random_is_the_same_on_an_accelerator(reg_function):
    torch.manual_seed(0)
    start, results = tensors(torch.bfloat16), []
    decay = torch.tensor(
        [
            0.0 if i == 2 else 1e-3 * (x.numel() if reg_function == 'std' else 1)
            for i, x in enumerate(start)
        ]
    )
    for on_cpu in (True, False):
        t = plain.Tensors([x.clone() for x in start], tensors(), tensors(), reg_function)
        t.on_cpu = on_cpu
        plain.correct_(t, slice(0, len(start)), decay, torch.arange(1.0, len(start) + 1), seed=3)
        results.append(t.params)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert torch.equal(start[2], results[0][2]) and not torch.equal(start[4], results[0][4])


@pytest.mark.parametrize('size', [8, 100])  # below and above what shares a call with others
def test_moments_of_any_strides_and_precision_are_updated(size):
    torch.manual_seed(0)
    theta, grad, exp_avg, exp_avg_sq = (torch.rand(size, size) for _ in range(4))
    plain_ones = [[x.clone()] for x in (theta, grad, exp_avg, exp_avg_sq)]
    odd_ones = [[theta.clone()], [grad.clone()], [exp_avg.t().clone().t()], [exp_avg_sq.bfloat16()]]
    for tensors_ in (plain_ones, odd_ones):
        run_adam(torch.ones(1), *tensors_, 0.5)
    assert torch.equal(plain_ones[2][0], odd_ones[2][0]) and not torch.equal(
        odd_ones[2][0], exp_avg
    )
    torch.testing.assert_close(plain_ones[3][0], odd_ones[3][0].float(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(plain_ones[0][0], odd_ones[0][0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize('threads', [1, 3])  # a piece is as long as they are many
def test_squares_are_those_of_what_was_written_to_the_last_bit(threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    piece = threads * plain.PIECE
    for dtype in (torch.float32, torch.bfloat16):
        params = [torch.randn(n).to(dtype) for n in (1, 4096, piece, piece + 1, 3 * piece - 5)]
        moments = [[torch.rand(p.shape) for p in params] for _ in range(2)]
        squares = run_adam(
            torch.ones(5), params, [torch.randn(p.shape) for p in params], *moments, 0.7
        )
        assert torch.equal(squares, plain.regularizer(params, 'l2'))
        exact = torch.stack([p.double().square().sum() for p in params])
        torch.testing.assert_close(squares.double(), exact, rtol=1e-6, atol=0)


def test_pieces_kept_from_the_last_step_are_those_of_the_memory_it_is_now(monkeypatch):
    """Weights and moments that get other memory between steps, and another number of threads."""
    monkeypatch.setattr(plain, 'PIECE', 64)
    runs = []
    for anew in (False, True):
        torch.manual_seed(0)
        params, exp_avgs, exp_avg_sqs = tensors(), tensors(), [x.square() for x in tensors()]
        t = plain.Tensors(params, exp_avgs, exp_avg_sqs)
        for step in range(1, 7):
            if step == 2:
                for x in (*params, *exp_avgs):
                    x.data = x.clone() + 1
            if step == 3:
                exp_avg_sqs[2].data = exp_avg_sqs[2].t().contiguous().t()  # of other strides
            if step == 6:
                exp_avgs[4].data = (
                    exp_avgs[4].view(129, 257).t()
                )  # of other strides in the same memory
            torch.set_num_threads(2 if step == 4 else 1)
            t = plain.Tensors(params, exp_avgs, exp_avg_sqs) if anew else t
            t.take(tensors())
            plain.adam_(
                t,
                torch.full((len(params),), float(step)),
                torch.zeros(len(params)),
                lr=1e-2,
                beta1=0.9,
                beta2=0.95,
                eps=1e-8,
                grad_coef=torch.tensor(0.5),
                proceed=torch.tensor(True),
                order='before',
                sums=3,
            )
        runs.append((*params, *exp_avgs, *exp_avg_sqs, t.squares))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_sums_over_many_elements_keep_their_digits():
    x = torch.rand(20_000_001)
    exact = x.double().square().sum().item()
    assert plain.regularizer([x], 'l2').item() == pytest.approx(exact, rel=1e-6)
    gradients = plain.Tensors([x], None, None)
    gradients.take([x])
    assert plain.sum_of_squares(gradients).item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    'make',
    [
        lambda params, **kw: AdamW(params, weight_decay=0.1, **kw),
        lambda params, **kw: AdamCPR(
            params, kappa_init_method='dependent', kappa_init_param=0.8, **kw
        ),
        lambda params, **kw: AdamCPR(params, reg_step_size=2, order='after', **kw),
        lambda params, **kw: AdamWN(params, ratio=1.5, **kw),
        lambda params, **kw: AdamWN(params, ratio=1.5, order='before', scope='global', **kw),
    ],
)
def test_an_optimizer_that_decides_on_the_device_takes_the_same_steps(make, monkeypatch):
    """Steps with and without a finite gradient, with every decision left in tensors as on an accelerator."""
    runs = []
    for on_device in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (7,), (33, 65))]
        opt = make(params, lr=1e-2, max_grad_norm=1.0)
        if on_device:
            elsewhere = property(lambda t: False, lambda t, value: None)
            monkeypatch.setattr(plain.Tensors, 'on_cpu', elsewhere, raising=False)
        for i in range(12):
            for p in params:
                p.grad = torch.randn_like(p)
            if i in (3, 7):
                params[1].grad[0] = float('inf')
            opt.step()
        assert opt.skipped_steps == 2
        state = [{k: v.clone() for k, v in opt.state[p].items()} for p in params]
        runs.append(([p.detach().clone() for p in params], state))
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        for k in a:
            torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-6, equal_nan=True)


def test_kappa_ip_does_not_fire_where_the_last_digit_of_a_float32_changes_its_size():
    # A straight R so slow that the average moves by less than float32 resolves: past a power of two, where the last
    # digit doubles, an average without its rounding error would stand still for more than a thousand steps.
    theta = torch.nn.Parameter(torch.ones(1, 1))
    theta.grad = torch.zeros(1, 1)
    opt = AdamCPR([theta], lr=0.0, reg_step_size=200, reg_ema_decay=0.999)
    for t in range(7000):
        with torch.no_grad():
            theta.fill_((4 + 1e-7 * (t - 5000)) ** 0.5)
        opt.step()
    assert not opt.state[theta]['kappa_set']
