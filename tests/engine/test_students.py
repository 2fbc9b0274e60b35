"""Our students: parameter counts worked out by hand, shapes, gradients, and their way into timm."""

import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mentorch.engine.config import StudentConfig
from mentorch.engine.student import create_student
from mentorch.engine.students import STUDENTS
from mentorch.engine.students.paper import Conv3x3, LocalResponseNorm, WideResNet, WideUnit
from mentorch.engine.students.small import BasicUnit

CPU = torch.device("cpu")
# The wide net's own width costs seconds a forward pass; units of 1 and narrow filters do not.
# Inception-ResNet-v2 has its own file, and takes no image of 32 pixels.
LIGHT = [n for n in STUDENTS if n not in ("mentornet_resnet101", "inception_resnet_v2_fast")]
SIZES = {"mentornet_resnet101": 32, "mentornet_inception": 32, "small_cnn": 28, "small_mlp": 8}


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


def student(name, *, num_classes=10, in_chans=3, img_size=None, drop_rate=0.0, **config):
    config = StudentConfig(name=name, drop_rate=drop_rate, **config)
    return create_student(config, num_classes, CPU, in_chans=in_chans, img_size=img_size)


def images(name, batch=2, in_chans=3, size=None):
    size = size or SIZES.get(name, 32)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, in_chans, size, size, generator=generator)


def narrow():
    return WideResNet(filters=(8, 16, 24, 32), units=2)


# Parameter counts.


def conv(channels, out, kernel, bias=False):
    return channels * out * kernel**2 + out * bias


def linear(features, out):
    return features * out + out


def wide_stage(channels, out):
    """9 units of norm, conv, norm, conv; a norm has 2 parameters a channel."""
    first = 2 * channels + conv(channels, out, 3) + 2 * out + conv(out, out, 3)
    return first + 8 * (2 * out + conv(out, out, 3) + 2 * out + conv(out, out, 3))


def resnet(units):
    def stage(channels, out):
        return conv(channels, out, 3) + (2 * units - 1) * conv(out, out, 3) + 2 * units * 2 * out

    return conv(3, 16, 3) + 32 + stage(16, 16) + stage(16, 32) + stage(32, 64) + linear(64, 10)


COUNTS = {
    "mentornet_resnet101": (
        conv(3, 16, 3) + wide_stage(16, 160) + wide_stage(160, 320) + wide_stage(320, 640)
        # the norm after the last unit
        + 2 * 640 + linear(640, 10),
        84_627_034,
    ),
    "mentornet_inception": (
        conv(3, 64, 5, bias=True) + conv(64, 64, 5, bias=True)
        + linear(64 * 8 * 8, 384) + linear(384, 192) + linear(192, 10),
        1_756_426,
    ),
    "cifar_resnet20": (resnet(3), 269_722),
    "cifar_resnet32": (resnet(5), 464_154),
    "cifar_resnet56": (resnet(9), 853_018),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_those_of_the_sources(name):
    by_hand, figure = COUNTS[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    assert count(model) == by_hand == figure


@pytest.mark.parametrize(
    ("name", "in_chans", "img_size", "expected"),
    [
        # the small ones at the images they are for, then at larger ones in colour
        ("small_cnn", 1, 28, conv(1, 16, 5, True) + conv(16, 32, 3, True) + linear(32 * 49, 128)),
        ("small_cnn", 3, 32, conv(3, 16, 5, True) + conv(16, 32, 3, True) + linear(32 * 64, 128)),
        ("small_mlp", 1, 8, linear(64, 256) + linear(256, 256)),
        ("small_mlp", 3, 16, linear(768, 256) + linear(256, 256)),
    ],
)
def test_parameter_counts_follow_the_images(name, in_chans, img_size, expected):
    classifier = linear(128 if name == "small_cnn" else 256, 7)
    model = student(name, num_classes=7, in_chans=in_chans, img_size=img_size)
    assert count(model) == expected + classifier


# Registration and creation.


def test_names_stay_clear_of_timm():
    """Every entrypoint of timm's own is an attribute of timm.models; ours are not."""
    assert hasattr(timm.models, "resnet18")
    assert not [name for name in STUDENTS if hasattr(timm.models, name)]


@pytest.mark.parametrize("name", LIGHT)
def test_timm_makes_them(name, tmp_path):
    assert timm.is_model(name)
    options = {"cache_dir": tmp_path, "pretrained_cfg_overlay": {"crop_pct": 1.0}}
    model = timm.create_model(name, num_classes=7, drop_rate=0.1, in_chans=2, **options)
    assert model(images(name, in_chans=2)).shape == (2, 7)
    assert model.num_classes == 7


def test_there_are_no_published_weights():
    with pytest.raises(RuntimeError, match="pretrained"):
        timm.create_model("small_mlp", pretrained=True)


@pytest.mark.parametrize("name", ["resnet10t", "small_cnn", "small_mlp", "mentornet_inception"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_create_student_tells_size_and_channels_to_whom_it_concerns(name, in_chans):
    """36: no student's default. resnet10t is a convnet of timm, which rejects an img_size."""
    model = student(name, in_chans=in_chans, img_size=36, num_classes=5)
    assert model(images(name, in_chans=in_chans, size=36)).shape == (2, 5)


@pytest.mark.parametrize("name", ["cifar_resnet18", "small_cnm", "mentornet_resnet"])
def test_an_unknown_name_near_ours_suggests_ours(name):
    near = {"cifar_resnet18": "cifar_resnet20", "small_cnm": "small_cnn"}
    with pytest.raises(ValueError, match=rf"Near it: .*{near.get(name, 'mentornet_resnet101')}.*;"):
        student(name)


def test_an_unknown_name_near_nothing_lists_ours():
    with pytest.raises(ValueError, match=r"Near it: nothing; .*small_mlp"):
        student("qqqq")


# Forward and backward.


@pytest.mark.parametrize("name", ["cifar_resnet20", "narrow"])
@pytest.mark.parametrize("size", [28, 32, 27])  # 27: odd before every stride
def test_convolutional_students_take_any_size(name, size):
    model = narrow() if name == "narrow" else student(name)
    assert model(images(name, size=size)).shape == (2, 10)


@pytest.mark.parametrize("size", [8, 27, 28, 32])
@pytest.mark.parametrize("name", ["small_cnn", "small_mlp", "mentornet_inception"])
def test_others_are_made_for_one_size(name, size):
    model = student(name, img_size=size)
    assert model(images(name, size=size)).shape == (2, 10)
    with pytest.raises(ValueError, match=f"made for images of {size}×{size} and got 12×12"):
        model(images(name, size=12))


@pytest.mark.parametrize("name", [*LIGHT, "narrow"])
def test_gradients_reach_every_parameter(name):
    torch.manual_seed(0)
    model = narrow() if name == "narrow" else student(name)
    labels = torch.arange(16) % 10
    F.cross_entropy(model(images(name, batch=16)), labels).backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter
        assert value.grad.abs().sum() > 0, parameter


@pytest.mark.parametrize("name", [*LIGHT, "narrow"])
def test_drop_rate_acts_in_training_only(name):
    def make(drop_rate):
        torch.manual_seed(0)
        if name == "narrow":
            return WideResNet(filters=(8, 16, 24, 32), units=1, drop_rate=drop_rate)
        return student(name, drop_rate=drop_rate)

    x, dropping = images(name), make(0.5)
    assert not torch.equal(dropping(x), dropping(x))
    never = make(0.0)
    torch.testing.assert_close(never(x), never(x), rtol=0, atol=0)
    torch.testing.assert_close(make(0.5).eval()(x), make(0.0).eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", LIGHT)
def test_runs_in_bf16(name, channels_last):
    model, x = student(name, channels_last=channels_last).eval(), images(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert half.dtype == torch.bfloat16
    full = model(x)
    # bf16 keeps 8 bits; the deepest net has 56 layers of them
    assert (half - full).norm() < 0.1 * full.norm()


@pytest.mark.parametrize("name", [*LIGHT, "narrow"])
def test_logits_start_out_at_a_trainable_scale(name):
    """The first loss is some nats: chance is ln 10 = 2.3, and sums of residuals start above it."""
    torch.manual_seed(0)
    model = narrow() if name == "narrow" else student(name)
    loss = F.cross_entropy(model(images(name, batch=64)), torch.arange(64) % 10)
    assert 1.5 < loss < 10


def test_the_wide_student_runs_as_released():
    """One image of 8×8: the smallest that keeps 2×2 pixels to the end."""
    model = student("mentornet_resnet101", num_classes=100).eval()
    with torch.no_grad():
        assert model(images("mentornet_resnet101", batch=1, size=8)).shape == (1, 100)


# What is easy to get subtly wrong.


def test_units_of_the_wide_student_as_released():
    """With the residual branch silenced, what is left is the shortcut."""
    x = images("narrow", in_chans=4, size=8)

    def shortcut(**kwargs):
        unit = WideUnit(4, 8, **kwargs)
        torch.nn.init.zeros_(unit.conv2.weight)
        torch.nn.init.constant_(unit.norm1.bias, 3.0)
        return unit.eval()(x)

    plain = shortcut(stride=2)
    assert plain.shape == (2, 8, 4, 4)
    torch.testing.assert_close(plain[:, 2:6], F.avg_pool2d(x, 2))
    assert not plain[:, :2].any()
    assert not plain[:, 6:].any()
    # the first unit: leaky ReLU, then norm (fresh: divides by √1.001, adds the bias), then branch
    activated = F.leaky_relu(x, 0.1) / 1.001**0.5 + 3
    torch.testing.assert_close(shortcut(shared=True)[:, 2:6], activated)


def test_strided_convolution_is_aligned_as_in_tensorflow():
    """At an even size nothing is padded on the left: the first window begins at the first pixel."""
    conv, x = Conv3x3(1, 1, stride=2), images("narrow", in_chans=1, size=8)
    with torch.no_grad():
        conv.weight.zero_()[0, 0, 0, 0] = 1
    torch.testing.assert_close(conv(x), x[:, :, ::2, ::2])


def test_option_a_shortcut():
    x, unit = images("cifar", in_chans=4, size=7), BasicUnit(4, 8)
    torch.nn.init.zeros_(unit.norm2.weight)
    out = unit(x)
    torch.testing.assert_close(out[:, 2:6], x[:, :, ::2, ::2].relu())
    assert not out[:, :2].any()
    assert not out[:, 6:].any()


def test_local_response_norm_is_that_of_tensorflow():
    """x / (1 + 0.001/9 · Σ x²)^0.75 over channels c−4 … c+4; large x, or nothing would show."""
    x = 100 * images("lrn", in_chans=12, size=3).double()
    expected = torch.empty_like(x)
    for c in range(12):
        window = x[:, max(0, c - 4) : c + 5].square().sum(1)
        expected[:, c] = x[:, c] / (1 + 0.001 / 9 * window) ** 0.75
    torch.testing.assert_close(LocalResponseNorm()(x.float()), expected.float())
    channels_last = x.float().to(memory_format=torch.channels_last)
    torch.testing.assert_close(LocalResponseNorm()(channels_last), expected.float())


def test_small_cnn_memorises_wrong_labels():
    """256 random images with random labels: what label noise asks a student to be able to."""
    torch.manual_seed(0)
    model = student("small_cnn", in_chans=1, img_size=28)
    x, y = torch.randn(256, 1, 28, 28), torch.randint(10, (256,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(20):
        for batch in torch.randperm(256).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    assert (model(x).argmax(1) == y).float().mean() > 0.95


# Weights to start from: one student whose classifier timm knows, and one of ours.


@dataclass
class Marker:
    """Pickled, it makes a file where it is unpickled."""

    path: Path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def _started(name, path, num_classes=10):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return student(name, num_classes=num_classes, weights=path).state_dict()


@pytest.fixture(params=["test_resnet", "cifar_resnet20"])
def trained(request):
    torch.manual_seed(5)
    return request.param, student(request.param, channels_last=False).state_dict()


@pytest.mark.parametrize(
    ("file", "wrap"),
    [
        ("w.safetensors", None),
        ("w.pt", lambda state: state),
        ("w.pth", lambda state: {"state_dict": state, "epoch": 3}),
        ("w.pth.tar", lambda state: {"model": state, "best": torch.tensor(1.0)}),
        ("w.pt", lambda state: {f"module.{k}": v for k, v in state.items()}),
        ("w.pt", lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}),
        (
            "w.pt",
            lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
        ),
    ],
    ids=["safetensors", "pt", "state_dict", "model", "module", "both", "half"],
)
def test_a_student_starts_from_given_weights(trained, tmp_path, file, wrap):
    name, state = trained
    if wrap:
        torch.save(wrap(state), tmp_path / file)
    else:
        save_file(state, tmp_path / file)
    torch.manual_seed(6)
    found = _started(name, tmp_path / file)
    assert found.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4)  # of half precision
        assert found[key].dtype == value.dtype


@pytest.mark.parametrize("had", [7, 0])
def test_a_classifier_of_another_width_is_left_fresh(trained, tmp_path, had):
    name, state = trained
    other = {k: v[:had] if k.startswith("fc.") else v for k, v in state.items()}
    if not had:  # a backbone that was saved alone
        other = {k: v for k, v in state.items() if not k.startswith("fc.")}
    torch.save(other, tmp_path / "w.pt")
    torch.manual_seed(6)
    fresh = student(name).state_dict()
    torch.manual_seed(6)
    with pytest.warns(UserWarning, match=f"for {had} classes, not 10: the student's stays fresh"):
        found = student(name, weights=tmp_path / "w.pt").state_dict()
    for key, value in found.items():
        assert torch.equal(value, (fresh if key.startswith("fc.") else state)[key]), key


def _without(state, name):
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: _without(s, "conv1.0.weight"), "conv1.0.weight is missing"),
        (lambda s: s | {"extra": torch.zeros(1)}, "extra is unknown"),
        (lambda s: s | {"conv1.0.weight": torch.zeros(1)}, r"conv1.0.weight is \[1\], not \["),
        (lambda s: s | {"fc.weight": torch.zeros(10, 3)}, r"fc.weight is \[10, 3\], not \["),
        (lambda s: s | {"fc.weight": torch.zeros(7, 3)}, r"fc.weight is \[7, 3\], not \["),
        (lambda s: {f"x.{k}": v for k, v in s.items()}, "and [0-9]+ more"),
    ],
)
def test_weights_of_another_student_are_refused_by_name(tmp_path, change, said):
    torch.save(change(student("test_resnet").state_dict()), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=said):
        _started("test_resnet", tmp_path / "w.pt")


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"state_dict": {"conv1.0.weight": m}}])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("file", ["w.pt", "w.pth.tar"])
def test_weights_that_would_run_code_are_refused(tmp_path, file, zipped, wrap):
    content = wrap(Marker(tmp_path / "ran"))
    torch.save(content, tmp_path / file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="refused: reading it would have run code"):
        _started("test_resnet", tmp_path / file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("w.pt", b"", "cannot be read"),
        ("w.pt", b"garbage", "cannot be read"),
        ("w.pt", pickle.dumps({"a": 1}), "cannot be read"),
        ("w.safetensors", b"garbage", "is no safetensors file"),
        ("w.npz", b"garbage", "weights are .safetensors, .pt"),
    ],
)
def test_what_holds_no_weights_is_said(tmp_path, file, content, said):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        _started("test_resnet", tmp_path / file)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.zeros(1)], {"state_dict": {"a": 1}}])
def test_a_file_without_a_state_dict_is_said(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        _started("test_resnet", tmp_path / "w.pt")


def test_weights_that_are_not_there_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file of weights .*absent\.pt"):
        _started("test_resnet", tmp_path / "absent.pt")
