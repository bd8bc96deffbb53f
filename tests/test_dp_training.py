"""DP-SGD in each client: its steps by hand, its noise, its accounting by three accountants, and whole runs."""
import json

import dp_accounting as dp
import numpy as np
import pytest
import torch
from attacked import Attacked
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant, RDPAccountant

import dp_training
from attack import membership
from devices import seed_torch
from dp_training import DPTrainer
from methods import METHODS
from server.privacy import composed_epsilon
from update import ClientState, Training
from utils import rng

METHOD = METHODS["dp_" "sgd"]
FLAGS = ("--method", "dp_" "sgd", "--num_users", 3, "--rounds", 2)
OPTIONS = {"rounds": 1, "local_ep": 1, "local_bs": 8, "lr": 0.5, "head_lr": 1.0, "lr_decay": 0.0, "lr_warmup": 0.0,
           "momentum": 0.0, "optimizer": "sgd", "seed": 1, "kl_weight": 0.0, "kl_warmup": 0, "eval_samples": 1,
           "augment": "none", "epsilon": None, "delta": 1e-5, "clip": 0.5, "noise_multiplier": 2.0}


def make(arrays, **changes):
    """Return a trainer without dropout, and the parameters that it starts from."""
    seed_torch(1, "init")
    model = METHOD.build((1, 8, 8), 4, {}).to(memory_format=torch.channels_last)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    trainer = DPTrainer(model, METHOD, torch.from_numpy(arrays["train_images"]),
                        torch.from_numpy(arrays["train_labels"]).long(), 4,
                        Training.from_options({**OPTIONS, **changes}, torch.float32))
    return trainer, trainer.state()


def change_of(trainer, start, images, round=1):
    """Return what a round of training subtracts from the parameters, in units of the learning rate."""
    upload = trainer.train(0, round, np.arange(images), start, ClientState({})).upload
    return {name: (value - upload[name]) / trainer.training.lr for name, value in start.items()}


def flat(state):
    return torch.cat([value.flatten() for value in state.values()])


def own_gradient(trainer, start, image):
    """Return the gradient of one image's cross-entropy, by plain PyTorch on a model in the usual layout."""
    model = METHOD.build((1, 8, 8), 4, {})
    model.load_state_dict(start)
    x = trainer.images[image:image + 1].permute(0, 3, 1, 2).float() / 255
    torch.nn.functional.cross_entropy(model.eval()(x).logits, trainer.labels[image:image + 1]).backward()
    return {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("optimizer, clip", [("sgd", 1.97), ("adam", 1.97), ("sgd", 1e3)])
def test_a_step_by_hand(tiny_arrays, monkeypatch, optimizer, clip):
    """The sum of the clipped gradients of a Poisson sample, over the expected size of the sample."""
    monkeypatch.setattr(dp_training, "noise_multiplier", lambda options, images: 0.0)
    monkeypatch.setattr(dp_training.DPTrainer, "batches", lambda self, *given, draw=DPTrainer.batches: draw(
        self, *given)[:1])
    trainer, start = make(tiny_arrays, optimizer=optimizer, clip=clip)
    chosen = np.flatnonzero(rng(1, "order", 0, 1).random(20) < 8 / 20)
    own = [own_gradient(trainer, start, image) for image in chosen]
    norms = torch.stack([flat(gradient).norm() for gradient in own])
    assert (norms.min() < clip < norms.max()) == (clip == 1.97)
    mean = {name: sum(gradient[name] * min(1.0, clip / norm.item()) for gradient, norm in zip(own, norms)) / 8
            for name in start}
    for name, value in change_of(trainer, start, 20).items():
        expected = mean[name] if optimizer == "sgd" else mean[name] / (mean[name].abs() + 1e-7)
        torch.testing.assert_close(value, expected, atol=1e-6 if optimizer == "sgd" else 2e-2, rtol=1e-4)
