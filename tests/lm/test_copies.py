"""Tensors come to the host together as they were."""

import pytest
import torch

from utils.lm.model import packed, to_host, unpacked, upload

TENSORS = [
    torch.arange(3, dtype=torch.int32),
    torch.tensor([[1.5, -2.0], [3.0, 4.0]], dtype=torch.bfloat16).T,
    torch.tensor([True]),
    torch.tensor([0.1], dtype=torch.float64),
    torch.empty(0, 4),
    torch.tensor([[2**53 + 1]]),
]


def test_tensors_of_any_dtype_and_shape_come_back_from_their_bytes():
    for got, wanted in zip(unpacked(packed(*TENSORS), *TENSORS), TENSORS, strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(got, wanted)


def test_what_is_on_the_host_stays_as_it_is():
    assert [got is wanted for got, wanted in zip(to_host(*TENSORS), TENSORS, strict=True)] == [True] * len(TENSORS)
    assert torch.equal(upload([1, 2], torch.device("cpu")), torch.tensor([1, 2]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_goes_up_and_comes_down_is_the_same():
    device = torch.device("cuda")
    for got, wanted in zip(to_host(*(upload(tensor, device) for tensor in TENSORS)), TENSORS, strict=True):
        assert torch.equal(got, wanted)
