"""What a step launches, predicted from its operators."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def predicted():
    """Launches by provider of a small student's step; in a process whose Triton is interpreted."""
    command = [sys.executable, str(BENCH / "launches.py"), "--json", "--size", "16"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # the script sets it itself
    done = subprocess.run(
        [*command, "--model", "cifar_resnet20", "--who", "timm", "mentorch"],
        env=environment, capture_output=True, text=True, check=True, timeout=200,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.slow
def test_reweighting_and_its_books_are_a_handful_of_launches(predicted):
    """Thirty more, which the metrics alone once took, are an eighth of this student's step."""
    ours, timms = (sum(predicted[who].values()) for who in ("mentorch", "timm"))
    assert ours - timms <= 10
    # Two to weigh and write the gradient, the ledger's and the tally's.
    assert predicted["mentorch"]["ours"] == 4
    # 19 convolutions, the images take no gradient; a product forward and two backward.
    for found in predicted.values():
        assert found["convolution"] == 19 + 2 * 19 - 1
        assert found["matrix multiply"] == 3


def test_lists_are_taken_in_chunks():
    from launches import of_call

    add, sgd = torch.ops.aten._foreach_add_.List, torch.ops.aten._fused_sgd_.default
    few, many = [torch.empty(4)] * 64, [torch.empty(4)] * 65
    assert of_call(add, (few, few)) == 1
    assert of_call(add, (many, many)) == 2
    assert of_call(sgd, ([torch.empty(4)] * 97,) * 3) == 3
    large = [torch.empty(321 * 65_536, device="meta")]  # pieces of a tensor count, too
    assert of_call(add, (large, large)) == 2


def test_views_launch_nothing_and_a_convolution_s_gradients_are_two():
    from launches import of_call

    aten = torch.ops.aten
    assert of_call(aten.view.default, (torch.empty(4), [2, 2])) == 0
    assert of_call(aten.add.Tensor, (torch.empty(4), torch.empty(4))) == 1
    assert of_call(aten.convolution_backward.default, (None, [True, True, False])) == 2
