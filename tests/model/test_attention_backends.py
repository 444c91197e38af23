"""Attention on a GPU: no plan for each new length of a batch."""

import time

import pytest
import torch
from torch.nn import functional as F

from b2t.model.attention_backends import without_plans_per_length


@pytest.fixture(autouse=True)
def as_before():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_cudnn_is_left_out():
    without_plans_per_length()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_new_length_costs_no_plan_on_a_gpu():
    without_plans_per_length()

    def seconds(length):
        q = torch.randn(8, 4, length, 32, device="cuda", dtype=torch.float16, requires_grad=True)
        mask = torch.ones(8, 1, 1, length, dtype=torch.bool, device="cuda")
        torch.cuda.synchronize()
        began = time.perf_counter()
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask).sum().backward()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(100)
    times = [seconds(length) for length in range(101, 121)]
    again = [seconds(length) for length in range(101, 121)]
    # With cuDNN the first time takes a hundred times the second.
    assert sum(times) < 10 * sum(again) + 0.5
