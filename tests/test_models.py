"""Layers and parameter counts as worked out by hand, and the mathematics of the encoder."""
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torchmetrics.functional.image import structural_similarity_index_measure

from models import (
    CNN,
    RVE,
    Classifier,
    ClassPrior,
    DropoutCNN,
    EncoderClassifier,
    ResSFL,
    VariationalEncoder,
    as_image,
    kl_to_standard_normal,
)

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("shape, latent, flat, head_flat, encoder, head", [
    (MNIST, 784, 64 * 24 * 24, 64 * 7 * 7,
     320 + 18_496 + 18_874_880 + 2 * 402_192, 320 + 18_496 + 803_072 + 2_570),
    (CIFAR, 3072, 64 * 28 * 28, 64 * 8 * 8,
     896 + 18_496 + 25_690_624 + 2 * 1_575_936, 896 + 18_496 + 1_048_832 + 2_570)])
def test_layers_and_counts(shape, latent, flat, head_flat, encoder, head):
    model = RVE(shape, 10, -4.0)
    weights = {name: tuple(value.shape) for name, value in model.named_parameters() if value.ndim > 1}
    assert weights == {
        "encoder.trunk.0.weight": (32, shape[0], 3, 3), "encoder.trunk.2.weight": (64, 32, 3, 3),
        "encoder.trunk.5.weight": (512, flat), "encoder.mu.weight": (latent, 512),
        "encoder.logvar.weight": (latent, 512),
        "classifier.features.0.weight": (32, shape[0], 3, 3), "classifier.features.3.weight": (64, 32, 3, 3),
        "classifier.features.7.weight": (256, head_flat), "classifier.output.weight": (10, 256)}
    assert (count(model.encoder), count(model.classifier)) == (encoder, head)
    assert count(CNN(shape, 10)) == head
    assert model.encoder.trunk[6].p == model.classifier.features[9].p == 0.25
    assert isinstance(model.encoder.trunk[6], torch.nn.Dropout) and len(model.encoder.trunk) == 7


@pytest.mark.parametrize("shape", [MNIST, CIFAR, (2, 9, 13)])
@pytest.mark.parametrize("network", [RVE, EncoderClassifier, CNN, DropoutCNN, ResSFL])
def test_shapes(network, shape):
    model = network(shape, 7, -4.0) if network is RVE else network(shape, 7)
    model.eval()
    x = torch.rand(5, *shape)
    logits, kl, *_ = model(x)
    probabilities, kl_too = model.predict(x, 4)
    assert logits.shape == probabilities.shape == (5, 7)
    assert torch.allclose(probabilities.sum(1), torch.ones(5))
    assert (kl is None and kl_too is None) if network is not RVE else kl.shape == kl_too.shape == (5,)


def test_weights_start_glorot_uniform_and_biases_at_zero():
    """Within the bound of ``sqrt(6 / (fan_in + fan_out))``, up to it, and as flat as a uniform draw."""
    torch.manual_seed(0)
    for model in (RVE(MNIST, 10, -4.0), ResSFL(MNIST, 10)):
        for name, weight in model.named_parameters():
            if weight.ndim < 2 and not name.startswith("encoder.logvar"):
                assert not weight.any(), name
            if weight.numel() < 4000 or weight.ndim < 2:
                continue
            field = weight[0, 0].numel()
            bound = math.sqrt(6 / (field * (weight.shape[0] + weight.shape[1])))
            assert 0.99 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name


def test_relu_after_pooling_changes_no_number():
    """Against the published order of layers: logits and every gradient, bit by bit."""
    model = Classifier((1, 8, 8), 10).eval()
    conv, _, _, conv2, _, _, *rest = model.features
    relu, pool = torch.nn.ReLU(), torch.nn.MaxPool2d(2)
    published = torch.nn.Sequential(conv, relu, pool, conv2, relu, pool, *rest, model.output)
    x, gradients = torch.randn(3, 1, 8, 8), []
    for network in (model, published):
        logits = network(x)
        gradients.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    assert all(map(torch.equal, *gradients))


def test_sigma_starts_as_asked():
    _, logvar = VariationalEncoder(MNIST, -4.0).eval()(torch.zeros(1, *MNIST))
    assert torch.allclose(logvar, torch.tensor(-4.0))   # biases are zero, so a black image shows it alone


def test_resistance_by_hand():
    """lambda * max(0, SSIM - 0.5) + the inner attacker's error; each learns from its own term alone."""
    model, x = ResSFL(MNIST, 10), torch.rand(6, *MNIST)
    features = model(x).features
    inverted = model.attacker(features)
    error = (inverted - x).square().mean((1, 2, 3))
    similar = torch.stack([structural_similarity_index_measure(a[None], b[None], data_range=1.0)
                           for a, b in zip(inverted, x, strict=True)])
    found = model.resistance(x, features, 2.0)
    assert torch.allclose(found, 2 * (similar - 0.5).clamp_min(0) + error, atol=1e-5)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [0.0 if p.grad is None else p.grad.abs().sum().item()
                for p in (model.attacker[0].weight, model.classifier.features[0].weight)]
    only_attacker = gradients(model.resistance(x, model(x).features, 0.0).sum())
    assert only_attacker[0] > 0 and only_attacker[1] == 0


def test_kl_is_that_of_two_normals():
    """To N(0, I), and to the prior of each image's class."""
    torch.manual_seed(0)
    prior = ClassPrior(3, (2, 5, 5))
    with torch.no_grad():
        prior.logvar.normal_()
    mu, logvar, y = torch.randn(6, 50), torch.randn(6, 50), torch.tensor([0, 2, 1, 1, 0, 2])
    posterior, own = Normal(mu, (0.5 * logvar).exp()), Normal(prior.mu[y], (0.5 * prior.logvar[y]).exp())
    for found, other in ((kl_to_standard_normal(mu, logvar), Normal(0.0, 1.0)), (prior.kl(mu, logvar, y), own)):
        assert torch.allclose(found, kl_divergence(posterior, other).sum(1), rtol=1e-5)


def test_class_priors_start_apart_as_coarse_pictures():
    torch.manual_seed(0)
    prior = ClassPrior(6, (3, 10, 13))
    pictures = as_image(prior.mu.detach(), (3, 10, 13))
    assert not prior.logvar.any()   # each with variance 1, as that of the single prior
    assert pictures.shape == (6, 3, 10, 13) and pictures.std().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(pictures[..., :4, :4], pictures[..., :1, :1].expand(6, 3, 4, 4))   # one patch
    prior = RVE((3, 32, 32), 40, -2.0, "class", 0.1).prior   # the option is handed on
    nats = torch.pdist(prior.mu.detach()).square().mean() / 2
    assert nats == pytest.approx(0.1**2 * 3 * 32 * 32, rel=0.1)


def test_the_head_rehearses_every_class_in_training_alone():
    """By hand: cross-entropy on draws of the priors, which learn nothing from it."""
    torch.manual_seed(0)
    model = RVE((1, 8, 8), 4, -2.0, "class")
    x, y = torch.rand(64, 1, 8, 8), torch.zeros(64, dtype=torch.int64)
    assert model.eval()(x, y).auxiliary is None and RVE((1, 8, 8), 4, -2.0).train()(x).auxiliary is None
    replay = model.train()(x, y).auxiliary
    assert replay.shape == (64,)
    replay.mean().backward()
    assert model.prior.mu.grad is None and model.encoder.mu.weight.grad is None
    assert (model.classifier.output.bias.grad.abs() > 0).all()
