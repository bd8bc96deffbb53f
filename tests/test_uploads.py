"""What an upload says: classes, gradients behind Adam's steps, images; where the truth is known."""
import copy

import numpy as np
import pytest
import torch

from attack import gradients, uploads
from attack.uploads import BIAS, WEIGHT, class_scores, owned_classes
from methods import METHODS
from runs.checkpoints import load_checked
from update import ClientState, Trainer, Training
from utils import seed_torch


def test_scores_by_hand():
    sent = {BIAS: torch.zeros(3), WEIGHT: torch.zeros(3, 2)}
    upload = {BIAS: torch.tensor([2.0, -4.0, 0.0]), WEIGHT: torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, -2.0]])}
    assert class_scores(sent, upload).tolist() == pytest.approx([0.5 + 1, -1 - 0.5, 0 - 1])
    assert class_scores(sent, sent).tolist() == [0, 0, 0]


@pytest.mark.parametrize("scores, owned", [([5.0, 4.0, -1.0, -2.0], [1, 1, 0, 0]), ([0.0, 3.0, 0.1], [0, 1, 0]),
                                           ([1.0, 1.0, 1.0, -9.0], [1, 1, 1, 0])])
def test_the_widest_gap_parts_them(scores, owned):
    assert owned_classes(torch.tensor(scores)).int().tolist() == owned


@pytest.mark.parametrize("method", ["fedavg", "rve_pfl"])
def test_a_trained_runs_uploads_name_their_classes(place, tiny_arrays, method):
    assert place.main("--method", method, "--num_users", 4, "--rounds", 1, "--local_ep", 6) == 0
    shared = load_checked(place.models / "round_1" / "shared.pt")
    labels = np.concatenate([tiny_arrays["train_labels"], tiny_arrays["test_labels"]])
    with np.load(place.results / "partition.npz") as parts:
        for k, upload in shared["uploads"].items():
            has = np.isin(np.arange(4), labels[parts[f"train_{k}"]])
            scores = class_scores(shared["sent"], upload).numpy()
            assert has.sum() == 2 and scores[has].min() > scores[~has].max()


def test_adams_step_gives_the_gradient_back():
    """By PyTorch's own optimiser; a large gradient is not claimed to be known."""
    start = 0.02 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    gradient = torch.logspace(-9, -3, 1000) * torch.where(torch.arange(1000) % 2 == 0, 1.0, -1.0)
    value = torch.nn.Parameter(start.clone())
    value.grad = gradient
    torch.optim.Adam([value], 1e-3, eps=1e-7).step()
    found, error = uploads.adam_gradient(start, value.detach(), 1e-3)
    sure = error < 0.1
    relative = (found / gradient - 1).abs()
    middling = sure & (gradient.abs() > 1e-7)   # smaller ones move a parameter by little more than its rounding
    assert sure.double().mean() > 0.8 and relative[middling].max() < 0.15 and relative[middling].median() < 0.01
    start = torch.full((3,), 0.5)
    assert (uploads.adam_gradient(start, start - 1e-3, 1e-3)[1] > 0.5).all()


@pytest.mark.parametrize("count", [1, 2, 6])
def test_images_are_parted_in_a_dense_layers_gradient(count):
    draw = torch.Generator().manual_seed(count)
    truth = torch.randn(count, 300, generator=draw).clamp_min(0).double()
    slopes = torch.randn(count, 40, generator=draw).double()
    gradient = torch.cat([slopes.T @ truth, slopes.sum(0)[:, None]], 1)
    error = torch.where(torch.rand(gradient.shape, generator=draw) < 0.02, 1.0, 0.0)
    found = uploads.dense_inputs(torch.where(error == 1, 7.0, gradient), error, count, 60)
    cosine = torch.nn.functional.normalize(truth.float()) @ torch.nn.functional.normalize(found).T
    assert found.shape == truth.shape and cosine.max(1).values.min() > 0.99


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_image_is_recovered_from_a_real_upload(tiny_arrays, optimizer):
    """With dropout: its features from the upload, and the image from its features."""
    options = {"lr": 1e-3 if optimizer == "adam" else 0.1, "head_lr": 1.0, "lr_decay": 0.0, "lr_warmup": 0.2}
    trainer, sent, own, head = client_of(tiny_arrays, epochs=1, batch=32, optimizer=optimizer, **options)
    upload = trainer.train(0, 1, own[:1], sent, ClientState({})).upload
    parts = []
    for kind in ("weight", "bias"):
        before, after = (state[f"classifier.features.7.{kind}"] for state in (sent, upload))
        parts.append(uploads.adam_gradient(before, after, 1e-3) if optimizer == "adam" else
                     ((before - after).double(), torch.zeros(before.shape)))
    gradient, error = (torch.cat([parts[0][i], parts[1][i][:, None]], 1) for i in (0, 1))
    found = uploads.dense_inputs(gradient, error, 1, 60)
    x, _ = images_of(tiny_arrays, own[:1])
    features = head.features[:7](x)
    assert torch.cosine_similarity(found, features) > 0.995
    seed_torch(1, "test")
    start = torch.rand(5, 1, *x.shape[1:])
    picture, _ = gradients.from_features(head.features[:7], found, start, 400, 0.0, True)
    assert (picture[0] - x).square().mean() < 0.03 < (0.5 - x).square().mean() / 3


def client_of(arrays, epochs, batch, optimizer="adam", **options):
    """A client of ``fedavg`` with six images, the head as sent, and that head without gradients."""
    seed_torch(1, "init")
    method = METHODS["fedavg"]
    model = method.build((1, 8, 8), 4, {})
    if epochs > 1:
        model.classifier.features[9].p = 0.0   # the simulation knows no dropout
    training = Training(seed=1, epochs=epochs, batch_size=batch, optimizer=optimizer, momentum=0.0, kl_weight=0.0,
                        kl_warmup=0, eval_samples=1, augment="none", dtype=torch.float32, **options)
    trainer = Trainer(model, method, torch.from_numpy(arrays["train_images"]),
                      torch.from_numpy(arrays["train_labels"]).long(), 4, training)
    sent = trainer.shared_and_private(trainer.state())[0]
    head = copy.deepcopy(model.classifier).requires_grad_(False).eval()
    return trainer, sent, np.arange(6), head


def images_of(arrays, indices):
    x = torch.from_numpy(arrays["train_images"][indices]).permute(0, 3, 1, 2).float() / 255
    return x, torch.from_numpy(arrays["train_labels"][indices]).long()
