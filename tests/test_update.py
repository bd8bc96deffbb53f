"""A client's round: what is uploaded, what training and evaluation compute, and from which draws."""

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_fscore_support
from torch.distributions import Normal, kl_divergence

from devices import seed_torch
from engine import products
from methods import METHODS
from metrics import Tally, over_clients
from models import Output
from runs.csvs import METRICS
from update import ClientState, Diverged, Trainer, Training


def make(tiny_arrays, name="rve_pfl", prior="normal", codes=None, **changes):
    method = METHODS[name]
    seed_torch(1, "init")
    model = method.build((1, 8, 8), 4, {**{option.name: value for option, value in method.reads.items()},
                                        "init_logvar": -4.0, "prior": prior, "codes": codes})
    settings = {"seed": 1, "epochs": 1, "batch_size": 32, "optimizer": "adam", "lr": 1e-3, "head_lr": 1.0,
                "lr_decay": 1e-3, "lr_warmup": 0.0, "momentum": 0.0, "kl_weight": 1e-5, "kl_warmup": 0,
                "eval_samples": 4, "augment": "none", "dtype": torch.float32, **changes}
    client = Trainer(model, method, torch.from_numpy(tiny_arrays["train_images"]),
                     torch.from_numpy(tiny_arrays["train_labels"]).long(), 4,
                     Training(**settings, options={option.name: value for option, value in method.reads.items()}))
    head, private = client.shared_and_private(client.state())
    return client, head, ClientState(private)


FIRST, SECOND = np.arange(100), np.arange(100, 180)


def without_draws(client):
    """Turn off dropout: without an encoder's noise, what is left is arithmetic, which agrees to rounding."""
    for part in client.model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return client


def update_of(trained, head, private):
    """A client's whole update as one vector."""
    start, end = {**head, **private.parameters}, {**trained.upload, **trained.client_state.parameters}
    return torch.cat([(end[name].cpu() - start[name].cpu()).flatten() for name in start])


def flat(state):
    """All parameters as one vector."""
    return torch.cat([value.flatten() for value in state.values()])


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name, shared", [("rve_pfl", "classifier."), ("lg_fedavg", "classifier."),
                                          ("nbafl", "classifier."), ("local", None)])
def test_what_is_uploaded_and_what_stays(tiny_arrays, name, shared):
    client, head, private = make(tiny_arrays, name)
    upload, kept, _ = client.train(0, 1, FIRST, head, private)
    assert set(upload) == {n for n in client.model.state_dict() if shared and n.startswith(shared)}
    assert equal(kept.trained_shared, upload if name == "nbafl" else {})   # where the server sees less
    assert set(upload) | set(kept.parameters) == set(client.model.state_dict())
    assert not set(upload) & set(kept.parameters)
    assert any(n.startswith("encoder.") for n in kept.parameters) == (name != "nbafl")


def test_the_objective_is_cross_entropy_and_beta_times_kl_and_the_rehearsal(tiny_arrays):
    client, *_ = make(tiny_arrays, kl_weight=0.1)
    images, labels = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 3])
    logits, kl, replay = torch.randn(3, 4), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])
    for output, more in ((Output(logits), 0), (Output(logits, kl), 0.1 * kl),
                         (Output(logits, kl, auxiliary=replay), 0.1 * kl + replay)):
        whole, loss = client.objective(images, output, labels, 1, {})
        assert torch.allclose(loss, -logits.log_softmax(1)[torch.arange(3), labels])
        assert torch.allclose(whole, loss + more)


def test_training_learns_and_evaluation_repeats(tiny_arrays):
    client, head, private = make(tiny_arrays, epochs=15)
    upload, kept, figures = client.train(0, 1, FIRST, head, private)
    held_out = client.evaluate(0, 1, SECOND, upload, kept)
    assert figures["accuracy"] > 0.9 and held_out["accuracy"] > 0.9 and held_out["n"] == 80
    assert held_out == client.evaluate(0, 1, SECOND, upload, kept)
    client.train(1, 1, SECOND, head, private)
    torch.randn(7)
    again, _, figures_again = client.train(0, 1, FIRST, head, private)
    assert equal(upload, again) and figures == figures_again   # whoever trained before
    assert not equal(upload, client.train(0, 2, FIRST, head, private)[0])


def test_the_optimiser_has_the_runs_momentum(tiny_arrays):
    client, *_ = make(tiny_arrays, optimizer="sgd", momentum=0.9)
    groups = client.make_optimizer(dict(client.model.named_parameters())).param_groups
    assert {group["momentum"] for group in groups} == {0.9}


def test_evaluation_takes_kl_to_the_prior_of_each_images_label(tiny_arrays):
    client, head, private = make(tiny_arrays, prior="class")
    mu, logvar = client.model.eval().encoder(client._pixels(torch.from_numpy(SECOND)))
    priors, y = client.model.prior, client.labels[SECOND]
    apart = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(priors.mu[y], (0.5 * priors.logvar[y]).exp()))
    found = client.evaluate(0, 1, SECOND, head, private)["kl_nats"]
    assert found == pytest.approx(apart.sum(1).mean().item(), rel=1e-5)


def test_flip_mirrors_about_half_of_the_training_images_and_nothing_else(tiny_arrays):
    client, head, private = make(tiny_arrays, augment="flip")
    batch = torch.arange(200)
    x, mirrored = client._pixels(batch), client.placed(batch, client.placements(200))
    same = (mirrored == x).flatten(1).all(1)
    assert 60 < same.sum() < 140
    assert torch.equal(mirrored[~same], x[~same].flip(3))
    assert mirrored.stride() == x.stride()   # channels-last
    plain, *_ = make(tiny_arrays)
    assert torch.equal(plain.placed(batch, plain.placements(200)), x)
    assert client.evaluate(0, 1, SECOND, head, private) == plain.evaluate(0, 1, SECOND, head, private)


def test_shift_moves_an_image_and_mirrors_its_edges(tiny_arrays):
    client, *_ = make(tiny_arrays, augment="flip+shift")
    client.images = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8, 1).expand(300, 8, 8, 1)
    seen = client.placed(torch.arange(300), client.placements(300)).mul(255).round().int()[:, 0]   # pixel numbers
    padded = np.pad(np.arange(64).reshape(8, 8), 4, mode="reflect")
    possible = {padded[i:i + 8, j:j + 8][:, ::step].tobytes(): (i, j, step)
                for i in range(9) for j in range(9) for step in (1, -1)}
    found = {possible[image.astype(np.int64).tobytes()] for image in seen.numpy()}
    assert {i for i, _, _ in found} == set(range(9)) and len({(j, step) for _, j, step in found}) >= 9


def test_a_loss_that_is_not_finite_names_client_round_and_cause(tiny_arrays):
    client, head, private = make(tiny_arrays, lr=1000.0, epochs=5)
    before = {name: value.clone() for name, value in private.parameters.items()}
    with pytest.raises(Diverged, match="client 3, round 2: .*--lr 1000"):
        client.train(3, 2, FIRST, head, private)
    assert equal(before, private.parameters)
    trained = {name: torch.zeros_like(value) for name, value in client.state().items()}
    trained["encoder.mu.bias"][1] = float("inf")   # one value of one parameter
    with pytest.raises(Diverged):
        client.local_update(3, 2, trained, 1, Tally())


def test_figures_equal_scikit_learns():
    """With a class that is never predicted, and one that is only predicted."""
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 10, 300), rng.integers(0, 10, 300)
    predicted[:150] = labels[:150]
    labels[labels == 3], predicted[predicted == 5] = 4, 6
    tally = Tally()
    for part in np.split(np.arange(300), [100, 220]):
        tally.add(torch.ones(len(part)), None, torch.eye(10)[predicted[part]], torch.from_numpy(labels[part]))
    figures = tally.result(10)
    expected = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    assert [figures[name] for name in ("precision", "recall", "f1")] == pytest.approx(expected[:3], abs=1e-6)
    assert figures["accuracy"] == pytest.approx((labels == predicted).mean())
    assert figures["loss"] == 1 and np.isnan(figures["kl_nats"])
    assert figures["images"] == [(labels == c).sum() for c in range(10)] and figures["images"][3] == 0
    assert figures["right"] == [((labels == c) & (predicted == c)).sum() for c in range(10)]


def test_accuracy_over_all_images_and_by_class_by_hand():
    """One client is right on 2 of 3 images, the other on 1 of 2; nobody has an image of class 2."""
    rows = []
    for labels, predicted in (([0, 0, 1], [0, 1, 1]), ([1, 1], [2, 1])):
        tally = Tally()
        tally.add(torch.ones(len(labels)), None, torch.eye(3)[predicted], torch.tensor(labels))
        rows.append({"stage": "deployed", "split": "test", **tally.result(3)})
    mean, = over_clients(rows)
    assert mean["accuracy"] == pytest.approx(7 / 12) and mean["accuracy_images"] == pytest.approx(3 / 5)
    assert [mean[f"accuracy_class_{c}"] for c in range(3)] == pytest.approx([1 / 2, 2 / 3, np.nan], nan_ok=True)


@pytest.mark.parametrize("clients, lowest", [(1, 1), (14, 1), (15, 2), (150, 15)])
def test_the_worst_decile_of_clients(clients, lowest):
    """Squares, so that no other number of them has the same mean; the order of rows says nothing."""
    accuracy = np.random.default_rng(0).permutation(np.arange(clients) ** 2.0)
    rows = [{"stage": "trained", "split": "test", **dict.fromkeys(METRICS, 0), "accuracy": a, "images": [1],
             "right": [1]} for a in accuracy]
    assert over_clients(rows)[0]["accuracy_worst"] == pytest.approx((np.arange(lowest) ** 2.0).mean())


def test_bf16_computes_what_fp32_does(tiny_arrays):
    """One step: over many, any difference in rounding grows."""
    figures = []
    for dtype in (torch.float32, torch.bfloat16):
        client, head, private = make(tiny_arrays, batch_size=160, dtype=dtype)
        upload, kept, found = client.train(0, 1, np.arange(160), head, private)
        assert all(value.dtype == torch.float32 for value in (*upload.values(), *kept.parameters.values()))
        figures.append(found)
    assert figures[1]["loss"] == pytest.approx(figures[0]["loss"], rel=0.01)
    assert figures[1]["kl_nats"] == pytest.approx(figures[0]["kl_nats"], rel=0.01)
    assert figures[1]["loss"] != figures[0]["loss"]   # else bf16 was not used


def test_products_of_onednn_agree_with_pytorchs(tiny_arrays, monkeypatch):
    """Training in float32 on AMD's chips and elsewhere: to rounding, and never in bfloat16."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    results, calls, forward = [], [], products.WideLinear.forward
    monkeypatch.setattr(products.WideLinear, "forward", lambda *given: calls.append(1) or forward(*given))
    monkeypatch.setattr(products, "WIDE", 500_000)   # the encoder's layer of 1024 x 512 alone
    for slow in (False, True):
        monkeypatch.setattr("update.mkl_is_slow", lambda slow=slow: slow)
        client, head, private = make(tiny_arrays, optimizer="sgd", lr=0.1)
        update = client.train(0, 1, FIRST, head, private)
        results.append((update, client.evaluate(0, 1, SECOND, update.upload, update.client_state)))
        assert len(calls) == (5 if slow else 0)   # four batches of training, one of evaluation
    (one, figures), (other, others) = results
    torch.testing.assert_close(one.client_state.parameters, other.client_state.parameters, atol=1e-6, rtol=1e-5)
    assert [figures[name] for name in METRICS] == pytest.approx([others[name] for name in METRICS], rel=1e-4)
    client, head, private = make(tiny_arrays, dtype=torch.bfloat16)
    client.train(0, 1, FIRST, head, private)
    assert len(calls) == 5


@pytest.mark.parametrize("maker, slow", [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_mkl_is_slow_on_chips_of_amd(tmp_path, monkeypatch, maker, slow):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {maker}\n")
    assert products.mkl_is_slow(tmp_path / "cpuinfo") is slow
    assert not products.mkl_is_slow(tmp_path / "nowhere")
