"""lengths= and resets=: outputs, states and gradients equal those of separate calls of torch.nn per segment."""

import itertools

import pytest
import torch
from torch import nn

import statefeed as sf

T, B, I, H = 9, 4, 3, 5
LENGTHS = torch.tensor([4, 9, 1, 7])
RESETS = torch.zeros(T, B, dtype=torch.bool)
RESETS[[3, 6, 2, 0, 4, 8], [0, 1, 1, 3, 3, 3]] = True


def separately(layer: nn.RNNBase, x: torch.Tensor, hx: tuple, lengths: torch.Tensor, resets: torch.Tensor) -> tuple:
    """Every segment in its initial unbatched call of a plain layer."""
    directions = 2 if layer.bidirectional else 1
    rows = []
    for b in range(x.shape[1]):
        n = int(lengths[b])
        starts = [0, *(t for t in range(1, n) if resets[t, b])]
        stops = [*starts[1:], n]
        outputs, finals = [], []
        for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            state = []
            for s in hx:
                initial = torch.zeros_like(s[:, b])
                for k in range(len(initial)):
                    forward = k % directions == 0
                    enters = (i == 0 and not resets[0, b]) if forward else i == len(starts) - 1
                    initial[k] = s[k, b] if enters else 0
                state.append(initial)
            y, final = layer(x[start:stop, b], tuple(state) if len(state) == 2 else state[0])
            outputs.append(y)
            finals.append(final if isinstance(final, tuple) else (final,))
        padding = outputs[0].new_zeros(len(x) - n, outputs[0].shape[-1])
        ends = [
            torch.stack([s_last[k] if k % directions == 0 else s_first[k] for k in range(len(s_last))])
            for s_last, s_first in zip(finals[-1], finals[0], strict=True)
        ]
        rows.append((torch.cat([*outputs, padding]), ends))
    return (
        torch.stack([y for y, _ in rows], 1),
        *(torch.stack([ends[i] for _, ends in rows], 1) for i in range(len(hx))),
    )


CASES = list(itertools.product(["RNN", "GRU", "LSTM"], [False, True], ["lengths", "resets", "both"]))


@pytest.mark.parametrize(("cell", "bidirectional", "given"), CASES)
@pytest.mark.parametrize("rule", ["torch", "jacobian+9", "dsf"])
def test_segments_equal_separate_calls(cell: str, bidirectional: bool, given: str, rule: str) -> None:
    torch.manual_seed(0)
    # One layer is enough: more layers only add states.
    layer = getattr(sf, cell)(I, H, 1, bidirectional=bidirectional, feedback=rule, dtype=torch.float64)
    plain = layer if rule == "dsf" else getattr(nn, cell)(I, H, 1, bidirectional=bidirectional, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    K = 2 if bidirectional else 1
    lengths = LENGTHS if given != "resets" else torch.full((B,), T)
    resets = RESETS if given != "lengths" else torch.zeros_like(RESETS)
    x = torch.randn(T, B, I, dtype=torch.float64)
    hx = [torch.randn(K, B, H, dtype=torch.float64) for _ in range(2 if cell == "LSTM" else 1)]
    keywords = {"lengths": {"lengths": lengths}, "resets": {"resets": resets}}
    given_keywords = keywords.get(given, {"lengths": lengths, "resets": resets})

    def run(call: object, module: nn.Module) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        y, *states = call(leaf)
        generator = torch.Generator().manual_seed(3)
        loss = sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in (y, *states))
        return [y, *states, *torch.autograd.grad(loss, [leaf, *module.parameters()])]

    def ours(leaf: torch.Tensor) -> tuple:
        y, final = layer(leaf, tuple(hx) if len(hx) == 2 else hx[0], **given_keywords)
        return (y, *(final if isinstance(final, tuple) else (final,)))

    expected = run(lambda leaf: separately(plain, leaf, tuple(hx), lengths, resets), plain)
    for a, b in zip(run(ours, layer), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_lengths_equal_packing_in_a_deep_batch_first_layer() -> None:
    torch.manual_seed(0)
    layer = sf.GRU(I, H, 3, batch_first=True, bidirectional=True, feedback="gate+1")
    x = torch.randn(B, T, I)
    y, h = layer(x, lengths=LENGTHS)
    packed = nn.utils.rnn.pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    expected, h_expected = layer(packed)
    torch.testing.assert_close(y, nn.utils.rnn.pad_packed_sequence(expected, batch_first=True)[0])
    torch.testing.assert_close(h, h_expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, lengths=LENGTHS)[0], y)


def test_no_gradient_passes_a_reset() -> None:
    layer = sf.GRU(I, H, feedback="dsf")
    resets = torch.zeros(T, 1, dtype=torch.bool)
    resets[5] = True
    x = torch.randn(T, 1, I, requires_grad=True)
    y, _ = layer(x, resets=resets)
    (grad,) = torch.autograd.grad(y[5:].sum(), x)
    assert not grad[:5].any()
    assert grad[5:].all()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lengths": torch.tensor([1, 2, 3])}, r"\(B,\) = \(4,\)"),
        ({"lengths": torch.tensor([1.0, 2, 3, 4])}, "integers"),
        ({"lengths": torch.tensor([0, 2, 3, 4])}, "between 1 and T = 9, got 0 to 4"),
        ({"lengths": torch.tensor([1, 2, 3, 10])}, "between 1 and T = 9, got 1 to 10"),
        ({"resets": torch.zeros(T, B)}, "bool"),
        ({"resets": torch.zeros(B, T, dtype=torch.bool)}, r"\(T, B\) = \(9, 4\)"),
    ],
)
def test_unsupported_uses_raise(keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.GRU(I, H)(torch.zeros(T, B, I), **keywords)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["lengths", "resets"])
def test_a_list_raises(name: str, batch_first: bool) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a tensor, got list$"):
        sf.GRU(I, H, batch_first=batch_first)(torch.zeros(T, T, I), **{name: [T] * T})


def test_packed_input_raises() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.zeros(3, I)])
    with pytest.raises(ValueError, match="PackedSequence"):
        sf.GRU(I, H)(packed, lengths=torch.tensor([3]))


@pytest.mark.parametrize("make", [sf.RNN, sf.GRU, sf.LSTM, sf.SLSTM])
@pytest.mark.parametrize("rule", ["bptt", "dsf"])
def test_lengths_keep_float64_under_autocast_as_a_dense_batch_does(make: type, rule: str) -> None:
    torch.manual_seed(0)
    layer, x = make(I, H, feedback=rule, dtype=torch.float64), torch.randn(T, B, I, dtype=torch.float64)
    expected, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        for given in ({"lengths": torch.full((B,), T)}, {"resets": torch.zeros(T, B, dtype=torch.bool)}):
            y, final = layer(x, **given)
            torch.testing.assert_close(y, expected)
            assert all(s.dtype == torch.float64 for s in (final if isinstance(final, tuple) else (final,)))
