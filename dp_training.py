"""DP-SGD: example-level differential privacy in each client, through Opacus (Abadi et al. 2016, arXiv 1607.00133).

A batch has each of the client's n images with probability q = B / n, independently. Each image's gradient is
clipped to norm C. The sum gets Gaussian noise of standard deviation z C, and a step divides it by q n. z is the
least noise with which all steps of the run together are (epsilon, delta)-private for one image, added or removed.
Clients of other sizes have another z. Sizes are public. Noise is drawn from the run's seed, so that a run can be
repeated; whoever has the seed can remove it.
"""
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor

from server import privacy
from server.base import State
from update import ClientState, LocalUpdate, Trainer, Training

# Of PyTorch: the first layer's hook gets no gradient of the images, which it does not use.
warnings.filterwarnings("ignore", message="Full backward hook is firing")


def sampling_rate(options: Mapping[str, Any], images: int) -> float:
    """Return q, the probability that a batch has an image, for a client with this number of images."""
    return min(1.0, options["local_bs"] / images)


def steps_of(options: Mapping[str, Any], images: int) -> int:
    """Return a client's steps over the run and its fine-tuning, as if it trained in every round."""
    training = Training.from_options(options, torch.float32)
    finetuning = [replace(training, epochs=epochs, local_steps=None) for epochs in options["finetune_ep"]]
    return options["rounds"] * training.steps_of(images) + sum(further.steps_of(images) for further in finetuning)


def noise_multiplier(options: Mapping[str, Any], images: int) -> float:
    """Return z for a client with this number of images: as given, or the least for ``--epsilon``."""
    return options["noise_multiplier"] or privacy.noise_for(
        options["epsilon"], sampling_rate(options, images), steps_of(options, images), options["delta"])


class ContiguousHooks(GradSampleHooksFastGradientClipping):
    """Opacus' hooks for channels-last models, whose activations its convolutions would misread."""

    def rearrange_grad_samples(self, **given: Any) -> tuple[list[Tensor], Tensor]:
        activations, backprops = super().rearrange_grad_samples(**given)
        return [value.contiguous() for value in activations], backprops.contiguous()


@dataclass
class DPTrainer(Trainer):
    """``Trainer`` whose steps are those of DP-SGD.

    Ghost clipping computes the norms of the images' gradients without the gradients (Li et al. 2022, arXiv
    2110.05679), in a second backward pass.
    """

    _hooks: ContiguousHooks | None = field(default=None, init=False)
    _images: int = field(default=0, init=False)   # of the client that trains

    def facts(self, sizes: list[int]) -> dict[str, Any]:
        """Return the guarantee, which is that of the client with the largest epsilon, and the range of z."""
        options = self.training.options
        noise = {n: noise_multiplier(options, n) for n in sizes}
        epsilons = [privacy.composed_epsilon(z, sampling_rate(options, n), steps_of(options, n), options["delta"])
                    for n, z in noise.items()]
        return {"privacy": {
            "epsilon": max(epsilons), "delta": options["delta"], "clip": options["clip"],
            "noise_multiplier": [min(noise.values()), max(noise.values())],
            "accountant": "dp-accounting, PLD, Poisson sampling, add or remove one image of a client, as if each "
                          "client trained in every round"}}

    def train(self, client: int, round: int, indices: np.ndarray, sent: State,
              client_state: ClientState) -> LocalUpdate:
        self._images = len(indices)
        self._hooks = ContiguousHooks(self.model, loss_reduction="sum",
                                      max_grad_norm=self.training.options["clip"])
        try:
            return super().train(client, round, indices, sent, client_state)
        finally:
            self._hooks.cleanup()

    def batches(self, orders: Generator, indices: np.ndarray) -> list[Tensor]:
        """Draw an epoch's batches by Poisson sampling; one may be empty."""
        rate, device = sampling_rate(self.training.options, len(indices)), self.labels.device
        return [torch.from_numpy(indices[orders.random(len(indices)) < rate]).to(device)
                for _ in range(-(-len(indices) // self.training.batch_size))]

    def prepare(self, sent: State, part: str = "all") -> tuple[torch.optim.Optimizer, State]:
        optimizer, received = super().prepare(sent, part)
        options = self.training.options
        return DPOptimizerFastGradientClipping(
            optimizer, noise_multiplier=noise_multiplier(options, self._images), max_grad_norm=options["clip"],
            expected_batch_size=sampling_rate(options, self._images) * self._images), received

    def descend(self, optimizer: torch.optim.Optimizer, objective: Tensor) -> None:
        DPTensorFastGradientClipping(self._hooks, optimizer, objective, loss_reduction="sum").backward()
        optimizer.step()

    def gradient(self, objective: Tensor, parameters: list[Tensor], images: int) -> list[Tensor]:
        """Return the mean of the images' clipped gradients, with noise as if the batch had its expected size."""
        clip, total = self.training.options["clip"], [torch.zeros_like(value) for value in parameters]
        for own in objective:
            slopes = torch.autograd.grad(own, parameters, retain_graph=True)
            norm = torch.stack([slope.norm() for slope in slopes]).norm()
            for value, slope in zip(total, slopes, strict=True):
                value += slope * (clip / norm.clamp_min(clip))
        sigma = noise_multiplier(self.training.options, images) * clip
        return [(value + sigma * torch.randn_like(value)) / len(objective) for value in total]
