"""The plain torch backend against the written-out reference, over ragged batches, GQA groups and windows."""

import pytest
import torch
from attention_reference import make_case

from nanovllm.attention.torch_backend import TorchAttention

SHAPES = [
    ([1], [1]),
    ([5, 1, 16], [5, 40, 16]),
    ([1, 1, 1], [15, 16, 17]),
    ([33, 2], [50, 18]),
]


@pytest.mark.parametrize(("query_lens", "context_lens"), SHAPES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 7])
def test_torch_backend_equals_the_reference(query_lens, context_lens, heads, window):
    case = make_case(query_lens, context_lens, heads=heads, head_dim=32, windows=(None, window))
    torch.testing.assert_close(
        case.run(TorchAttention(case.spec), 1), case.expected(1), atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    "words", [{"softcap": 2.0}, {"sinks": True}, {"value_dim": 24}, {"softcap": 2.0, "sinks": True}]
)
def test_softcap_sinks_and_value_size(words):
    case = make_case([5, 1, 16], [5, 40, 16], head_dim=32, windows=(None, 7), **words)
    for layer in range(2):
        torch.testing.assert_close(
            case.run(TorchAttention(case.spec), layer), case.expected(layer), atol=2e-6, rtol=1e-5
        )


def test_slot_minus_one_writes_to_no_page_of_a_sequence():
    case = make_case([16, 1], [16, 20])
    backend = TorchAttention(case.spec)
    before = case.run(backend, 0)
    backend.meta.slot_mapping.fill_(-1)
    backend.begin(backend.meta)
    backend.store(0, torch.full((17, 2, 64), 9.0), torch.full((17, 2, 64), 9.0))
    assert torch.equal(backend.attend(0, torch.cat(case.q)), before)
