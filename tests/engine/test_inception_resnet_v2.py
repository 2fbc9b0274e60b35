"""Inception-ResNet-v2 with less work, beside timm's: the same weights, values and statistics.

Most tests take one block a stage, so that they are quick in float64: at 96 pixels the last images
are 1×1 (nothing but the batch to normalise over), at 107 they are 2×2 and odd before.
"""

from collections import Counter
from copy import deepcopy

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import convert_sync_batchnorm
from torch.utils._python_dispatch import TorchDispatchMode

from mentorch.engine.config import StudentConfig
from mentorch.engine.parallel import flatten_buffers
from mentorch.engine.student import create_student, load_weights
from mentorch.engine.students import inception_resnet_v2

CPU = torch.device("cpu")
NAME = "inception_resnet_v2_fast"
STAGES = ("repeat", "repeat_1", "repeat_2")
FUSED = pytest.mark.parametrize("fused", [False, True])


@pytest.fixture(scope="module")
def whole():
    """timm's and ours, made from the same seed."""
    made = []
    for name in ("inception_resnet_v2", NAME):
        torch.manual_seed(0)
        made.append(timm.create_model(name, num_classes=5))
    return made


@pytest.fixture(scope="module")
def short(whole):
    """The same two with one block a stage, in float64 and channels-last."""
    made = []
    for model in whole:
        stages = {stage: getattr(model, stage) for stage in STAGES}
        for stage, blocks in stages.items():
            setattr(model, stage, blocks[:1])
        made.append(deepcopy(model).double().to(memory_format=torch.channels_last))
        for stage, blocks in stages.items():
            setattr(model, stage, blocks)
    return made


@pytest.fixture
def pair(short):
    return deepcopy(short)


def images(size=96, batch=2, in_chans=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, in_chans, size, size, generator=generator, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last)


def step(model, x):
    """Logits and all gradients of a random function of them."""
    model.zero_grad()
    logits = model(x)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits)
    logits.backward(upstream)
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found, expected):
    """To 1e-10 of each tensor's norm; of all gradients' norm where one is 0 but for rounding."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-12)
    scale = 1e-5 * torch.stack([g.norm() for g in expected[1].values()]).norm()
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).norm()
        assert error <= 1e-10 * max(gradient.norm(), scale), (name, error, gradient.norm())


def assert_same_state(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-14, msg=name)


class Calls(TorchDispatchMode):
    """Operators that were called, and what convolutions were given."""

    def __init__(self):
        super().__init__()
        self.counts, self.convolved = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket] += 1
        if func.overloadpacket is torch.ops.aten.convolution:
            self.convolved.append(args[0])
        return func(*args, **(kwargs or {}))


# Weights.


def test_weights_are_timms_to_the_last_bit(whole):
    theirs, ours = (model.state_dict() for model in whole)
    assert list(theirs) == list(ours)
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    for one, other in (whole, reversed(whole)):
        one.load_state_dict(other.state_dict())


def test_channels_and_classes_are_timms():
    """Shapes alone: the forward pass looks at neither."""
    with torch.device("meta"):
        theirs, ours = (
            timm.create_model(name, in_chans=1, num_classes=7).state_dict()
            for name in ("inception_resnet_v2", NAME)
        )
    assert {name: value.shape for name, value in theirs.items()} == {
        name: value.shape for name, value in ours.items()
    }
    assert ours["conv2d_1a.conv.weight"].shape[1] == 1
    assert ours["classif.weight"].shape[0] == 7


def test_the_classifier_may_have_another_width(pair, tmp_path):
    theirs, ours = pair
    save_file(
        {k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "w.safetensors"
    )
    ours.reset_classifier(3)
    with pytest.warns(UserWarning, match="for 5 classes, not 3"):
        load_weights(ours, tmp_path / "w.safetensors")


# Values, gradients, statistics.


@FUSED
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("size", "batch"), [(96, 3), (107, 2)])
def test_training_is_timms(pair, fused, checkpointing, size, batch):
    """Two steps: the second is the first that sees other running statistics than 0 and 1."""
    theirs, ours = pair
    ours.fused_norms = fused
    ours.set_grad_checkpointing(checkpointing)
    for x in (images(size, batch), 2 * images(size, batch) + 1):
        assert_same(step(ours, x), step(theirs, x))
    assert_same_state(ours, theirs)
    assert ours.conv2d_7b.bn.num_batches_tracked == 2


@FUSED
def test_evaluation_is_timms_and_changes_nothing(pair, fused):
    theirs, ours = pair
    ours.fused_norms = fused
    for model in pair:
        model(images())
        model.eval()
    before = deepcopy(ours.state_dict())
    assert_same(step(ours, images(107)), step(theirs, images(107)))
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name]), name


@FUSED
def test_norms_of_another_kind_run_as_they_are(pair, fused):
    """Without a process group a synchronised norm takes CPU tensors, as a plain one would."""
    theirs, ours = pair
    ours.fused_norms = fused
    ours = convert_sync_batchnorm(ours)
    ours.set_grad_checkpointing(True)
    norms = {m for m in ours.modules() if type(m).__name__ == "SyncBatchNormAct"}
    called = set()
    for norm in norms:
        norm.register_forward_hook(lambda module, *_: called.add(module))
    assert_same(step(ours, images(107)), step(theirs, images(107)))
    assert_same_state(ours, theirs)
    assert norms
    assert called == norms  # their own forward pass talks to the other ranks


@FUSED
def test_a_frozen_norm_stays_as_it_is_beside_its_siblings(pair, fused):
    theirs, ours = pair
    ours.fused_norms = fused
    for model in pair:
        for frozen in (model.repeat[0].branch1[0].bn, model.mixed_5b.branch2[1].bn):
            frozen.running_mean.fill_(0.5)
            frozen.eval()
    assert_same(step(ours, images(107)), step(theirs, images(107)))
    assert_same_state(ours, theirs)
    assert not ours.repeat[0].branch1[0].bn.num_batches_tracked


@FUSED
def test_all_norms_may_be_frozen(pair, fused):
    """As fine-tuning does; what comes before them is trained."""
    theirs, ours = pair
    ours.fused_norms = fused
    for model in pair:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    assert_same(step(ours, images(107)), step(theirs, images(107)))
    assert_same_state(ours, theirs)


def test_a_pruned_student_is_timms(pair):
    features = []
    for model in pair:
        model.eval().prune_intermediate_layers([2])
        features.append(model.forward_intermediates(images(107), [2], intermediates_only=True)[0])
    torch.testing.assert_close(*features)
    assert pair[1].forward_features(images(107)).shape[1] == 320


def test_bfloat16_is_as_near_to_float64_as_timms(pair):
    """At 139 pixels and in evaluation, where nothing is divided by the spread of two values."""
    x, errors = images(139), []
    for model in pair:
        model.eval()
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model.float()(x.float())
        assert rough.dtype == torch.bfloat16
        errors.append((rough - exact).norm() / exact.norm())
    assert errors[1] <= 2 * errors[0]


# The work that is saved.


def test_siblings_are_one_convolution_and_counters_one_addition(pair):
    """1×1 side by side: 3 in mixed_5b, block35 and mixed_7a, 2 in block17 and both block8."""
    counts = []
    for model in pair:
        with Calls() as calls:
            model(images())
        counts.append(calls.counts)
    aten = torch.ops.aten
    saved = counts[0][aten.convolution] - counts[1][aten.convolution]
    assert saved == 2 + 2 + 2 + 1 + 1 + 1
    assert counts[1][aten._foreach_add_] == 1
    assert counts[1][aten.add_] == 0  # timm's: one a norm


@FUSED
def test_channels_last_goes_all_the_way(pair, fused):
    _, ours = pair
    ours.fused_norms = fused
    with Calls() as calls:
        ours(images(107))
    assert len(calls.convolved) > 30
    assert all(x.stride(1) == 1 for x in calls.convolved)


@FUSED
def test_checkpointing_keeps_less(pair, fused):
    _, ours = pair
    ours.fused_norms, kept = fused, []
    for checkpointing in (False, True):
        ours.set_grad_checkpointing(checkpointing)
        kept.append(0)

        def keep(tensor):
            kept[-1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            ours(images(107))
    assert kept[1] < 0.5 * kept[0]


# What others do with students.


def test_it_is_one_graph(pair):
    """Tracing alone; what follows it takes long, and has the test below."""
    theirs, ours = pair
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    logits, gradients = step(compiled, images())
    found = {name.removeprefix("_orig_mod."): value for name, value in gradients.items()}
    assert_same((logits, found), step(theirs, images()))
    assert_same_state(ours, theirs)


def test_a_recomputed_block_compiles_and_counts_once(pair):
    """One block: the compiler takes seconds for a whole student."""
    theirs, ours = (model.repeat[0] for model in pair)
    x = images(5, 2, 320)

    def run(x):
        return inception_resnet_v2._again(ours, x, False)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    found, expected = compiled(x), theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for y in (found, expected):
        y.square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10)
    statistics = {n: b for n, b in theirs.named_buffers() if not n.endswith("num_batches_tracked")}
    for name, value in statistics.items():
        found = ours.get_buffer(name)
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-14, msg=name)


def test_a_copy_is_on_its_own(pair):
    """Averaged weights are such a copy."""
    theirs, ours = pair
    copy, before = deepcopy(ours), deepcopy(ours.state_dict())
    assert_same(step(copy, images()), step(theirs, images()))
    assert_same_state(copy, theirs)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name]), name


@FUSED
def test_flat_buffers_are_the_buffers(pair, fused):
    theirs, ours = (model.float() for model in pair)
    ours.fused_norms = fused
    flat = flatten_buffers(ours)
    before = flat.clone()
    for model in (ours, theirs):
        model(images(107).float())
    assert flat.ne(before).float().mean() > 0.9
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-3, atol=1e-4)


def test_options_reach_the_student():
    config = StudentConfig(name=NAME, fused_norms=True, checkpointing=True)
    ours = create_student(config, 5, torch.device("meta"))
    assert ours.fused_norms
    assert ours.grad_checkpointing
    timms = create_student(StudentConfig(name="test_resnet", checkpointing=True), 5, CPU)
    assert timms.grad_checkpointing


# The second has no such method, the third says by an assertion that it cannot.
@pytest.mark.parametrize(
    ("name", "option", "said"),
    [
        ("test_resnet", "fused_norms", "test_resnet has no fused norms"),
        ("small_mlp", "checkpointing", "small_mlp cannot recompute"),
        ("dla46x_c", "checkpointing", "dla46x_c cannot recompute"),
    ],
)
def test_options_that_a_student_has_not_are_refused(name, option, said):
    with pytest.raises(ValueError, match=said):
        create_student(StudentConfig(name=name, **{option: True}), 5, CPU)
