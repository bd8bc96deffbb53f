"""Models as other programs define them, for tests/test_any_model.py: a LeNet, a ResNet-20, a ViT, and an MLP."""
import torch
import torch.nn.functional as F
from torch import nn


class LeNet(nn.Module):
    """The network of DLG's code (Zhu et al. 2019): sigmoids, no pooling, `view`, and large random weights."""

    def __init__(self, channels=1, side=8, num_classes=4, bias=True):
        super().__init__()
        layers = []
        for inputs, stride in ((channels, 2), (12, 2), (12, 1)):
            layers += [nn.Conv2d(inputs, 12, 5, stride, 2), nn.Sigmoid()]
        self.body, self.fc = nn.Sequential(*layers), nn.Linear(12 * (side // 4) ** 2, num_classes, bias)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)

    def forward(self, x):
        out = self.body(x)
        return self.fc(out.view(out.size(0), -1))


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential() if stride == 1 else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet20(nn.Module):
    def __init__(self, channels=1, num_classes=4, width=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.layers = nn.Sequential(*[
            Block(width * scale // stride, width * scale, stride)
            for scale in (1, 2, 4) for stride in ((1 if scale == 1 else 2), 1, 1)])
        self.linear = nn.Linear(4 * width, num_classes)

    def forward(self, x):
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.avg_pool2d(out, out.shape[-1]).view(out.shape[0], -1))


class ViT(nn.Module):
    def __init__(self, channels=1, side=8, patch=2, size=32, num_classes=4):
        super().__init__()
        self.patches = nn.Conv2d(channels, size, patch, patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, size))
        self.position = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, size))
        layer = nn.TransformerEncoderLayer(size, 4, 2 * size, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, num_classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.encoder(x)[:, 0]))


def mlp(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, num_classes))
