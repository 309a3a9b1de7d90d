"""What explain says against counts by hand, and the exact rule through the kernels against torch's."""

import pytest
import torch
from torch import nn

import statefeed as sf
from statefeed import kernels

T, B, I, H = 11, 3, 7, 9
needs_kernels = pytest.mark.skipif(not kernels.available(), reason=f"no kernels: {kernels.unavailable()}")


@needs_kernels
def test_products_and_memory_of_a_fused_gru() -> None:
    said = sf.explain(sf.GRU(I, H, feedback="gate+2"), torch.zeros(T, B, I))
    unit_input, unit_hidden = 2 * T * B * 3 * H * I, 2 * T * B * 3 * H * H
    assert said.forward_flops == unit_input + unit_hidden
    assert said.backward_flops == 2 * unit_input + unit_hidden + 2 * unit_hidden
    assert said.bptt_flops == 2 * unit_input + 2 * unit_hidden
    assert said.backward_steps == 3
    assert said.kept_bytes == 4 * T * B * (I + H + 4 * H)
    assert "fused" in said.forward
    assert "fused" in said.backward


def test_the_reason_is_named() -> None:
    layer = sf.GRU(I, H)
    assert "bfloat16" in sf.explain(layer.bfloat16(), torch.zeros(T, B, I, dtype=torch.bfloat16)).why
    said = sf.explain(sf.GRU(I, H, 2, bidirectional=True, feedback="bptt"), torch.zeros(T, B, I))
    assert "torch" in said.why
    assert said.backward_steps == 2 * T
    assert said.kept_bytes is None


def test_packed_and_batch_first_inputs_count_their_rows() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.zeros(5, I), torch.zeros(2, I)])
    said = sf.explain(sf.GRU(I, H, feedback="fused-bptt"), packed)
    assert said.forward_flops == 2 * 7 * 3 * H * (I + H)
    said = sf.explain(sf.RNN(I, H, batch_first=True, feedback="bptt"), torch.zeros(B, T, I))
    assert said.backward_steps == T


def test_printing_says_every_fact() -> None:
    lines = str(sf.explain(sf.LSTM(I, H, feedback="dsf"), torch.zeros(T, B, I))).splitlines()
    assert [line.split()[0] for line in lines] == ["rule", "forward", "backward", "why", "memory"]


def test_other_layers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"got GRU|got Linear"):
        sf.explain(nn.Linear(2, 3), torch.zeros(1, 2))


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("packed", [False, True])
def test_fused_bptt_is_exact(cell: str, packed: bool) -> None:
    torch.manual_seed(0)
    plain = getattr(nn, cell)(I, H, 2, bidirectional=True, dtype=torch.float64)
    ours = getattr(sf, cell)(I, H, 2, bidirectional=True, dtype=torch.float64, feedback="fused-bptt")
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    h = torch.randn(4, B, H, dtype=torch.float64, requires_grad=True)
    found = []
    for layer in (plain, ours):
        given = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([T, 4, 7]), enforce_sorted=False) if packed else x
        y, final = layer(given, (h, h) if cell == "LSTM" else h)
        outputs = [y.data if packed else y, *(final if cell == "LSTM" else (final,))]
        loss = sum(v.square().sum() for v in outputs)
        found.append([loss, *torch.autograd.grad(loss, [x, h, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@needs_kernels
def test_fused_bptt_runs_through_the_kernels() -> None:
    layer = sf.GRU(I, H, feedback="fused-bptt")
    assert "fused" in sf.explain(layer, torch.zeros(T, B, I)).backward
    with torch.profiler.profile() as profile:
        layer(torch.zeros(T, B, I))[0].sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "statefeed::layer_backward" in names
