"""The driver puts the parts together: the clients' images, and who trains and is evaluated in a round."""
from types import SimpleNamespace

import numpy as np
import pytest

import datasets
import sampling
from engine.clients import Clients
from methods import METHODS
from options import args_parser
from server.privacy import ClientDP
from utils import rng


@pytest.fixture
def clients(driver, place):
    """A function from flags to Clients that train nothing."""
    def make(*flags):
        args = args_parser(place.argv(*flags))
        data = datasets.load("tiny", args.data_dir)
        owned, splits = driver.partition(args, data)
        trainer = driver.make_trainer(args, data, driver.torch.device("cpu"))
        run = SimpleNamespace(ranks=None)
        return Clients(args, trainer, driver.MaliciousClients(None, 0, args.num_users, 1), owned, splits, run)
    return make


def same(ours, expected):
    return all(np.array_equal(a, b) for pair, other in zip(ours, expected, strict=True)
               for a, b in zip(pair, other, strict=True))


def test_each_split_has_a_purpose_of_its_own(clients):
    """A validation split that drew what the test split draws would not be independent of it."""
    plain = clients("--num_users", 3)
    labels = plain.trainer.labels.numpy()
    assert same(plain.splits_in(2), sampling.split_all(plain.owned, labels, 0.1, 1, "split"))
    train = [images for images, _ in plain.splits]
    validated = clients("--num_users", 3, "--validate").splits_in(2)
    assert same(validated, sampling.split_all(train, labels, 0.1, 1, "validation"))
    small = clients("--partition", "dirichlet", "--alpha", 0.01, "--num_users", 6, "--local_bs", 32)
    assert min(map(len, small.owned)) == 36 and min(len(images) for images, _ in small.splits) == 32   # a batch
    resplit = clients("--resplit", "--seed", 4)
    first, second = resplit.splits_in(1), resplit.splits_in(2)
    assert not same(first, second) and same(first, resplit.splits_in(1))
    for (images, aside), owned in zip(second, resplit.owned, strict=True):
        assert np.array_equal(np.sort(np.concatenate([images, aside])), owned)


@pytest.mark.parametrize("method", ["rve_pfl", "client_dp", "client_dp_adaptive"])
def test_the_clients_of_a_round(clients, method):
    """Poisson sampling, as client-level DP's epsilon assumes; else always the same number."""
    noise = ["--noise_multiplier", 1] if METHODS[method].poisson else []
    made = clients("--frac", 0.25, "--num_users", 40, "--local_bs", 4, "--partition", "iid", "--method", method,
                   *noise)
    counts = [len(made.select(number)) for number in range(1, 200)]
    if METHODS[method].poisson:   # binomial: mean 10, variance 7.5
        assert np.mean(counts) == pytest.approx(10, abs=0.7) and np.var(counts) == pytest.approx(7.5, rel=0.4)
    else:
        assert set(counts) == {10}
    assert made.select(3) == sampling.sample_clients(40, 0.25, rng(1, "sample", round=3), METHODS[method].poisson)
    assert all(row.poisson == (row.server is not None and issubclass(row.server, ClientDP))
               for row in METHODS.values())


def test_rounds_of_full_sharing_and_of_evaluation(clients):
    made = clients("--full_sharing_rounds", 2, "--rounds", 5, "--eval_every", 2)
    assert [made.trainer_in(number).method.shared for number in (1, 2, 3)] == [("",), ("",), ("classifier.",)]
    assert [number for number in range(1, 6) if made.evaluates(number)] == [2, 4, 5]
    borrowed = clients("--encoders_from", "other").trainer
    assert not any(value.requires_grad for value in borrowed.model.encoder.parameters())
    optimizer = borrowed.make_optimizer(dict(borrowed.model.named_parameters()))
    assert [group["scale"] for group in optimizer.param_groups] == [0.0, 0.1]
