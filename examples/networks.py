"""The networks that the examples train, in plain torch: bn_ext.convert replaces their batch norms."""

from __future__ import annotations

from torch import Tensor, nn

WIDTH, BLOCKS = 256, 3  # of residual_mlp


def mlp(features: int, classes: int, normalise: bool = True) -> nn.Sequential:
    """The network of the README; input (N, features), output (N, classes)."""
    layers: list[nn.Module] = []
    for wide, narrow in ((features, 256), (256, 128)):
        layers.append(nn.Linear(wide, narrow))
        if normalise:
            layers.append(nn.BatchNorm1d(narrow))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(128, classes))


class Residual(nn.Module):
    """x + two layers, each with a batch norm; the activation after the first and after the sum. x's shape in and out.

    Args:
        layer: makes one of the two layers.
        channels: what they leave.
        activation: makes the activation.
    """

    def __init__(self, layer: type[nn.Module], channels: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        options = {"kernel_size": 3, "padding": 1, "bias": False} if layer is nn.Conv1d else {}
        self.layer1, self.bn1 = layer(channels, channels, **options), nn.BatchNorm1d(channels)
        self.layer2, self.bn2 = layer(channels, channels, **options), nn.BatchNorm1d(channels)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.bn1(self.layer1(x)))
        y = self.bn2(self.layer2(y))
        y += x
        return self.activation(y)


def residual_mlp(features: int, classes: int) -> nn.Sequential:
    """Input (N, features), output (N, classes)."""
    head = (nn.Linear(features, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())
    return nn.Sequential(*head, *(Residual(nn.Linear, WIDTH) for _ in range(BLOCKS)), nn.Linear(WIDTH, classes))


def resnet(features: int, classes: int) -> nn.Sequential:
    """resnet1d over the features as one signal; input (N, features), output (N, classes)."""
    return nn.Sequential(nn.Unflatten(1, (1, features)), *resnet1d(1, classes))


def resnet1d(channels: int, classes: int, width: int = 64, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Ten layers: a convolution, four blocks of two, a linear one. Input (N, channels, L), output (N, classes)."""
    head = (nn.Conv1d(channels, width, 7, padding=3, bias=False), nn.BatchNorm1d(width), activation())
    blocks = (Residual(nn.Conv1d, width, activation) for _ in range(4))
    return nn.Sequential(*head, *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, classes))
