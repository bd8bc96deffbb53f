"""Each attack recovers what theory says it must, on networks small enough for it to be certain."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attack import adversaries, attacks, classes, decoders, gradients, latents, newton, scoring, uploads
from attack.adversaries import Adversary, Budget, Knowledge, PublicImages
from devices import seed_torch
from methods import METHODS
from models import Classifier, VariationalEncoder, as_image, kl_to_standard_normal

SHAPE = (1, 8, 8)


@pytest.fixture(autouse=True)
def seeded():
    seed_torch(3, "attack tests")


class Sigmoid(nn.Module):
    """A dense network, as smooth as DLG wants it, with the head's names."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Sigmoid())
        self.output = nn.Linear(48, 4)
        for p in self.parameters():
            nn.init.uniform_(p, -weight, weight)

    def forward(self, x):
        return self.output(self.features(x))


def images(count):
    return torch.rand(count, *SHAPE)


def viewing(posterior, training=False):
    """Return a model with this posterior of images."""
    return SimpleNamespace(posterior=posterior, encoder=SimpleNamespace(training=training), encoded={})


def psnr(found, truth):
    return scoring.similarity(found, truth)["psnr"]


def test_an_epochs_update_is_what_sgd_does():
    head, x, y = Sigmoid(), images(4), torch.tensor([0, 3, 1, 1])
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    seen = gradients.epoch_update(head, x, y, 0.1, 2)
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    for part in ([0, 1], [2, 3]):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x[part]), y[part]).backward()
        optimizer.step()
    for name, p in head.named_parameters():
        torch.testing.assert_close(before[name] - 0.1 * seen[name], p.detach())


def test_labels_of_several_images_are_read_off_the_last_bias():
    head, y = Classifier(SHAPE, 4).eval(), torch.tensor([1, 1, 3, 0])
    assert gradients.labels_of(gradients.gradient(head, images(4), y), 4).tolist() == [0, 1, 1, 3]


def test_features_that_determine_the_image_give_it_back():
    mixing = torch.linalg.qr(torch.randn(64, 64)).Q
    x = images(2)
    found, value = gradients.from_features(lambda z: z.flatten(1) @ mixing, x.flatten(1) @ mixing,
                                           torch.rand(2, 2, *SHAPE), 300, 0.0, True)
    assert (psnr(found[0], x) > 40).all() and (value[0] <= value[1]).all()
    goal, start = torch.full((1, 4), 3.0), torch.full((1, 1, 1, 2, 2), 0.9)
    for bounded, value in ((True, 1), (False, 3)):
        found, _ = gradients.from_features(lambda x: x.flatten(1), goal, start, 200, 0.0, bounded)
        assert found.flatten().tolist() == pytest.approx([value] * 4, abs=0.05)


def test_cosine_matching_recovers_several_images_at_once():
    head, x, y = Sigmoid(0.5), images(3), torch.tensor([1, 0, 2])
    seen = [gradients.gradient(head, x[i:i + 1], y[i:i + 1]) for i in range(3)]
    seen = {name: torch.stack([one[name] for one in seen]) for name in seen[0]}
    found, _ = gradients.invert(lambda z, t: gradients.gradient(head, z, t), seen, y[:, None],
                                torch.rand(2, 3, 1, *SHAPE), 300, 1e-6, True)
    assert (psnr(found[0, :, 0], x) > 25).all()


class Client:
    """A victim whose head is fed its images."""

    def __init__(self, head):
        self.head = head

    def update(self, x, y, lr, batch=None):
        summed = gradients.epoch_update(self.head, x, y, lr, batch or len(x))
        return {f"classifier.{name}": value for name, value in summed.items()}


def test_a_batchs_gradient_gives_its_images_back():
    """Two classes, a dense smooth network, and flat images, which total variation does not hurt."""
    x, y = torch.tensor([0.8, 0.2]).reshape(2, 1, 1, 1).expand(2, *SHAPE).clone(), torch.tensor([2, 0])
    x[0, :, :4], x[1, :, :, :4] = 0.1, 0.9
    head, attack = Sigmoid(0.5), attacks.ATTACKS["batch"]
    budget = Budget(restarts=2, iterations=300, epochs=1, draws=1, lr=0.1, top_scores=1)
    knowledge = Knowledge(head, None, False, SHAPE, next_head=head)
    adversary = Adversary(knowledge, head, PublicImages(x, y, lambda _: (x, y)), 0.0, budget)
    found, labels = attack.solve(adversary, attack.observe(Client(head), x, y, budget), 2)
    assert labels.tolist() == [0, 2] and (psnr(scoring.in_order_of(x, found[0]), x) > 20).all()


def score_by_template(templates):
    return lambda x: (-40 * (x[:, None] - templates).square().mean((2, 3, 4))).log_softmax(1)


def test_class_inversion_finds_the_class():
    templates = (images(4) > 0.5).float()
    score, labels = score_by_template(templates), torch.tensor([2, 0])
    public = (templates.repeat(80, 1, 1, 1) * (0.7 + 0.3 * torch.rand(320, 1, 1, 1))).clamp(0, 1)
    adversary = Adversary(Knowledge(None, None, False, SHAPE), None, PublicImages(public, None), 0.0,
                          Budget(restarts=2, iterations=100, epochs=15, draws=1, lr=0.1, top_scores=1))
    adversary.score = lambda draws: score
    assert (score(classes.mi_face(adversary, labels)[0]).argmax(1) == labels).all()
    for attack in (classes.margin, classes.gmi):
        pictures = attack(adversary, labels)[0]
        assert (scoring.distances(pictures, templates).argmin(1) == labels).all()


def test_a_decoder_learns_to_undo_a_fixed_mixing():
    """Also of images unlike those it has learnt from."""
    mixing, public = torch.linalg.qr(torch.randn(64, 64)).Q, (images(600) > 0.8).float()
    decode = decoders.latent_decoder(public[:500].flatten(1) @ mixing, None, public[:500], 3)
    for other in (public[500:], images(100)):
        assert (psnr(decode(other.flatten(1) @ mixing), other) > 20).all()


@pytest.mark.parametrize("method", ["lg_fedavg", "rve_pfl"])
def test_a_shadow_encoder_fits_the_frozen_head(method, monkeypatch):
    """It pays for its KL by --kl_weight, as the client's own does."""
    head, start = Classifier(SHAPE, 4).eval(), METHODS[method].build(SHAPE, 4, {"init_logvar": -4.0})
    public, y = images(200) * 0.2, torch.arange(200) % 4
    for c in range(4):
        public[y == c, :, 2 * c:2 * c + 2] += 0.7
    before, kl = {name: p.clone() for name, p in head.named_parameters()}, []
    for weight in (1e-5, 1.0)[:1 + (method == "rve_pfl")]:
        seed_torch(1, "shadow")
        view = adversaries.shadow_encoder(Knowledge(head, None, True, SHAPE), start, public, y, 15, weight)
        if weight < 1:
            assert (view.logits(public, 8).argmax(1) == y).double().mean() > 0.9
        if method == "rve_pfl":
            kl.append(kl_to_standard_normal(*view.posterior(public)).mean().item())
    assert all(torch.equal(p, before[name]) for name, p in head.named_parameters())
    if method == "rve_pfl":
        assert kl[1] < 0.8 * kl[0]
        return
    monkeypatch.setattr(adversaries, "ALIGNED_STEPS", 20)
    pulled = adversaries.shadow_encoder(Knowledge(head, None, True, SHAPE), start, public, y, 5, 1e-5,
                                        lambda latents, labels: 100 * latents.square().mean())
    assert pulled.posterior(public)[0].square().mean() < 0.1   # as a distance to observed latents would


def test_noise_is_averaged_over_the_units_of_a_dense_layer():
    """The first singular vector finds the input where weights by the noisy biases do not."""
    units, f = torch.randn(256, 1), torch.rand(1, 400)
    weight, bias = (value + torch.randn_like(value) for value in (units @ f, units[:, 0]))
    found, plain = (torch.cosine_similarity(guess.flatten(), f.flatten(), dim=0) for guess in (
        newton.dense_input({"d.weight": weight, "d.bias": bias}, "d"), (weight * bias[:, None]).sum(0)))
    assert found > 0.99 and found > plain


def test_answers_average_probabilities_over_draws():
    head, encoder = Classifier(SHAPE, 4).eval(), VariationalEncoder(SHAPE, 1.0).eval()
    view, x = Knowledge(head, encoder, True, SHAPE), images(2)
    torch.manual_seed(1)
    found = view.logits(x, 5).exp()
    torch.manual_seed(1)
    mu, logvar = encoder(x)
    z = mu + (0.5 * logvar).exp() * torch.randn(5, *mu.shape)
    each = torch.stack([head(as_image(one, SHAPE)).softmax(1) for one in z])
    torch.testing.assert_close(found, each.mean(0))


@pytest.mark.parametrize("noisy, count", [(True, 2), (False, 2), (True, 100)])
def test_the_likelihood_is_that_of_normal_draws(noisy, count):
    """Draws under each of two encoders, whose noise differs by image and by value."""
    draws, mu, logvar = torch.randn(2, count, 3, 5), torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    seen = [latents.Seen(draws[i], viewing(lambda x, i=i: (mu[i], logvar[i])), noisy)
            for i in range(2)]
    found = latents.log_likelihood(None, seen, images(4))
    sigma = (0.5 * logvar).exp() if noisy else torch.ones_like(logvar)
    expected = sum(torch.distributions.Normal(mu[i], sigma[i]).log_prob(draws[i, :, :, None]).sum((0, 3))
                   for i in range(2))
    torch.testing.assert_close((found - found[:, :1]).float(), expected - expected[:, :1], rtol=1e-4, atol=1e-4)


def test_an_image_is_encoded_once_but_with_dropout():
    asked, x = [], images(300)
    view = viewing(lambda part: (asked.append(len(part)), (part.flatten(1), -part.flatten(1)))[1])
    for chosen in (x[:4], x, x[[299, 0, 0]]):
        mu, logvar = adversaries.posterior_in_parts(view, chosen)
        assert torch.equal(mu, chosen.flatten(1)) and torch.equal(logvar, -mu)
    assert asked == [4, 256, 40]
    view.encoder.training = True
    adversaries.posterior_in_parts(view, x[[0, 0]])
    assert asked[-1] == 2


def test_public_images_of_the_same_code_are_averaged(monkeypatch):
    """Without noise; their likelihoods are equal up to rounding."""
    public, view = images(3), viewing(lambda x: (torch.zeros(len(x), 2), None))
    monkeypatch.setattr(latents, "labels_of", lambda *_: torch.zeros(1))
    logs = torch.tensor([[-5, -5 + 1e-12, -6]], dtype=torch.double)
    monkeypatch.setattr(latents, "log_likelihood", lambda *_: logs)
    adversary = SimpleNamespace(public=SimpleNamespace(of=lambda labels: (public, labels)))
    found, _ = latents.posterior_mean(adversary, [latents.Seen(torch.zeros(1, 1, 2), view)], 1)
    torch.testing.assert_close(found[0, 0], public[:2].mean(0))


def trained_head(shape, classes=5):
    """A head that tells patterns apart, so that its filters are not those of its start."""
    torch.manual_seed(0)
    head, patterns = Classifier(shape, classes).eval(), torch.randn(classes, *shape)
    optimizer = torch.optim.Adam(head.parameters(), 1e-3)
    for _ in range(40):
        y = torch.arange(classes).repeat(6)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(patterns[y] + torch.randn(len(y), *shape)), y).backward()
        optimizer.step()
    return head.requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("shape, exactly", [((1, 12, 12), 3), ((3, 8, 8), 1)])
def test_gauss_newton_finds_latents(shape, exactly):
    """Inputs without smoothness, bounds or known scale. Three channels leave more unknowns: only some exactly."""
    head = trained_head(shape)
    z = 2.3 * torch.randn(4, *shape) + 0.1
    observed = [gradients.gradient(head, one[None], torch.tensor([k])) for k, one in enumerate(z)]
    found = newton.head_input(head, observed, shape, hops=6, copies=3)
    cosine = torch.cosine_similarity(found.flatten(1), z.flatten(1), dim=1)
    assert (cosine > 0.999).sum() >= exactly and cosine.mean() > 0.7


def test_gauss_newtons_equations_hold_at_the_truth_alone():
    head, shape = trained_head((1, 8, 8)), (1, 8, 8)
    z = torch.randn(3, *shape)
    observed = [gradients.gradient(head, one[None], torch.tensor([1])) for one in z]
    problem = newton.problem_of(head, observed)
    for with_routed in (False, True):
        residual = problem.residuals(torch.arange(3), with_routed)
        assert residual(z).abs().max() < 1e-5 and residual(z + 0.3 * torch.randn_like(z)).abs().max() > 1e-2
    swapped = problem.residuals(torch.tensor([1, 0, 2]), True)
    assert swapped(z[[1, 0, 2]]).abs().max() < 1e-5 and swapped(z).abs().max() > 1e-2


def test_gauss_newton_solves_least_squares_in_one_step():
    torch.manual_seed(1)
    matrix, goal = torch.randn(20, 6), torch.randn(3, 20)
    found, error = newton.gauss_newton(lambda x: x.flatten(1) @ matrix.T - goal, torch.zeros(3, 1, 2, 3), 30)
    expected = torch.linalg.lstsq(matrix, goal.T).solution.T
    assert torch.allclose(found.flatten(1), expected, atol=1e-3)
    assert torch.allclose(error, (expected @ matrix.T - goal).square().sum(1), rtol=1e-3)


def test_a_search_in_a_generator_finds_an_image_that_it_can_draw(monkeypatch):
    """A generator of two numbers: the image is found, and the likelier restart comes first."""
    head, directions = Classifier(SHAPE, 4).eval(), torch.randn(2, 64)
    encoder = VariationalEncoder(SHAPE, -6.0).eval().requires_grad_(False)
    public, budget = PublicImages(images(5), None), Budget(4, 200, 1, 1, 0.1, 4)
    adversary = Adversary(Knowledge(head, encoder, True, SHAPE), head, public, 0.0, budget)

    def decode(code):
        return (code @ directions).sigmoid().unflatten(1, SHAPE)
    drawing = SimpleNamespace(size=2, decode=decode, encode=lambda x: torch.zeros(len(x), 4))
    monkeypatch.setattr(decoders, "generator", lambda *_: drawing)   # in place of one that is trained
    monkeypatch.setattr(latents, "decode", lambda adversary, seen, count: (
        torch.zeros(1, count, *SHAPE), latents.labels_of(adversary, seen)))
    truth = decode(torch.tensor([[0.5, -0.4], [-0.3, 0.6], [0.1, 0.1]]))
    z = adversary.whole_model.posterior(truth)[0].detach()
    found, labels = latents.most_likely(adversary, [latents.Seen(z[None])], 3)
    assert found.shape == (4, 3, *SHAPE) and torch.equal(labels, head(as_image(z, SHAPE)).argmax(1))
    errors = (found - truth).square().mean((2, 3, 4))
    blank = (decode(torch.zeros(3, 2)) - truth).square().mean((1, 2, 3))
    assert (errors[0] < 0.05 * blank).all() and (errors[0] <= errors[-1] + 1e-4).all()


def test_moments_are_apart_by_class_mean_spread_and_covariance():
    """By hand: two classes of four latents each, in units of the spread of all."""
    seen, labels = torch.randn(8, 3), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    apart = adversaries.moment_distance(seen, labels)
    assert apart(seen.flip(0), labels.flip(0)).item() == pytest.approx(0, abs=1e-9)   # in any order
    assert apart(seen, 1 - labels) > 0.1   # the classes' moments, and not only those of all
    moved = seen + torch.tensor([1.0, 0.0, 0.0]) * seen.std()
    assert apart(moved, labels).item() == pytest.approx(2 / 3, rel=1e-5)   # one of three means, in two classes
    first = seen[:4] / seen.std()
    expected = first.std(0).square().mean() + (3 * 10 * first.T.cov()).square().mean()
    assert apart(2 * seen[:4] - seen[:4].mean(0), labels[:4]).item() == pytest.approx(expected.item(), rel=1e-4)


def test_scores_of_classes_by_hand():
    """And the widest gap between them parts the client's classes from others."""
    BIAS, WEIGHT = uploads.BIAS, uploads.WEIGHT
    sent = {BIAS: torch.zeros(3), WEIGHT: torch.zeros(3, 2)}
    upload = {BIAS: torch.tensor([2.0, -4.0, 0.0]), WEIGHT: torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, -2.0]])}
    assert uploads.class_scores(sent, upload).tolist() == pytest.approx([0.5 + 1, -1 - 0.5, 0 - 1])
    assert uploads.class_scores(sent, sent).tolist() == [0, 0, 0]
    for scores, owned in (([5.0, 4.0, -1.0, -2.0], [1, 1, 0, 0]), ([1.0, 1.0, 1.0, -9.0], [1, 1, 1, 0])):
        assert uploads.owned_classes(torch.tensor(scores)).int().tolist() == owned


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


@pytest.mark.parametrize("count", [1, 6])
def test_images_are_parted_in_a_dense_layers_gradient(count):
    draw = torch.Generator().manual_seed(count)
    truth = torch.randn(count, 300, generator=draw).clamp_min(0).double()
    slopes = torch.randn(count, 40, generator=draw).double()
    gradient = torch.cat([slopes.T @ truth, slopes.sum(0)[:, None]], 1)
    error = torch.where(torch.rand(gradient.shape, generator=draw) < 0.02, 1.0, 0.0)
    found = uploads.dense_inputs(torch.where(error == 1, 7.0, gradient), error, count, 60)
    cosine = torch.nn.functional.normalize(truth.float()) @ torch.nn.functional.normalize(found).T
    assert found.shape == truth.shape and cosine.max(1).values.min() > 0.99
