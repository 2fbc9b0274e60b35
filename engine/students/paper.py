"""The two CIFAR students of MentorNet (Jiang et al., ICML 2018), as Google released them.

The definitions follow the TensorFlow 1 code of github.com/google/mentornet, down to where an
activation stands, because results on CIFAR are compared with those of the paper. The names are
the paper's: the "resnet101" is a wide residual net of 56 layers (Zagoruyko & Komodakis, 2016),
and the "inception" is a CifarNet without a single inception module.
"""

import math
from itertools import pairwise

import torch.nn.functional as F
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from mentorch.engine.students.registry import build, cfg, check_size, student

__all__ = ["CifarNet", "WideResNet", "mentornet_inception", "mentornet_resnet101"]

default_cfgs = generate_default_cfgs(
    {"mentornet_resnet101": cfg(3, 32), "mentornet_inception": cfg(3, 32)}
)

SLOPE = 0.1  # of the leaky ReLU


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.1)


class Conv3x3(nn.Conv2d):
    """3×3 convolution with TensorFlow's "SAME" padding: [B, C, H, W] to [B, out, H/s, W/s].

    At stride 2 and an even size TensorFlow pads the right and the bottom only. Padding all around
    would shift every window by a pixel against the average-pooled shortcut.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__(channels, out, 3, stride, padding=1 if stride == 1 else 0, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Convolves ``x``."""
        return super().forward(x if self.stride[0] == 1 else F.pad(x, (0, 1, 0, 1)))


class WideUnit(nn.Module):
    """Pre-activation unit: x + conv(act(conv(act(x)))), act = batch norm, then leaky ReLU.

    Args:
        channels: of the input.
        out: channels of the output; a growth is met by zeros on either side of the shortcut's.
        stride: of the first convolution and of the shortcut's average pooling.
        shared: activate before the shortcut branches off. In the released code that activation
            has the ReLU before the norm, unlike all others.
    """

    def __init__(self, channels: int, out: int, stride: int = 1, shared: bool = False) -> None:
        super().__init__()
        self.shared, self.stride, self.grow = shared, stride, (out - channels) // 2
        self.norm1, self.conv1 = _norm(channels), Conv3x3(channels, out, stride)
        self.norm2, self.conv2 = _norm(out), Conv3x3(out, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, out, H/stride, W/stride]."""
        if self.shared:
            x = activated = self.norm1(F.leaky_relu(x, SLOPE))
        else:
            activated = F.leaky_relu(self.norm1(x), SLOPE)
        residual: Tensor = self.conv1(activated)
        residual = self.conv2(F.leaky_relu(self.norm2(residual), SLOPE))
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride)
        if self.grow:
            x = F.pad(x, (0, 0, 0, 0, self.grow, self.grow))
        return residual + x


class WideResNet(nn.Module):
    """Three stages of wide units, average pooling, one linear layer.

    Args:
        num_classes: width of the classifier.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier, share of features; the released code has none.
        filters: channels of the first convolution and of the three stages.
        units: a stage has.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        filters: tuple[int, int, int, int] = (16, 160, 320, 640),
        units: int = 9,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        layers: list[nn.Module] = [Conv3x3(in_chans, filters[0], 1)]
        for stage, (channels, out) in enumerate(pairwise(filters)):
            first = stage == 0
            layers.append(WideUnit(channels, out, stride=1 if first else 2, shared=first))
            layers += [WideUnit(out, out) for _ in range(units - 1)]
        self.features = nn.Sequential(*layers, _norm(filters[-1]), nn.LeakyReLU(SLOPE))
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(filters[-1], num_classes)
        bound = math.sqrt(3 / filters[-1])
        nn.init.uniform_(self.fc.weight, -bound, bound)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes]; any H and W from 4 pixels on."""
        logits: Tensor = self.fc(self.drop(self.features(images).mean((2, 3))))
        return logits


def _truncated_normal(layer: nn.Conv2d | nn.Linear, std: float, bias: float) -> None:
    """TensorFlow's: redrawn beyond two standard deviations."""
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)


class LocalResponseNorm(nn.Module):
    """x / (1 + α Σ x²)^¾ over the 4 channels on either side, α = 0.001/9; kept in float32.

    In bfloat16 1 + α Σ x² would mostly round to 1.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape and dtype."""
        # torch divides its alpha by the window's size, TensorFlow does not.
        normed: Tensor = F.local_response_norm(x.float(), size=9, alpha=1e-3, beta=0.75, k=1.0)
        return normed.to(x.dtype)


class CifarNet(nn.Module):
    """Two 5×5 convolutions of 64 filters with max pooling and LRN, then 384, 192, classes.

    Args:
        num_classes: width of the classifier.
        in_chans: channels of the images.
        drop_rate: dropout after the first linear layer, where the released code has it; 0.2 there.
        img_size: side of the images, pixels. The first linear layer has 64·⌊size/4⌋² inputs: 4,096
            at 32 pixels, 3,136 at 28.
    """

    def __init__(
        self, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.2, img_size: int = 32
    ) -> None:
        super().__init__()
        self.num_classes, self.img_size = num_classes, img_size
        conv1, conv2 = nn.Conv2d(in_chans, 64, 5, padding=2), nn.Conv2d(64, 64, 5, padding=2)
        fc3, fc4 = nn.Linear(64 * (img_size // 4) ** 2, 384), nn.Linear(384, 192)
        self.fc = nn.Linear(192, num_classes)
        self.features = nn.Sequential(
            *(conv1, nn.ReLU(), nn.MaxPool2d(2), LocalResponseNorm()),
            *(conv2, nn.ReLU(), LocalResponseNorm(), nn.MaxPool2d(2), nn.Flatten()),
            *(fc3, nn.ReLU(), nn.Dropout(drop_rate), fc4, nn.ReLU()),
        )
        for conv in (conv1, conv2):
            _truncated_normal(conv, std=0.05, bias=0.0)
        for hidden in (fc3, fc4):
            _truncated_normal(hidden, std=0.04, bias=0.1)
        _truncated_normal(self.fc, std=1 / 192, bias=0.0)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, in_chans, img_size, img_size] to logits [B, num_classes]."""
        check_size(images, self.img_size)
        logits: Tensor = self.fc(self.features(images))
        return logits


@student
def mentornet_resnet101(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """The paper's "resnet-101 with wide filters": 84.6 M parameters, for 32×32 images."""
    return build(WideResNet, "mentornet_resnet101", pretrained, **kwargs)


@student
def mentornet_inception(
    pretrained: bool = False, img_size: int = 32, **kwargs: object
) -> nn.Module:
    """The paper's "inception": 1.76 M parameters at 32×32, 1.39 M at 28×28."""
    return build(CifarNet, "mentornet_inception", pretrained, img_size=img_size, **kwargs)
