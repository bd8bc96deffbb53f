"""What ours is timed against: workloads, and a training loop as peers write it."""
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import _path  # noqa: F401 - lets this script import the project
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

import models
from methods import Method
from utils import seed_torch


class SmallCNN(models.CNN):
    """pfl-research's CIFAR-10 benchmark: Conv 32, Conv 64, MaxPool, Linear 128, 1.63 M parameters."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        nn.Module.__init__(self)
        channels, height, width = image_shape
        self.classifier = nn.Sequential(
            nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
            models.FlattenHWC(), nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128), nn.ReLU(),
            nn.Linear(128, num_classes))


class TutorialCNN(models.CNN):
    """PyTorch's tutorial network for CIFAR-10, which BlazeFL's benchmark trains: 62,006 parameters."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int):
        nn.Module.__init__(self)
        channels, height, width = image_shape
        self.classifier = nn.Sequential(
            nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            models.FlattenHWC(), nn.Linear(16 * ((height - 12) // 4) * ((width - 12) // 4), 120), nn.ReLU(),
            nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes))


@dataclass(frozen=True)
class Workload:
    """What a client trains on; ``clients`` of ``batches`` full batches make the round that is timed."""

    network: type[models.Network]
    image_shape: tuple[int, int, int]
    batch: int
    optimizer: str
    clients: int
    batches: int
    steps: int   # timed together, for short steps

    @property
    def method(self) -> Method:
        """The row that trains the network, all of which travels but an encoder."""
        return Method("timed", "", self.network, "classifier.", {})

    def model(self) -> models.Network:
        seed_torch(1, "speed")
        return self.method.build(self.image_shape, 10, {"init_logvar": -2.0})


class Images(Dataset):
    """A data set as torchvision's are: an array, and a transform for each image as it is asked for."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return to_tensor(self.images[i]), int(self.labels[i])


class Plain:
    """The loop as peers write it."""

    def __init__(self, work: Workload, images: np.ndarray, labels: np.ndarray, device: torch.device):
        self.work, self.device, self.model = work, device, work.model().to(device)
        self.sets = [Images(*part) for part in zip(
            np.split(images, work.clients), np.split(labels, work.clients), strict=True)]
        self.endless = self._endless()

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        make = torch.optim.Adam if self.work.optimizer == "adam" else torch.optim.SGD
        return make(model.parameters(), lr=1e-3)

    def _epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer, data: Dataset) -> Iterator[float]:
        model.train()
        for images, labels in DataLoader(data, self.work.batch, shuffle=True):
            images, labels = images.to(self.device), labels.to(self.device)
            optimizer.zero_grad()
            logits, kl, *_ = model(images)
            loss = F.cross_entropy(logits, labels)
            if kl is not None:
                loss = loss + 1e-5 * kl.mean()
            loss.backward()
            optimizer.step()
            yield loss.item()

    def _endless(self):
        model = copy.deepcopy(self.model)
        optimizer = self._optimizer(model)
        while True:
            yield from self._epoch(model, optimizer, self.sets[0])

    def step(self) -> None:
        next(self.endless)

    def round(self) -> None:
        states = []
        for data in self.sets:
            model = copy.deepcopy(self.model)
            for _ in self._epoch(model, self._optimizer(model), data):
                pass
            states.append(copy.deepcopy(model.state_dict()))
        self.model.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0)
                                    for name in states[0]})
