"""The switch for TF32: what is set inside, that every getter of torch answers, and that it is restored."""

import pytest
import torch

from statefeed.bench.precision import flags, onednn_bfloat16, tf32

MATMUL, CUDNN, ONEDNN = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn.matmul


@pytest.fixture(params=["as shipped", "old setters", "medium", "new setters"])
def before(request: pytest.FixtureRequest):
    """The settings that a caller may have made, undone afterwards."""
    precisions = [(switch, switch.fp32_precision) for switch in (MATMUL, CUDNN.rnn, CUDNN.conv, ONEDNN)]
    if request.param == "old setters":
        MATMUL.allow_tf32, CUDNN.allow_tf32 = True, False
    elif request.param == "medium":
        torch.set_float32_matmul_precision("medium")
    elif request.param == "new setters":
        MATMUL.fp32_precision, CUDNN.rnn.fp32_precision = "tf32", "ieee"
    yield request.param
    torch.set_float32_matmul_precision("highest")
    CUDNN.allow_tf32 = True
    for switch, precision in precisions:
        switch.fp32_precision = precision
    assert "mixed" not in flags().values()


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.usefixtures("before")
def test_no_getter_raises_and_every_setting_is_restored(allowed: bool) -> None:
    found = flags()
    with tf32(allowed):
        name = "tf32" if allowed else "ieee"
        assert flags() == {
            "cuda.matmul.fp32_precision": name,
            "cuda.matmul.allow_tf32": allowed,
            "cudnn.rnn.fp32_precision": name,
            "cudnn.conv.fp32_precision": name,
            "cudnn.allow_tf32": allowed,
            "float32_matmul_precision": "high" if allowed else "highest",
        }
    after = flags()
    assert {name: after[name] for name, value in found.items() if value != "mixed"} == {
        name: value for name, value in found.items() if value != "mixed"
    }


def test_onednn_may_compute_in_bfloat16_and_no_getter_raises() -> None:
    found, precision = flags(), ONEDNN.fp32_precision
    with onednn_bfloat16():
        assert ONEDNN.fp32_precision == "bf16"
        assert "mixed" not in flags().values()
    assert (flags(), ONEDNN.fp32_precision) == (found, precision)


def test_settings_are_restored_after_an_error() -> None:
    found = flags()
    with pytest.raises(ValueError, match="inside"), tf32(True):
        raise ValueError("inside")
    assert flags() == found


def test_new_setters_alone_make_the_old_getters_raise(before: str) -> None:
    """What the switch is for: a torch that mends this makes it simpler."""
    assert ("mixed" in flags().values()) == (before == "new setters")


@pytest.mark.parametrize("allowed", [False, True])
def test_getters_of_the_settings_do_not_raise(allowed: bool) -> None:
    x = torch.randn(3, 4)
    with tf32(allowed):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: x @ x.T, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), x @ x.T)
        with CUDNN.flags(enabled=True, allow_tf32=allowed), torch.profiler.profile():
            torch.mm(x, x.T)
        assert "mixed" not in flags().values()
