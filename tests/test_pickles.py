"""Whole layers pickled by version 0.1 load, with the meaning that their rules had then."""

import base64
import json
import pickle
from pathlib import Path

import pytest
import torch

import statefeed as sf

# GRU(1, 2) under torch.manual_seed(0), pickled at commit 634e57b, by the rule as it was spelled then.
PICKLES = json.loads((Path(__file__).parent / "pickles_of_0.1.json").read_text())
TODAY = {"bptt": "torch", "fused-bptt": "bptt"}


@pytest.mark.parametrize("rule", PICKLES)
def test_a_layer_of_version_0_1_loads(rule: str) -> None:
    layer = pickle.loads(base64.b64decode(PICKLES[rule]))
    torch.manual_seed(0)
    expected = sf.GRU(1, 2, feedback=TODAY.get(rule, rule))
    assert type(layer) is sf.GRU
    assert layer.feedback == expected.feedback
    x = torch.ones(3, 1, 1)
    for ours, theirs in zip(
        *(torch.autograd.grad(m(x)[0].sum(), list(m.parameters())) for m in (layer, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", sf.__all__)
def test_public_names_are_pickled_and_documented_where_users_import_them(name: str) -> None:
    assert getattr(sf, name).__module__ == "statefeed"


def test_a_new_pickle_names_no_file_of_the_package() -> None:
    assert b"statefeed.layers" not in pickle.dumps(sf.GRU(1, 2, feedback="dsf"))
