"""How the driver puts the parts together: who owns, trains and is tested on what, and when."""
from types import SimpleNamespace

import numpy as np
import pytest

import datasets
import sampling
from methods import METHODS
from options import args_parser
from server.privacy import ClientDP
from utils import rng


@pytest.fixture
def dealt(driver, place):
    """A function from flags to the options, the data, and who owns and is tested on what."""
    def deal(*flags):
        args = args_parser(place.argv(*flags))
        data = datasets.load("tiny", args.data_dir)
        return args, data, *driver.deal(args, data)
    return deal


def test_every_client_has_a_batch_to_train_on(dealt):
    """Of 240 images six clients own 36 at least, of which a tenth is held out."""
    args, _, owned, splits = dealt("--partition", "dirichlet", "--alpha", 0.01, "--num_users", 6, "--local_bs", 32)
    assert min(map(len, owned)) == 36 and min(len(train) for train, _ in splits) == args.local_bs


def same(ours, expected):
    return all(np.array_equal(a, b) for one, other in zip(ours, expected, strict=True)
               for a, b in zip(one, other, strict=True))


def test_each_split_has_a_purpose_of_its_own(dealt):
    """A validation split that drew what the test split draws would not be independent of it."""
    _, data, owned, splits = dealt("--num_users", 3)
    test = sampling.split_all(owned, data.labels, 0.1, 1, "split")
    assert same(splits, test)
    validation = dealt("--num_users", 3, "--validate")[3]
    train = [own for own, _ in test]
    assert same(validation, sampling.split_all(train, data.labels, 0.1, 1, "validation"))
    assert not same(validation, sampling.split_all(train, data.labels, 0.1, 1, "split"))
    assert not any(np.intersect1d(own, aside).size for (_, aside), pair in zip(test, validation, strict=True)
                   for own in pair)


def federation(driver, dealt, *flags):
    """A Federation of tiny clients; its trainers train nothing."""
    args, data, owned, splits = dealt(*flags)
    labels = driver.torch.from_numpy(data.labels)
    trainers = [SimpleNamespace(name=name, method=METHODS[args.method], labels=labels) for name in ("warm", "own")]
    malicious = driver.MaliciousClients(None, 0, args.num_users, args.seed)
    return driver.Federation(args, tuple(trainers), None, malicious, owned, splits, None)


def test_resplit_draws_other_splits_of_the_same_images_in_each_round(driver, dealt):
    federated = federation(driver, dealt, "--resplit", "--seed", 4)
    first, second = federated.splits_in(1), federated.splits_in(2)
    assert not same(first, second) and same(first, federated.splits_in(1))
    for (train, aside), own in zip(second, federated.owned, strict=True):
        assert np.array_equal(np.sort(np.concatenate([train, aside])), own)
    fixed = federation(driver, dealt)
    assert same(fixed.splits_in(1), fixed.splits_in(2)) and same(fixed.splits_in(1), fixed.splits)


@pytest.mark.parametrize("method", METHODS)
def test_who_trains_in_a_round(driver, dealt, method):
    """Poisson sampling, as client-level DP's epsilon assumes; else always the same number."""
    row, federated = METHODS[method], federation(driver, dealt, "--frac", 0.25, "--num_users", 40)
    federated = driver.replace(federated, trainers=(SimpleNamespace(method=row),) * 2)
    counts = [len(federated.sample(number)) for number in range(1, 200)]
    assert row.poisson == (row.server is not None and issubclass(row.server, ClientDP))
    if row.poisson:   # binomial: mean 10, variance 7.5
        assert np.mean(counts) == pytest.approx(10, abs=0.7) and np.var(counts) == pytest.approx(7.5, rel=0.4)
    else:
        assert set(counts) == {10}
    expected = sampling.sample_clients(40, 0.25, rng(1, "sample", round=3), row.poisson)
    assert federated.sample(3) == expected


def test_the_warm_rounds_are_the_first_and_no_more(driver, dealt):
    federated = federation(driver, dealt, "--full_sharing_rounds", 2)
    assert [federated.trainer(number).name for number in (1, 2, 3, 4)] == ["warm", "warm", "own", "own"]


@pytest.mark.parametrize("every, rounds, expected", [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (9, 4, [4])])
def test_which_rounds_are_evaluated(driver, dealt, every, rounds, expected):
    federated = federation(driver, dealt, "--eval_every", every, "--rounds", rounds)
    assert [number for number in range(1, rounds + 1) if federated.evaluates(number)] == expected


def test_borrowed_encoders_are_frozen_and_their_learning_rate_is_zero(driver, place):
    args = args_parser(place.argv("--encoders_from", "other"))
    trainer = driver.make_trainer(args, datasets.load("tiny", args.data_dir), driver.torch.device("cpu"))
    assert not any(value.requires_grad for value in trainer.model.encoder.parameters())
    assert trainer.training.freezes_private
    optimizer = trainer.make_optimizer(dict(trainer.model.named_parameters()))
    assert [group["scale"] for group in optimizer.param_groups] == [0.0, args.head_lr]
