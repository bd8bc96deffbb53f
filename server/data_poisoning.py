"""Data poisoning: labels, triggers and inputs of malicious clients."""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from devices import torch_rng
from models import Classifier, NoisyClassifier
from server.base import State
from update import Trainer

PATCH_SIDE = 3   # pixels
BLEND = 0.2      # share of the pattern in a blended image


def patch(images: Tensor) -> Tensor:
    """Return the images with a white square in the lower right corner, one pixel from both edges."""
    triggered = images.clone()
    triggered[:, -PATCH_SIDE - 1:-1, -PATCH_SIDE - 1:-1] = 255
    return triggered


def blend(images: Tensor) -> Tensor:
    """Return the images blended with a fixed pattern of noise (Chen et al. 2017, arXiv 1712.05526)."""
    pattern = 255 * torch.rand(images.shape[1:], generator=torch_rng(0, "blend")).to(images.device)
    return ((1 - BLEND) * images.float() + BLEND * pattern).round().to(torch.uint8)


def flipped(labels: Tensor, num_classes: int) -> Tensor:
    """Return label ``C - 1 - y`` for y."""
    return num_classes - 1 - labels


def pair_flipped(labels: Tensor, num_classes: int) -> Tensor:
    """Exchange labels 1 and 7; with fewer classes, 1 and the last."""
    other = min(7, num_classes - 1)
    return torch.where(labels == 1, other, torch.where(labels == other, 1, labels))


def invented_inputs(trainer: Trainer, client: int, number: int, images: int, head: State) -> State:
    """Train a head on inputs that it made itself, labelled as the next class (after PoisonGAN, Zhang et al. 2021).

    Gradient ascent from noise replaces PoisonGAN's generator, since the head's input may be a latent here.
    """
    generator, device = torch_rng(trainer.training.seed, "invent", client, number), trainer.labels.device
    network = trainer.model.classifier.eval()
    assert isinstance(network, Classifier | NoisyClassifier)
    state = {name.removeprefix("classifier."): value.to(device, copy=True).requires_grad_()
             for name, value in head.items() if name.startswith("classifier.")}
    count = min(images, trainer.training.batch_size)
    labels = (torch.arange(count) % trainer.num_classes).to(device)
    x = torch.randn(count, *network.input_shape, generator=generator).to(device).requires_grad_()
    for optimizer, wanted, steps in (
            (torch.optim.Adam([x], 0.1), labels, 20),
            (torch.optim.Adam(state.values(), trainer.training.lr), (labels + 1) % trainer.num_classes,
             4 * trainer.training.epochs_of(images))):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(functional_call(network, state, (x,)), wanted).backward()
            optimizer.step()
    return {**head, **{f"classifier.{name}": value.detach().cpu() for name, value in state.items()}}
