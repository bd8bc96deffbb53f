"""The discrete bottleneck: an encoder that chooses one of M codes, and what can depend on an image behind it."""
import json
import math

import pytest
import torch
from attacked import Attacked
from test_update import make, without_draws

from attack import mi_attack
from encoders import CodePrior
from models import RVE
from options import args_parser

SHAPE = (1, 8, 8)


def build(codes, classes=4):
    torch.manual_seed(0)
    return RVE(SHAPE, classes, -2.0, "categorical", 0.5, codes)


@pytest.mark.parametrize("codes", [4, 7, 64])
def test_no_more_latents_than_codes_to_the_last_bit(codes):
    """In training, too, where the gradient passes straight through the choice."""
    encoder, x = build(codes).encoder, torch.rand(300, *SHAPE)
    for mode in (True, False):
        mu, logvar = encoder.train(mode)(x)
        assert not logvar.any() and {*map(tuple, mu.tolist())} <= {*map(tuple, encoder.means.tolist())}
    chosen = encoder.scores(x).argmax(1)
    assert torch.equal(mu, encoder.means[chosen]) and len(chosen.unique()) > 1
    assert torch.equal(encoder.means, build(codes).encoder.means) and len(encoder.means) == codes


def test_the_gradient_is_that_of_the_mean_over_codes():
    encoder, scores = build(6).encoder, torch.randn(5, 6, requires_grad=True)
    weight = torch.randn(5, 64)
    (slope,) = torch.autograd.grad((encoder.gaussian(scores)[0] * weight).sum(), scores)
    (expected,) = torch.autograd.grad(((scores.softmax(1) @ encoder.means) * weight).sum(), scores)
    assert torch.equal(slope, expected) and slope.abs().min() > 0


def test_the_heads_gradient_depends_on_an_image_through_its_code_alone(tiny_arrays):
    """After a step on one image, a client with a private encoder uploads the same for all images of a code."""
    client, head, private = make(tiny_arrays, prior="categorical", codes=4)
    model = without_draws(client).model.train()
    x = client._pixels(torch.arange(200))
    chosen = model.encoder.scores(x).argmax(1)
    first, second = (chosen == chosen.mode().values).nonzero().flatten()[:2].tolist()
    other = (chosen != chosen.mode().values).nonzero().flatten()[0].item()

    def upload_gradient(number):
        torch.manual_seed(3)
        y = torch.tensor([2])
        objective, _ = client.objective(x[number:number + 1], model(x[number:number + 1], y), y, 1, head)
        gradient = torch.autograd.grad(objective.sum(), list(model.parameters()), allow_unused=True)
        return [slope for (name, _), slope in zip(model.named_parameters(), gradient, strict=True)
                if name.startswith("classifier.")]
    one, same, different = map(upload_gradient, (first, second, other))
    assert not torch.equal(x[first], x[second]) and all(map(torch.equal, one, same))
    assert not all(map(torch.equal, one, different))


def test_kl_by_hand():
    prior, scores = CodePrior(6, 3), torch.tensor([[1.0, 5, 2, 0, 3, 0], [0.0, 9, 0, 0, 0, 0]])
    y = torch.tensor([1, 2])   # codes 1 and 4; 2 and 5
    q = scores.softmax(1)
    assert torch.allclose(prior.train().kl(scores, y), torch.stack([-(q[0, 1] + q[0, 4]).log(),
                                                                    -(q[1, 2] + q[1, 5]).log()]))
    right, wrong = prior.eval().kl(scores, y).tolist()
    assert right == pytest.approx(-math.log(0.95 / 2)) and wrong == pytest.approx(-math.log(0.05 / 4))


def test_codes_are_drawn_without_a_check_that_waits_for_the_device():
    """With the numbers of ``torch.multinomial``, which a CUDA graph cannot hold."""
    prior, y, drawn = CodePrior(7, 3), torch.arange(60) % 3, []
    for draw in (prior.draw, lambda y: torch.multinomial(prior.own[y].float(), 1).squeeze(1)):
        torch.manual_seed(2)
        drawn.append((draw(y), torch.rand(1)))
    assert all(map(torch.equal, *drawn))


def test_a_sure_and_wrong_choice_still_has_a_gradient():
    scores = torch.tensor([[60.0, 0.0]], requires_grad=True)
    CodePrior(2, 2).train().kl(scores, torch.tensor([1])).backward()
    assert scores.grad[0].tolist() == pytest.approx([1.0, -1.0])


def test_a_client_learns_its_classes_through_codes(tiny_arrays):
    client, head, private = make(tiny_arrays, prior="categorical", kl_weight=1.0)
    images = torch.arange(200).numpy()
    for round in range(1, 5):
        head, private, _ = client.train(0, round, images, head, private)
    metrics = client.evaluate(0, 5, images, head, private)
    assert metrics["accuracy"] > 0.9 and metrics["kl_nats"] < 0.5


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_place, tiny_arrays):
    flags = ("--restarts", 1, "--iterations", 2, "--train_epochs", 1)
    codes = ("--prior", "categorical", "--codes", 5, "--rounds", 2, "--save_rounds", 1)
    return Attacked(make_place(tmp_path_factory.mktemp("codes")), tiny_arrays, mi_attack, flags,
                    {"codes": codes, "trunk": ("--method", "rve_pfl_trunk", *codes)})


def test_no_observation_of_one_encoder_identifies_more_than_its_codes(trained):
    """M codes among N candidates: at most M / N, from one z, a hundred, or mu, and with the exact likelihood."""
    assert trained.attack("codes", "--adversary", "stolen_model", "--attack", "reidentification", "--observe", "z",
                          "z100", "mu") == 0
    own = trained.csv("codes").query("control == ''")
    used = own.groupby("observed")["nearest_rank"].nunique()
    for observed, rows in own.groupby("observed"):
        assert 0 < rows["identified"].sum() <= 5 + 1e-9, observed   # a candidate of each code at most
    assert len(own["observed"].unique()) == 3 and used.max() <= 5
    exact = own[own["observed"] == "mu"].set_index("image")["identified"]
    many = own[own["observed"] == "z100"].set_index("image")["identified"]
    assert exact.to_numpy() == pytest.approx(many.loc[exact.index].to_numpy())   # more draws tell nothing new


@pytest.mark.parametrize("flags", [(), ("--secure_aggregation",)])
def test_codes_outlast_rounds_in_which_all_parameters_are_shared(place, flags):
    """Which of them are a class's own is no parameter, so that it is neither averaged nor stored."""
    assert place.main("--prior", "categorical", "--full_sharing_rounds", 1, "--rounds", 2, *flags) == 0
    means = []
    for file, key in (("client_0", "parameters"), ("client_1", "parameters"), ("server", "private_start")):
        state = place.saved(2, f"{file}.pt")[key]
        assert not any(name.startswith("prior.") for name in state)
        means.append(state["encoder.means"])
    count = json.loads((place.results / "config.json").read_text())["parameters"]
    assert count["total"] == count["encoder"] + count["classifier"]
    assert all(torch.equal(means[0], other) for other in means) and means[0].std() > 0.1


def test_the_stated_bound_is_log_m_at_most(trained):
    """For labels that the encoder did not choose, whose KL is larger."""
    x, y = trained.images("codes", 20)
    stated = [trained.victim("codes").noise(x, labels) for labels in (y, (y + 1) % 4)]
    assert max(row["kl_nats"] for row in stated) > math.log(5) == max(row["bound_nats"] for row in stated)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["codes", "trunk"])
def test_every_attack_runs_on_codes(trained, few_steps, run):
    assert trained.attack(run, "--overwrite", "--attack", "all", "--images", 2, "--observe", "z", "rounds") == 0
    assert trained.csv(run)["attack"].nunique() > 12


def test_too_few_codes_are_refused(place, capsys):
    line = place.refuses(capsys, "--prior", "categorical", "--codes", 3)
    assert line.endswith("--codes 3: --dataset tiny has 4 classes, each of which needs a code of its own; "
                         "give at least 4")
    assert not place.results.exists() and not place.models.exists()


def test_the_prior_sets_defaults_that_flags_override():
    args = args_parser(["--prior", "categorical"])
    assert (args.kl_weight, args.head_lr, args.codes, args.private_init) == (1.0, 1.0, None, True)
    args = args_parser(["--prior", "class", "--kl_weight", "0.1", "--method", "local", "--no-private_init"])
    assert (args.kl_weight, args.head_lr, args.private_init) == (0.1, 1.0, False)
    args = args_parser(["--prior", "normal"])
    assert (args.kl_weight, args.head_lr, args.private_init) == (1e-5, 0.1, False)
