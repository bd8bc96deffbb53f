"""Each attack recovers what theory says it must, on networks small enough for it to be certain."""
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import mean_squared_error
from torch import nn

from attack import adversaries, attacks, classes, decoders, gradients, latents, newton, scoring
from attack.adversaries import Adversary, Budget, Knowledge, PublicImages
from models import Classifier, Encoder, VariationalEncoder, as_image
from utils import seed_torch

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


def psnr(found, truth):
    return scoring.similarity(found, truth)["psnr"]


def test_the_gradient_is_autograds():
    head, x, y = Classifier(SHAPE, 4).eval(), images(3), torch.tensor([0, 3, 1])
    nn.functional.cross_entropy(head(x), y).backward()
    for name, value in gradients.gradient(head, x, y).items():
        torch.testing.assert_close(value, dict(head.named_parameters())[name].grad)


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


@pytest.mark.parametrize("labels", [[0], [3], [2, 0], [1, 1, 3, 0]])
def test_labels_are_read_off_the_last_bias(labels):
    head, y = Classifier(SHAPE, 4).eval(), torch.tensor(labels)
    seen = gradients.gradient(head, images(len(y)), y)
    assert gradients.labels_of(seen, len(y)).tolist() == sorted(labels)


def test_the_dense_layers_input_is_recovered_exactly():
    head, x = Classifier(SHAPE, 4).eval(), images(1)
    seen = gradients.gradient(head, x, torch.tensor([2]))
    truth = head.features[:7](x)[0].detach()
    found = newton.dense_input(seen, "features.7")
    assert ((found - truth).norm() / truth.norm()) < 1e-5


def test_features_that_determine_the_image_give_it_back():
    mixing = torch.linalg.qr(torch.randn(64, 64)).Q
    x = images(2)
    found, value = gradients.from_features(lambda z: z.flatten(1) @ mixing, x.flatten(1) @ mixing,
                                           torch.rand(2, 2, *SHAPE), 300, 0.0, True)
    assert (psnr(found[0], x) > 40).all() and (value[0] <= value[1]).all()


def test_dlg_recovers_an_image_from_a_smooth_network():
    head, x, y = Sigmoid(0.5), images(1), torch.tensor([1])
    seen = gradients.gradient(head, x, y)
    found, value = gradients.deep_leakage(head, seen, torch.rand_like(x), 200)
    assert psnr(found, x).item() > 40 and value < 1e-6


def test_cosine_matching_recovers_several_images_at_once():
    head, x, y = Sigmoid(0.5), images(3), torch.tensor([1, 0, 2])
    seen = [gradients.gradient(head, x[i:i + 1], y[i:i + 1]) for i in range(3)]
    seen = {name: torch.stack([one[name] for one in seen]) for name in seen[0]}
    found, _ = gradients.invert(lambda z, t: gradients.gradient(head, z, t), seen, y[:, None],
                                torch.rand(2, 3, 1, *SHAPE), 400, 1e-6, True)
    assert (psnr(found[0, :, 0], x) > 25).all()


def test_matching_takes_signed_steps_that_shrink_three_times_and_keeps_to_bounds():
    """Adam on a sign that stays moves by the rate: by 0.1 times 3 + 0.2 + 0.02 + 0.001 in eight steps."""
    def change(x, y):
        return {"g": torch.stack([x.sum(), torch.ones(())])}

    def found(start, bounded):
        x, value = gradients.invert(change, {"g": torch.tensor([[1.0, 0.0]])}, torch.zeros(1, 1, dtype=torch.long),
                                    torch.full((1, 1, 1, 1, 2, 2), start), 8, 0.0, bounded)
        total = x.sum().item()
        assert value.item() == pytest.approx(1 - total / (1 + total**2)**0.5, abs=1e-5)
        return total / 4
    assert found(0.2, False) == found(0.2, True) == pytest.approx(0.2 + 0.3221, abs=1e-4)
    assert found(0.9, True) == 1 and found(0.9, False) == pytest.approx(0.9 + 0.3221, abs=1e-4)


@pytest.mark.parametrize("bounded, expected", [(True, 1), (False, 3)])
def test_a_search_by_features_keeps_to_bounds(bounded, expected):
    goal, start = torch.full((1, 4), 3.0), torch.full((1, 1, 1, 2, 2), 0.9)
    x, _ = gradients.from_features(lambda x: x.flatten(1), goal, start, 200, 0.0, bounded)
    assert x.flatten().tolist() == pytest.approx([expected] * 4, abs=0.05)


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


def test_a_row_says_who_can_run_it_and_what_of_a_run_it_needs():
    row = attacks.ClassAttack(solve=None, adversaries=("stolen_model", "prediction_api"), source="",
                              needs=(("never", lambda *_: True), ("no luck", lambda run, _: run == "luck")))
    assert row.unfit("luck", "curious_server") == "needs what this adversary does not have"
    assert row.unfit("run", "stolen_model") == "no luck" and row.unfit("luck", "stolen_model") is None


def test_only_what_tells_no_order_is_scored_in_any_order():
    assert {name for name, attack in attacks.ATTACKS.items() if attack.unordered} == {"batch", "epoch"}


def score_by_template(templates):
    return lambda x: (-40 * (x[:, None] - templates).square().mean((2, 3, 4))).log_softmax(1)


def test_class_inversion_finds_the_class():
    templates = (images(4) > 0.5).float()
    score, labels = score_by_template(templates), torch.tensor([2, 0])
    plain = classes.mi_face(score, labels, SHAPE, 500)
    strong, value = classes.margin(score, labels, torch.rand(3, 2, *SHAPE), torch.full(SHAPE, 0.5), 200)
    assert (score(plain).argmax(1) == labels).all()
    assert (score(strong[0]).argmax(1) == labels).all() and (value[0] <= value[2]).all()
    nearest = scoring.distances(strong[0], templates).argmin(1)
    assert (nearest == labels).all()


def test_a_generator_narrows_class_inversion_to_its_images():
    patterns = (images(4) > 0.5).float()
    public = (patterns.repeat(80, 1, 1, 1) * (0.7 + 0.3 * torch.rand(320, 1, 1, 1))).clamp(0, 1)
    made = decoders.generator(public, 30)
    found, _ = classes.gmi(score_by_template(patterns), torch.tensor([3, 1]), made.decode,
                                torch.randn(3, 2, made.size), 200)
    assert (scoring.distances(found[0], patterns).argmin(1) == torch.tensor([3, 1])).all()


def test_the_margin_is_the_log_odds():
    logs = torch.randn(5, 4).log_softmax(1)
    y = torch.tensor([0, 1, 2, 3, 0])
    p = logs.exp()[range(5), y]
    torch.testing.assert_close(classes.log_odds(logs, y), (p / (1 - p)).log())


def test_a_decoder_learns_to_undo_a_fixed_mixing():
    """Also of images unlike those it has learnt from."""
    mixing, public = torch.linalg.qr(torch.randn(64, 64)).Q, (images(600) > 0.8).float()
    decode = decoders.latent_decoder(public[:500].flatten(1) @ mixing, None, public[:500], 3)
    for other in (public[500:], images(100)):
        assert (psnr(decode(other.flatten(1) @ mixing), other) > 20).all()


def test_a_decoder_of_scores_draws_their_class():
    patterns, y = (images(4) > 0.5).float(), torch.arange(400) % 4
    decode = decoders.decoder(nn.functional.one_hot(y, 4).float(), None, patterns[y], 30)
    assert (psnr(decode(torch.eye(4)), patterns) > 12).all()


@pytest.mark.parametrize("kind", [Encoder, VariationalEncoder])
def test_a_shadow_encoder_fits_the_frozen_head(kind):
    head = Classifier(SHAPE, 4).eval()
    start = nn.Module()
    start.encoder = kind(SHAPE) if kind is Encoder else kind(SHAPE, -4.0)
    public = images(200) * 0.2
    y = torch.arange(200) % 4
    for c in range(4):
        public[y == c, :, 2 * c:2 * c + 2] += 0.7
    before = {name: p.clone() for name, p in head.named_parameters()}
    view = adversaries.shadow_encoder(Knowledge(head, None, True, SHAPE), start, public, y, 15, 1e-5)
    assert (view.logits(public, 8).argmax(1) == y).double().mean() > 0.9
    assert all(torch.equal(p, before[name]) for name, p in head.named_parameters())


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


@pytest.mark.parametrize("noisy", [True, False])
def test_the_likelihood_is_that_of_normal_draws(noisy):
    """Of two draws under each of two encoders, whose noise differs by image and by value."""
    draws, mu, logvar = torch.randn(2, 2, 3, 5), torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    seen = [latents.Seen(draws[i], SimpleNamespace(posterior=lambda x, i=i: (mu[i], logvar[i])), noisy)
            for i in range(2)]
    found = latents.log_likelihood(None, seen, images(4))
    sigma = (0.5 * logvar).exp() if noisy else torch.ones_like(logvar)
    expected = sum(torch.distributions.Normal(mu[i], sigma[i]).log_prob(draws[i, :, :, None]).sum((0, 3))
                   for i in range(2))
    torch.testing.assert_close((found - found[:, :1]).float(), expected - expected[:, :1], rtol=1e-4, atol=1e-4)


def test_distances_in_features_by_hand():
    found, truth = torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([[3.0, 4.0], [3.0, 1.0]])
    own = torch.tensor([[0.0, 1.0], [0.0, 2.0], [5.0, 0.0]])
    known = scoring.feature_distances(found, truth, torch.tensor([1, 1]), own, torch.tensor([0, 1, 1]))
    assert known["feature_distance"].tolist() == [5, 1]
    assert known["knn_distance"].tolist() == [2, 2]   # the nearest one is of another class
    alone = scoring.feature_distances(found, truth, torch.tensor([0, 3]), own, torch.tensor([0, 1, 1]))
    assert alone["knn_distance"].tolist()[0] == 1 and alone["knn_distance"].isnan().tolist() == [False, True]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 11, 17), (3, 12, 11)])
def test_likeness_is_what_scikit_image_computes(shape):
    """Its default border handling, which takes the mean over windows within the image."""
    x, noise = torch.rand(3, *shape), torch.rand(3, *shape)
    for y in (noise, (x + 0.1 * noise).clamp(0, 1), torch.zeros_like(x)):
        like = scoring.similarity(x, y)
        for i in range(3):
            a, b = x[i].numpy().astype(float), y[i].numpy().astype(float)
            assert like["mse"][i].item() == pytest.approx(mean_squared_error(a.ravel(), b.ravel()), abs=1e-9)
            assert like["psnr"][i].item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-4)
            assert like["ssim"][i].item() == pytest.approx(structural_similarity(
                a, b, data_range=1, channel_axis=0, gaussian_weights=True, use_sample_covariance=False), abs=1e-8)


@pytest.mark.parametrize("size, side", [(8, 7), (7, 7), (2, 1)])
def test_a_small_image_is_compared_by_the_largest_window_that_fits(size, side):
    """Over all its places, in NumPy."""
    x, y = torch.rand(1, 1, size, size), torch.rand(1, 1, size, size)
    line = np.exp(-0.5 * ((np.arange(side) - side // 2) / 1.5) ** 2)
    weights, found = np.outer(line, line) / line.sum() ** 2, []
    for row in range(size - side + 1):
        for column in range(size - side + 1):
            a, b = (one[0, 0, row:row + side, column:column + side].double().numpy() for one in (x, y))
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb, ab = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum(), (
                weights * (a - ma) * (b - mb)).sum()
            found.append((2 * ma * mb + 1e-4) * (2 * ab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    assert scoring.ssim(x, y).item() == pytest.approx(np.mean(found), abs=1e-9)


def test_matching_is_by_assignment_not_greedy():
    truth = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    found = torch.tensor([1.4, 0.9]).reshape(2, 1, 1, 1)   # both nearest to 1: only one may have it
    assert scoring.in_order_of(truth, found).flatten().tolist() == pytest.approx([0.9, 1.4])


def test_the_rank_is_of_the_nearest_target():
    pool = torch.arange(5.0).reshape(5, 1, 1, 1)
    target = torch.tensor([[False, False, True, False, True]])

    def rank(value):
        return scoring.rank_by(scoring.distances(torch.tensor(value).reshape(1, 1, 1, 1), pool), target).tolist()
    assert rank(0.4) == [3]
    assert rank(2.1) == [1]


def test_what_is_not_a_number_is_ranked_last():
    target = torch.tensor([[True, False, False], [False, True, False]])
    apart = torch.tensor([[torch.nan, 1.0, 2.0], [torch.nan, 1.0, torch.nan]])
    assert scoring.rank_by(apart, target).tolist() == [3, 1]
    assert scoring.rank_by(torch.full((1, 3), torch.nan), target[:1]).tolist() == [3]


def test_the_bound_is_reverse_water_filling():
    """Two variances 4 and 1, by hand: at ln 2 nats only the larger is told, and to a variance of 1."""
    x = np.array([[2.0, 1], [-2, 1], [2, -1], [-2, -1]]) * np.sqrt(3 / 4)   # unbiased variances 4 and 1
    x = torch.tensor(x).reshape(4, 1, 1, 2)
    assert scoring.distortion_bound(x, 0.0) == pytest.approx(2.5, rel=1e-6)
    assert scoring.distortion_bound(x, np.log(2)) == pytest.approx(1.0, rel=1e-6)
    assert scoring.distortion_bound(x, 2 * np.log(2)) == pytest.approx(np.sqrt(0.25), rel=1e-6)
    falling = [scoring.distortion_bound(x, nats) for nats in (0, 0.1, 1, 10)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.slow
def test_no_decoder_beats_the_bound_on_gaussian_images():
    x = (0.5 + 0.1 * torch.randn(4000, 1, 8, 8)) * torch.linspace(0.2, 1, 64).reshape(8, 8)
    sigma = 0.1   # z = x + noise tells I(x; z) = sum 1/2 ln(1 + var / sigma^2)
    variances = x.flatten(1).var(0)
    nats = 0.5 * (1 + variances / sigma**2).log().sum().item()
    mean = x[:3000].flatten(1)
    decode = decoders.latent_decoder(mean, torch.full_like(mean, 2 * np.log(sigma)), x[:3000], 20)
    error = (decode(x[3000:].flatten(1) + sigma * torch.randn(1000, 64)) - x[3000:]).square().mean().item()
    assert error > scoring.distortion_bound(x, nats)


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
    """Inputs with no smoothness and no bounds, of a scale that it has to find out: exactly; with three channels,
    which leave a third of the equations an unknown, only some exactly."""
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
    before, dense = newton.before_dense(head.features)
    slope = torch.stack([one[f"features.{dense}.bias"] for one in observed]) @ head.features[dense].weight
    problem = newton.Problem(before, "3.weight", before(z), slope,
                             torch.stack([one["features.3.weight"].flatten() for one in observed]))
    made = newton.problem_of(head, observed)
    assert made.convolution == "3.weight"
    for name in ("features", "slope", "routed"):
        assert torch.allclose(getattr(made, name), getattr(problem, name), atol=1e-5)
    for with_routed in (False, True):
        residual = problem.residuals(torch.arange(3), with_routed)
        assert residual(z).abs().max() < 1e-5 and residual(z + 0.3 * torch.randn_like(z)).abs().max() > 1e-2
    swapped = problem.residuals(torch.tensor([1, 0, 2]), True)
    assert swapped(z[[1, 0, 2]]).abs().max() < 1e-5 and swapped(z).abs().max() > 1e-2


def test_a_search_takes_the_features_answer_where_all_equations_like_it_better():
    """x - 1 is the features' equation; that of the gradient is 2 (x - 3) or, where it agrees, 2 (x - 1)."""
    class Linear:
        def residuals(self, which, with_routed):
            other = torch.tensor([3.0, 1.0])[which][:, None]
            return lambda x: torch.cat([x.flatten(1) - 1] + [2 * (x.flatten(1) - other)] * with_routed, 1)
    torch.manual_seed(0)
    found, error = newton.search(Linear(), torch.tensor([1, 0]), torch.full((2, 1, 1, 1), 50.0), 30)
    assert found.flatten().tolist() == pytest.approx([1.0, 2.6], abs=1e-3)
    assert error.tolist() == pytest.approx([0.0, 1.6**2 + 0.8**2], abs=1e-3)
    found, error = newton.search(Linear(), torch.tensor([1]), torch.full((1, 1, 1, 1), 50.0), 0)
    assert found.item() == pytest.approx(1.0, abs=1e-3) and error.item() == pytest.approx(0.0, abs=1e-3)


def test_gauss_newton_solves_least_squares_in_one_step():
    torch.manual_seed(1)
    matrix, goal = torch.randn(20, 6), torch.randn(3, 20)
    found, error = newton.gauss_newton(lambda x: x.flatten(1) @ matrix.T - goal, torch.zeros(3, 1, 2, 3), 30)
    expected = torch.linalg.lstsq(matrix, goal.T).solution.T
    assert torch.allclose(found.flatten(1), expected, atol=1e-3)
    assert torch.allclose(error, (expected @ matrix.T - goal).square().sum(1), rtol=1e-3)


@pytest.mark.parametrize("kind", [VariationalEncoder, Encoder])
def test_a_search_in_a_generator_finds_an_image_that_it_can_draw(kind, monkeypatch):
    """A generator of two numbers: the image is found, and the likelier restart comes first."""
    head, directions = Classifier(SHAPE, 4).eval(), torch.randn(2, 64)
    encoder = (kind(SHAPE, -6.0) if kind is VariationalEncoder else kind(SHAPE)).eval().requires_grad_(False)
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
    # Without noise the likelihood has a variance of 1, and the prior of codes pulls harder than z.
    assert (errors[0] < (0.05 if kind is VariationalEncoder else 1.0) * blank).all()
    assert (errors[0] <= errors[-1] + 1e-4).all()   # all restarts may end at the same image


def test_moments_are_apart_by_class_mean_spread_and_covariance():
    """By hand: two classes of four latents each, in units of the spread of all."""
    seen, labels = torch.randn(8, 3), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    apart = adversaries.moment_distance(seen, labels)
    order = torch.tensor([2, 0, 3, 1, 7, 6, 5, 4])
    assert apart(seen[order], labels[order]).item() == pytest.approx(0, abs=1e-9)   # whichever images they are of
    assert apart(seen, 1 - labels) > 0.1   # the classes' moments, and not only those of all
    moved = seen + torch.tensor([1.0, 0.0, 0.0]) * seen.std()
    assert apart(moved, labels).item() == pytest.approx(2 / 3, rel=1e-5)   # one of three means, in two classes
    wider = 2 * (seen - seen[:4].mean(0)) + seen[:4].mean(0)
    only = labels == 0
    first = seen[only] / seen.std()
    expected = first.std(0).square().mean() + (3 * 10 * first.T.cov()).square().mean()
    assert apart(wider[only], labels[only]).item() == pytest.approx(expected.item(), rel=1e-4)
    one = adversaries.moment_distance(seen[3:], labels[3:])   # a single latent has no moments
    assert one(seen[only], labels[only]) == 0


@pytest.mark.slow
def test_a_shadow_encoder_is_aligned_with_the_latents_seen():
    """Another network's latents of other images: the aligned encoder maps images nearer to them than one that is
    not aligned."""
    torch.manual_seed(0)
    victim, start = VariationalEncoder(SHAPE, -6.0).eval(), VariationalEncoder(SHAPE, -6.0)
    head = Classifier(SHAPE, 2).eval().requires_grad_(False)
    labels = torch.arange(400) % 2
    x = (0.5 * torch.rand(400, *SHAPE) + 0.5 * labels[:, None, None, None] * torch.rand(SHAPE)).clamp(0, 1)
    view = Knowledge(head, None, True, SHAPE)
    with torch.no_grad():
        seen = victim(x[:200])[0]

    def cosine(apart):
        network = torch.nn.ModuleDict({"encoder": copy.deepcopy(start)})
        shadow = adversaries.shadow_encoder(view, network, x[200:], labels[200:], 20, 0.0, apart)
        return torch.cosine_similarity(shadow.posterior(x[:200])[0], seen, dim=1).mean().item()
    plain, aligned = cosine(None), cosine(adversaries.moment_distance(seen, labels[:200]))
    assert aligned > 0.8 and plain < 0.5, (aligned, plain)
