"""What a step is counted to need, on the student of the paper and on nets small enough to check.

Inception-ResNet-v2 is traced once, at 2 images: counts of an image do not depend on the batch.
"""

import json

import pytest
import roofline
import torch
from data_session import device
from report import render
from roofline_count import Convolution, count_model, count_step, optimiser_launches
from roofline_measure import Speeds, typical
from roofline_ops import Op, fused_bytes, groups
from torch import nn

from mentorch.engine.kernel_families import family


@pytest.fixture(scope="module")
def irv2():
    return count_step("inception_resnet_v2", 299, 2)


def test_the_paper_s_student_is_as_large_as_was_counted_elsewhere(irv2):
    assert irv2.parameters / 1e6 == pytest.approx(55.84, abs=0.005)
    assert len(irv2.convolutions) == 244
    assert irv2.macs / 1e9 == pytest.approx(13.16, abs=0.005)


def test_its_launches_and_its_odd_channels_are_about_what_was_counted_elsewhere(irv2):
    """About 2,100 without autocast's casts of weights and gradients; half of the work off 64."""
    casts = sum(op.name == "aten::_to_copy" for op in irv2.ops)
    assert irv2.launches - casts == pytest.approx(2100, rel=0.05)
    assert irv2.share(off_64=True) == pytest.approx(0.5, abs=0.01)


def test_backward_computes_twice_what_forward_does_less_the_images_gradient(irv2):
    first = irv2.convolutions[0]
    assert irv2.flop == 2 * 2 * (3 * irv2.macs - first.macs)


def test_every_operator_has_a_family_and_fusing_saves_bytes(irv2):
    assert {op.name for op in irv2.ops if family(op.name) == "other"} == set()
    assert irv2.fused_bytes < irv2.eager_bytes
    assert sum(irv2.bytes_by_family().values()) == irv2.eager_bytes


def _counted(*layers):
    """Layers of 64 channels on an image of 4×4: in bf16 every activation has M bytes."""
    return count_model(lambda: _Head(nn.Sequential(*(make() for make in layers))), (1, 64, 4, 4))


class _Head(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x).mean((2, 3))


def _conv():
    return nn.Conv2d(64, 64, 1, bias=False)


M = 64 * 16 * 2


def _forward(count, name):
    return [op for op in count.ops if op.name == name and not op.backward]


def test_bytes_of_an_operator_are_its_inputs_and_outputs_once():
    count = _counted(_conv, nn.ReLU)
    (conv,) = _forward(count, "aten::convolution")
    assert conv.bytes == 2 * M + 64 * 64 * 2  # image, output, weights
    (relu,) = _forward(count, "aten::relu")
    assert relu.bytes == 2 * M
    casts = [op.bytes for op in _forward(count, "aten::_to_copy")]
    assert 64 * 64 * (4 + 2) in casts  # the weights, from float32


def test_a_convolution_s_backward_launches_one_kernel_for_each_gradient():
    count = _counted(_conv, _conv)
    backward = [op.launches for op in count.ops if op.name == "aten::convolution_backward"]
    assert backward == [2, 1]  # the images need no gradient


def _by_hand(*given):
    """Operators (name, storages read, storages written, backward); capitals have 2 bytes, not 1."""
    ops, writer = [], {}
    for at, (name, reads, writes, backward) in enumerate(given):
        sizes = [{s: 1 + s.isupper() for s in storages} for storages in (reads, writes)]
        op = Op(name, 0, *sizes, launches=1, backward=bool(backward))
        op.made_by = {s: writer[s] for s in reads if s in writer}
        writer |= dict.fromkeys(writes, at)
        ops.append(op)
    return ops


CONV, ADD, RELU, CAT = "aten::convolution", "aten::add", "aten::relu_", "aten::cat"


@pytest.mark.parametrize(
    ("given", "sharing", "expected"),
    [
        pytest.param(
            [(CONV, "a", "b", 0), ("aten::native_batch_norm", "b", "c", 0), (RELU, "c", "c", 0)],
            [[0], [1, 2]],
            2 + 2,  # the norm's output is never in memory
            id="a norm and its ReLU",
        ),
        pytest.param(
            [(RELU, "a", "a", 0), (CONV, "a", "b", 0), (ADD, "ab", "c", 0)],
            [[0], [1], [2]],
            2 + 2 + 3,  # the convolution stands between: one kernel cannot be before and after it
            id="a residual around a convolution",
        ),
        pytest.param(
            [(RELU, "a", "b", 0), ("aten::threshold_backward", "gb", "h", 1)],
            [[0], [1]],
            2 + 3,
            id="never from forward into backward",
        ),
        pytest.param(
            [(ADD, "ab", "c", 0), (ADD, "ac", "d", 0), (CONV, "c", "e", 0)],
            [[0, 1], [2]],
            (2 + 2) + 2,  # a once; c is written, because it is used outside
            id="what is used outside is written",
        ),
        pytest.param(
            [
                *((CONV, "a", "b", 0), (RELU, "b", "c", 0)),
                *((CONV, "c", "d", 0), (RELU, "d", "e", 0)),
                *((CAT, "ce", "F", 0), (CONV, "F", "g", 0)),
            ],
            [[0], [1], [2], [3, 4], [5]],
            2 + 2 + 2 + (1 + 1) + 3,  # c was written into its place in F: neither read nor written
            id="a concatenation of two branches",
        ),
        pytest.param(
            [(CONV, "a", "b", 0), (CAT, "ab", "C", 0)],
            [[0], [1]],
            2 + (2 + 2),  # a convolution writes where it likes: its output is copied
            id="a concatenation of a convolution's output",
        ),
    ],
)
def test_fused_bytes_by_hand(given, sharing, expected):
    ops = _by_hand(*given)
    assert sorted(groups(ops)) == sharing
    assert sum(fused_bytes(ops).values()) == expected


def test_an_optimiser_takes_48_tensors_or_320_pieces_at_a_time():
    small = [torch.empty(4, 4, device="meta")] * 49
    assert optimiser_launches(small) == 2
    assert optimiser_launches([torch.empty(320, 65_536, device="meta")]) == 1
    assert optimiser_launches([torch.empty(321, 65_536, device="meta")]) == 2
    assert (
        optimiser_launches([torch.empty(3, 3, device="meta"), torch.empty(3)]) == 2
    )  # decay apart


def _layer(macs, filters=64):
    return Convolution(64, filters, (3, 3), (1, 1), (7, 7), 1, macs)


def test_typical_shapes_are_those_of_most_work_together():
    many, large, little = _layer(6), _layer(10, filters=128), _layer(1, filters=32)
    assert typical([large, many, many, little], 2) == [many, large]


def _speeds(**changes):
    given = {"copy_bytes_s": 1e9, "matmul_flop_s": {"bf16": 1e12, "fp32": 1e11}}
    given |= {"conv_flop_s": {}, "launch_us": 10.0, "graph_launch_us": None}
    return Speeds(**given | changes)


def test_roofs_are_what_a_step_needs_over_what_the_device_does(irv2):
    found = roofline.roofs(irv2, _speeds())
    assert found == {
        "compute, measured": pytest.approx(2 * 1e12 / irv2.flop),
        "memory, eager": pytest.approx(2 * 1e9 / irv2.eager_bytes),
        "memory, fused": pytest.approx(2 * 1e9 / irv2.fused_bytes),
        "launches, eager": pytest.approx(2 * 1e5 / irv2.launches),
    }
    on_gpu = roofline.roofs(irv2, _speeds(graph_launch_us=1.0), peak_flop_s=2e12)
    assert on_gpu["launches, CUDA graph"] == pytest.approx(10 * on_gpu["launches, eager"])
    assert on_gpu["compute, data sheet"] == pytest.approx(2 * on_gpu["compute, measured"])


def test_the_lowest_roof_binds_among_those_that_are_known():
    found = {"compute, measured": 3.0, "memory, eager": 2.0, "memory, fused": 4.0}
    assert roofline.binding(found, roofline.EAGER) == "memory, eager"
    assert roofline.binding(found, roofline.AT_BEST) == "compute, measured"


def test_a_model_is_counted_measured_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(roofline, "measure", lambda *_, **__: _speeds())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record = roofline.run("cifar_resnet20", 32, 4, 10, count_only=False)
    printed = capsys.readouterr().out
    assert "0.27 M parameters, 19 convolutions" in printed
    assert "binds: eager" in printed
    path = roofline.write([record], tmp_path)
    kept = json.loads(path.read_text())
    assert path.name.startswith("roofline-")
    assert kept["device"] == device()
    assert kept["models"][0]["roofs_images_s"].keys() == record["roofs_images_s"].keys()
    assert "roofline" not in render(tmp_path), "RESULTS.md has no place for it"


def test_speeds_are_measured(monkeypatch):
    import roofline_measure

    seconds = roofline_measure.seconds
    monkeypatch.setattr(roofline_measure, "seconds", lambda run: seconds(run, 1e-3))
    found = roofline_measure.measure(
        torch.device("cpu"), [_layer(64 * 64 * 9 * 49)], batch=1, matmul_n=64, copy_size=2**16
    )
    (conv,) = found.conv_flop_s.values()
    assert list(found.conv_flop_s) == ["64→64, 3×3, stride 1×1, out 7×7"]
    assert min(found.copy_bytes_s, *found.matmul_flop_s.values(), conv, found.launch_us) > 0
    assert found.graph_launch_us is None
