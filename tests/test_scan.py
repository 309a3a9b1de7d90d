"""diagonal_scan: three methods, one definition, and their gradients, against a loop in float64."""

import math

import oracles
import pytest
import torch
from tolerances import SAME, assert_as_accurate, assert_different, assert_same, error
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import statefeed as sf

METHODS = ["auto", "sequential", "prefix", "fft"]
FAST = ["prefix", "fft"]
LENGTHS = [1, 2, 3, 17, 127]
DOUBLE, COMPLEX = torch.float64, torch.complex128
# The methods that a diagonal allows: a Fourier transform needs one that stays the same at every step.
ALLOWED = [(method, varying) for method in METHODS for varying in (False, True) if not (method == "fft" and varying)]


def problem(shape, varying, dtype=DOUBLE):
    """x, a within the unit circle (a zero among them; both signs), and an initial state, from a fixed seed."""
    torch.manual_seed(sum(shape))
    x, initial = torch.randn(shape, dtype=dtype), torch.randn(shape[1:], dtype=dtype)
    a_shape = shape if varying else shape[-1:]
    a = torch.rand(a_shape, dtype=DOUBLE) * 2 - 1
    a[..., 0] = 0.0
    if dtype.is_complex:
        a = torch.polar(a.abs(), torch.rand(a_shape, dtype=DOUBLE) * 2 * math.pi)
    return x, a.to(dtype), initial


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("dtype", [DOUBLE, COMPLEX])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("method", "varying"), ALLOWED)
def test_every_method_solves_the_recurrence(method, varying, reverse, dtype, started):
    for length in LENGTHS:
        for shape in ((length, 3), (length, 2, 5), (length, 2, 1, 3)):
            x, a, initial = problem(shape, varying, dtype)
            initial = initial if started else None
            found = sf.diagonal_scan(x, a, reverse=reverse, initial=initial, method=method)
            assert found.dtype == dtype
            assert_same({"y": found}, {"y": oracles.scan(x, a, reverse, initial)})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("method", "varying"), ALLOWED)
def test_every_method_is_seen_to_reject_wrong_recurrences(method, varying, reverse):
    x, a, initial = problem((17, 2, 3), varying)
    found = {"y": sf.diagonal_scan(x, a, reverse=reverse, initial=initial, method=method)}
    assert_different(found, {"y": oracles.scan(x, a, not reverse, initial)})
    assert_different(found, {"y": oracles.scan(x, -a, reverse, initial)})
    assert_different(found, {"y": oracles.scan(x, a, reverse)})
    if varying:
        assert_different(found, {"y": oracles.scan(x, a.roll(1, 0), reverse, initial)})


@pytest.mark.parametrize("method", METHODS)
def test_real_inputs_under_a_complex_diagonal(method):
    x, _, _ = problem((17, 2, 3), False)
    _, a, initial = problem((17, 2, 3), False, COMPLEX)
    found = sf.diagonal_scan(x.to(COMPLEX), a, initial=initial, method=method)
    assert_same({"y": found}, {"y": oracles.scan(x.to(COMPLEX), a, initial=initial)})


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1.05])
@pytest.mark.parametrize(("method", "varying"), ALLOWED)
def test_nothing_divides_by_the_diagonal(method, varying, value):
    x, a, initial = problem((33, 2, 3), varying)
    a = torch.full_like(a, value)
    x.requires_grad_()
    a.requires_grad_()
    found = sf.diagonal_scan(x, a, initial=initial, method=method)
    expected = oracles.scan(x, a, initial=initial)
    assert_same({"y": found}, {"y": expected})
    weights = torch.randn_like(found)
    names = ("x", "a")
    got = torch.autograd.grad((found * weights).sum(), (x, a))
    want = torch.autograd.grad((expected * weights).sum(), (x, a))
    assert_same(dict(zip(names, got, strict=True)), dict(zip(names, want, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("method", ["auto", "prefix", "sequential"])
def test_a_product_that_overflows_leaves_states_of_zero_at_zero(method, varying, reverse, dtype):
    """3^81 is above the largest float32, and most steps have a state of zero, as the padding of a short sequence."""
    for length in (200, 1_001):
        x, a, _ = problem((length, 2, 3), varying, torch.promote_types(dtype, DOUBLE))
        a = torch.full_like(a, -3.0)
        if varying:
            a[20::40] = 0.0
        active = range(5) if reverse else range(length - 5, length)
        x = torch.zeros_like(x).index_copy(0, torch.tensor(active), x[: len(active)])
        found = sf.diagonal_scan(x.to(dtype), a.to(dtype), reverse=reverse, method=method)
        torch.testing.assert_close(found, oracles.scan(x, a, reverse).to(dtype), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("method", ["auto", "prefix", "sequential"])
@pytest.mark.parametrize("name", ["x", "a"])
def test_nan_is_not_hidden_where_states_are_zero(method, name):
    x, a = torch.zeros(64, 1, 1), torch.full((64, 1, 1), 2.0)
    {"x": x, "a": a}[name][20] = math.nan
    found = sf.diagonal_scan(x, a, method=method).flatten()
    assert torch.equal(found.isnan(), torch.arange(64) >= 20)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("method", "varying"), ALLOWED)
def test_strided_slices_are_supported(method, varying, reverse):
    x, a, initial = problem((34, 4, 6), varying)
    views = [v.mT.contiguous().mT if v.dim() > 2 else v for v in (x, a)]
    x, a = views[0][::2, ::2, ::2], views[1][..., ::2]
    a = a[::2, ::2] if varying else a
    found = sf.diagonal_scan(x, a, reverse=reverse, initial=initial[::2, ::2], method=method)
    assert_same({"y": found}, {"y": oracles.scan(x, a, reverse, initial[::2, ::2])})


@pytest.mark.parametrize("dtype", [DOUBLE, COMPLEX])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("method", "varying"), ALLOWED)
def test_first_and_second_derivatives(method, varying, reverse, dtype):
    for length in (1, 5):
        x, a, initial = (v.requires_grad_() for v in problem((length, 1, 2), varying, dtype))

        def scan(x, a, initial):
            return sf.diagonal_scan(x, a, reverse=reverse, initial=initial, method=method)

        assert gradcheck(scan, (x, a, initial))
        assert gradgradcheck(scan, (x, a, initial))
        assert gradcheck(lambda x, a: scan(x, a, None), (x, a))


@pytest.mark.parametrize(("method", "varying"), ALLOWED)
def test_each_input_may_be_the_only_one_that_requires_grad(method, varying):
    given = problem((9, 2, 3), varying)
    for alone in range(3):
        args = [v.clone().requires_grad_(n == alone) for n, v in enumerate(given)]
        found = sf.diagonal_scan(args[0], args[1], initial=args[2], method=method)
        expected = oracles.scan(args[0], args[1], initial=args[2])
        got, want = (torch.autograd.grad(v.square().sum(), args[alone])[0] for v in (found, expected))
        assert_same({"gradient": got}, {"gradient": want})


@pytest.mark.parametrize(("method", "varying"), ALLOWED)
def test_empty_time_and_empty_batch(method, varying):
    for shape in ((0, 2, 3), (5, 0, 3), (0, 0, 3)):
        x = torch.zeros(shape, requires_grad=True)
        a = torch.zeros(shape if varying else shape[-1:], requires_grad=True)
        for reverse in (False, True):
            y = sf.diagonal_scan(x, a, reverse=reverse, method=method)
            assert y.shape == shape
            y.sum().backward()
        assert x.grad.shape == shape
        assert a.grad.shape == a.shape
        assert not a.grad.any()


@pytest.mark.parametrize("method", METHODS)
def test_splitting_a_sequence_gives_the_same_outputs(method):
    x, a, initial = problem((23, 2, 3), False)
    for split in (1, 8, 22):
        first = sf.diagonal_scan(x[:split], a, initial=initial, method=method)
        second = sf.diagonal_scan(x[split:], a, initial=first[-1], method=method)
        whole = sf.diagonal_scan(x, a, initial=initial, method=method)
        assert_same({"y": torch.cat((first, second))}, {"y": whole})
        last = sf.diagonal_scan(x[split:], a, reverse=True, initial=initial, method=method)
        first = sf.diagonal_scan(x[:split], a, reverse=True, initial=last[0], method=method)
        whole = sf.diagonal_scan(x, a, reverse=True, initial=initial, method=method)
        assert_same({"y": torch.cat((first, last))}, {"y": whole})


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("method", "varying"), [pair for pair in ALLOWED if pair[0] != "fft"])
def test_float32_is_as_accurate_as_a_float32_loop(method, varying, reverse):
    for length in (17, 127, 1000):
        x, a, initial = (v.float().requires_grad_() for v in problem((length, 2, 5), varying))
        answers = []
        for scan, dtype in ((sf.diagonal_scan, torch.float32), (oracles.scan, torch.float32), (oracles.scan, DOUBLE)):
            args = [v.detach().to(dtype).requires_grad_() for v in (x, a, initial)]
            options = {"method": method} if scan is sf.diagonal_scan else {}
            y = scan(args[0], args[1], reverse=reverse, initial=args[2], **options)
            gradients = torch.autograd.grad((y * y.detach().sin()).sum(), args)
            answers.append({"y": y, **dict(zip(("dx", "da", "dinitial"), gradients, strict=True))})
        assert_as_accurate(*answers)


def test_float32_prefix_sum_holds_its_accuracy_where_hardly_anything_decays():
    """Per unit, at diagonals whose memory is thousands of steps, and at one, where there is no end to it."""
    x = torch.randn(65536, 2, 5, generator=torch.Generator().manual_seed(0))
    a = 1 - 10.0 ** torch.tensor([-2.0, -3.0, -4.0, -5.0, -9.0])
    answers = [sf.diagonal_scan(x, a, method="prefix"), oracles.scan(x, a), oracles.scan(x.double(), a.double())]
    assert_as_accurate(*({str(unit): y[..., n] for n, unit in enumerate(a.tolist())} for y in answers))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "varying"), [pair for pair in ALLOWED if pair[0] != "fft"])
def test_half_precision_accumulates_in_float32(method, varying, dtype):
    """A sum of 300 ones and more stops growing in bfloat16 (at 256); rounded once, it is right to half a unit."""
    x = torch.ones(600, 2, 3, dtype=dtype)
    a = torch.ones(x.shape if varying else 3, dtype=dtype)
    y = sf.diagonal_scan(x, a, method=method)
    assert y.dtype == dtype
    assert torch.equal(y, torch.arange(1, 601, dtype=DOUBLE)[:, None, None].expand(600, 2, 3).to(dtype))
    x, a, _ = (v.to(dtype) for v in problem((200, 2, 5), varying))
    exact = oracles.scan(x.double(), a.double())
    y = sf.diagonal_scan(x, a, method=method)
    assert ((y.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("method", METHODS)
def test_methods_agree_on_the_published_ramp_at_length(method):
    """The paper's diagonal, zero and one included: at one the scan is a plain sum, where nothing decays."""
    x = torch.randn(4096, 1, 9, dtype=DOUBLE)
    a = torch.linspace(0, 1, 9, dtype=DOUBLE)
    assert error(sf.diagonal_scan(x, a, reverse=True, method=method), oracles.scan(x, a, True)) < SAME


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("length", [1024, 65536])
def test_fourier_transform_at_length_errs_no_more_than_the_prefix_sum(length, dtype):
    """The bound its docstring states: diagonals up to and including one, inputs of unit variance, 65,536 steps."""
    torch.manual_seed(length)
    x, a = torch.randn(length, 1, 7, dtype=dtype), torch.tensor([-1.0, 0.0, 0.5, 0.9, 0.999, 0.99999, 1.0])
    a, wide = a.to(dtype), COMPLEX if dtype.is_complex else DOUBLE
    exact = oracles.scan(x.to(wide), a.to(wide))
    errors = {m: (sf.diagonal_scan(x, a, method=m).to(exact.dtype) - exact).abs().amax((0, 1)) for m in FAST}
    assert (errors["fft"] <= errors["prefix"].clamp_min(torch.finfo(dtype).eps)).all()
    assert_as_accurate(*({"y": v} for v in (sf.diagonal_scan(x, a, method="fft"), oracles.scan(x, a), exact)))


# Cost -----------------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts the operations that reach torch's dispatcher."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(length, method, varying):
    x, a, initial = (v.requires_grad_() for v in problem((length, 2, 3), varying))
    with Operations() as seen:
        sf.diagonal_scan(x, a, reverse=True, initial=initial, method=method).sum().backward()
    return seen.count


@pytest.mark.parametrize(("method", "varying"), [pair for pair in ALLOWED if pair[0] in FAST])
def test_no_python_loop_over_time(method, varying):
    """Operations grow with log T at most, which from 16 to 256 is a factor of two."""
    short, long = operations(16, method, varying), operations(256, method, varying)
    assert long <= 2 * short


def test_the_sequential_method_is_the_loop_that_the_count_would_see():
    if operations(256, "sequential", True) < 256:
        pytest.skip("the sequential scan is one fused operation here")
    assert operations(256, "sequential", True) > 2 * operations(16, "sequential", True)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_the_fourier_transform_raises_for_a_time_varying_diagonal():
    x, a, _ = problem((5, 2, 3), True)
    with pytest.raises(ValueError, match="fft"):
        sf.diagonal_scan(x, a, method="fft")


@pytest.mark.parametrize(
    "options",
    [
        {"method": "newton"},
        {"a": torch.zeros(4)},
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(4, 2, 3)},
        {"initial": torch.zeros(3, 2)},
        {"initial": torch.zeros(3)},
    ],
)
def test_wrong_arguments_raise(options):
    given = {"x": torch.zeros(5, 2, 3), "a": torch.zeros(3)} | options
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        sf.diagonal_scan(**given)


@pytest.mark.parametrize("name", ["x", "a", "initial"])
def test_a_number_is_no_tensor(name):
    given = {"x": torch.zeros(5, 2, 3), "a": torch.zeros(3)} | {name: 0.5}
    with pytest.raises(TypeError, match=f"^{name} must be a tensor, got float$"):
        sf.diagonal_scan(**given)
