"""Small students: for images of 8 to 32 pixels, and for machines without a GPU."""

import torch.nn.functional as F
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from mentorch.engine.students.registry import build, cfg, check_size, student

__all__ = [
    "CifarResNet",
    "SmallCnn",
    "SmallMlp",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet56",
    "small_cnn",
    "small_mlp",
]

default_cfgs = generate_default_cfgs(
    {
        "small_cnn": cfg(1, 28),
        "small_mlp": cfg(1, 8),
        "cifar_resnet20": cfg(3, 32),
        "cifar_resnet32": cfg(3, 32),
        "cifar_resnet56": cfg(3, 32),
    }
)


def _he_init(net: nn.Module) -> None:
    """Weights ~ N(0, 2/n), n the inputs of a neuron (He et al., 2015); biases 0."""
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class SmallCnn(nn.Module):
    """Two strided convolutions and two linear layers: made to be quick on one CPU core.

    The strides take the place of pooling, which costs as much there as the convolutions; 16 and 32
    channels fill the vectors of oneDNN. No batch norm: at this depth it is not needed.

    Args:
        num_classes: width of the classifier.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier, share of features.
        img_size: side of the images, pixels.
    """

    def __init__(
        self, num_classes: int = 10, in_chans: int = 1, drop_rate: float = 0.0, img_size: int = 28
    ) -> None:
        super().__init__()
        self.num_classes, self.img_size = num_classes, img_size
        side = (img_size + 3) // 4  # two strides of 2, each rounding up
        self.conv1 = nn.Conv2d(in_chans, 16, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(32 * side**2, 128)
        self.drop = nn.Dropout(drop_rate)
        self.fc2 = nn.Linear(128, num_classes)
        _he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, in_chans, img_size, img_size] to logits [B, num_classes]."""
        check_size(images, self.img_size)
        x = F.relu(self.conv2(F.relu(self.conv1(images))))
        logits: Tensor = self.fc2(self.drop(F.relu(self.fc1(x.flatten(1)))))
        return logits


class SmallMlp(nn.Module):
    """Two hidden layers of 256.

    Args:
        num_classes: width of the classifier.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier, share of features.
        img_size: side of the images, pixels.
    """

    def __init__(
        self, num_classes: int = 10, in_chans: int = 1, drop_rate: float = 0.0, img_size: int = 8
    ) -> None:
        super().__init__()
        self.num_classes, self.img_size = num_classes, img_size
        self.fc1 = nn.Linear(in_chans * img_size**2, 256)
        self.fc2 = nn.Linear(256, 256)
        self.drop = nn.Dropout(drop_rate)
        self.fc3 = nn.Linear(256, num_classes)
        _he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, in_chans, img_size, img_size] to logits [B, num_classes]."""
        check_size(images, self.img_size)
        x = F.relu(self.fc2(F.relu(self.fc1(images.flatten(1)))))
        logits: Tensor = self.fc3(self.drop(x))
        return logits


class BasicUnit(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))) with a shortcut free of parameters ("option A").

    Args:
        channels: of the input.
        out: channels of the output. Where it is more, every second pixel of the shortcut is kept
            and zero channels are added on either side.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.stride, self.grow = (1 if channels == out else 2), (out - channels) // 2
        self.conv1 = nn.Conv2d(channels, out, 3, self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to [B, out, H/stride, W/stride], rounded up."""
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.grow:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grow, self.grow))
        return F.relu(residual + x)


class CifarResNet(nn.Module):
    """He et al. (2016), Sec. 4.2: three stages of 16, 32 and 64 filters; depth = 6·units + 2.

    Args:
        num_classes: width of the classifier.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier, share of features; the paper has none.
        units: a stage has.
    """

    def __init__(
        self, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0, units: int = 3
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        layers: list[nn.Module] = [
            nn.Conv2d(in_chans, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        ]
        for channels, out in ((16, 16), (16, 32), (32, 64)):
            layers.append(BasicUnit(channels, out))
            layers += [BasicUnit(out, out) for _ in range(units - 1)]
        self.features = nn.Sequential(*layers)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(64, num_classes)
        _he_init(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes]; any H and W."""
        logits: Tensor = self.fc(self.drop(self.features(images).mean((2, 3))))
        return logits


@student
def small_cnn(pretrained: bool = False, img_size: int = 28, **kwargs: object) -> nn.Module:
    """Two convolutions, two linear layers: 0.21 M parameters at 1×28×28."""
    return build(SmallCnn, "small_cnn", pretrained, img_size=img_size, **kwargs)


@student
def small_mlp(pretrained: bool = False, img_size: int = 8, **kwargs: object) -> nn.Module:
    """Two hidden layers of 256: 0.085 M parameters at 1×8×8."""
    return build(SmallMlp, "small_mlp", pretrained, img_size=img_size, **kwargs)


@student
def cifar_resnet20(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """CIFAR ResNet-20: 0.27 M parameters."""
    return build(CifarResNet, "cifar_resnet20", pretrained, units=3, **kwargs)


@student
def cifar_resnet32(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """CIFAR ResNet-32: 0.46 M parameters."""
    return build(CifarResNet, "cifar_resnet32", pretrained, units=5, **kwargs)


@student
def cifar_resnet56(pretrained: bool = False, **kwargs: object) -> nn.Module:
    """CIFAR ResNet-56: 0.85 M parameters."""
    return build(CifarResNet, "cifar_resnet56", pretrained, units=9, **kwargs)
