"""Whole runs, recomputed by other code from the files they leave: what is trained, sent, kept, evaluated and
attacked. Each test is here because some change of one line survived all others."""
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from attacked import Attacked

from attack import evaluation, latents, mi_attack
from attack.attacks import ATTACKS
from datasets import load
from devices import seed_torch
from methods import METHODS
from options import args_parser
from runs import setup
from runs.checkpoints import load_checked
from server.privacy import nbafl_sigmas
from utils import rng

SEED, USERS = 3, 3
COMMON = ("--seed", SEED, "--rounds", 2, "--save_rounds", 1, "--precision", "fp32", "--num_users", USERS,
          "--partition", "dirichlet", "--alpha", 1, "--lr", 0.004)
RUNS = {   # sizes differ; augmented but for the run whose training is recomputed
    "rve_pfl": ("--aggregation", "mean", "--eval_samples", 3, "--local_ep", 2, "--kl_weight", 0.01,
                "--kl_warmup", 2, "--head_lr", 0.3, "--lr_decay", 0.1),
    "lg_fedavg": ("--augment", "flip+shift", "--head_lr", 1),
    "fedavg": ("--augment", "flip+shift"),
}


class Ran:
    """Finished runs of one folder, and their files."""

    def __init__(self, place):
        self.place = place
        with np.load(place.folder / "data" / "tiny.npz") as data:
            self.images = np.concatenate([data["train_images"], data["test_images"]])
            self.labels = torch.from_numpy(np.concatenate([data["train_labels"], data["test_labels"]])).long()

    def csv(self, run, name="clients.csv"):
        return pd.read_csv(self.place.folder / "results" / run / name)

    def part(self, run):
        return dict(np.load(self.place.folder / "results" / run / "partition.npz"))

    def file(self, run, round, name):
        return load_checked(self.place.folder / "models" / run / f"round_{round}" / name)

    def pixels(self, index):
        return torch.from_numpy(self.images[index]).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def ran(tmp_path_factory, make_place):
    place = make_place(tmp_path_factory.mktemp("protocol"))
    for method, flags in RUNS.items():
        assert place.main("--method", method, "--run_name", method, *COMMON, *flags) == 0
    return Ran(place)


def predicted(model, state, x, draws):
    """Class probabilities ``N x 4`` of 8 x 8 images, mean over draws of z, and the mean KL."""
    model.load_state_dict(state)
    if "encoder.logvar.weight" not in state:
        return model(x).logits.softmax(1), None
    mu, logvar = model.encoder(x)
    kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1).mean().item()
    noise = torch.randn(draws, *mu.shape)
    each = [model.classifier(z.reshape(-1, 8, 8, 1).permute(0, 3, 1, 2)).softmax(1)
            for z in mu + logvar.exp().sqrt() * noise]
    return torch.stack(each).mean(0), kl


@torch.no_grad()
@pytest.mark.parametrize("method", RUNS)
@pytest.mark.parametrize("stage", ["trained", "deployed"])
def test_held_out_figures_are_those_of_the_files(ran, method, stage):
    """Deployed: ``server.pt``'s head on the private encoder; trained: the upload on it. Neither with the head
    that was sent, and neither with dropout or augmentation."""
    rows = ran.csv(method).query("split == 'test'").set_index(["round", "stage", "client"])
    parts, apart, model = ran.part(method), [], METHODS[method].build((1, 8, 8), 4, {"init_logvar": -2.0}).eval()
    for r in (1, 2):
        shared, server = ran.file(method, r, "shared.pt"), ran.file(method, r, "server.pt")
        for k in range(USERS):
            own = ran.file(method, r, f"client_{k}.pt")["parameters"]
            head = server["head"] if stage == "deployed" else shared["uploads"][k]
            index = parts[f"test_{k}"]
            seed_torch(SEED, "evaluate", k, r)
            p, kl = predicted(model, {**own, **head}, ran.pixels(index), 3)
            loss = F.nll_loss(p.log(), ran.labels[index]).item()
            row = rows.loc[(r, stage, k)]
            assert row["n"] == len(index)
            assert row["loss"] == pytest.approx(loss, rel=1e-4), (r, k)
            assert row["accuracy"] == pytest.approx((p.argmax(1) == ran.labels[index]).double().mean().item())
            assert np.isnan(row["kl_nats"]) if kl is None else row["kl_nats"] == pytest.approx(kl, rel=1e-4)
            other, _ = predicted(model, {**own, **shared["sent"]}, ran.pixels(index), 3)
            apart.append(abs(F.nll_loss(other.log(), ran.labels[index]).item() / loss - 1))
    assert max(apart) > 5e-3   # the head that was sent would be told from the right one


@pytest.mark.parametrize("method", ["rve_pfl", "fedavg"])
def test_the_head_and_its_weights_are_those_of_training_sizes(ran, method):
    parts, server = ran.part(method), ran.csv(method, "server.csv").set_index(["round", "client"])
    sizes = np.array([len(parts[f"train_{k}"]) for k in range(USERS)])
    assert len(set(sizes)) > 1
    train = ran.csv(method).query("split == 'train'").set_index(["round", "client"])["n"]
    for r in (1, 2):
        shared, head = ran.file(method, r, "shared.pt"), ran.file(method, r, "server.pt")["head"]
        for k, n in enumerate(sizes):
            assert server.loc[(r, k), "n"] == train.loc[(r, k)] == n
            assert server.loc[(r, k), "weight"] == pytest.approx(n / sizes.sum())
        for name, value in head.items():
            mean = sum(n / sizes.sum() * shared["uploads"][k][name] for k, n in enumerate(sizes))
            assert torch.allclose(value, mean, atol=1e-6)
    before, after = ran.file(method, 1, "server.pt")["head"], ran.file(method, 2, "shared.pt")["sent"]
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_rounds_training_is_a_textbooks_on_the_clients_own_images(ran):
    """From what was sent and what the client had kept to what it uploads and keeps, in the second round."""
    parts, sent = ran.part("rve_pfl"), ran.file("rve_pfl", 2, "shared.pt")["sent"]
    for k in range(USERS):
        before, after = (ran.file("rve_pfl", r, f"client_{k}.pt") for r in (1, 2))
        own = parts[f"train_{k}"]
        batches = -(-len(own) // 32)
        assert (before["steps"], after["steps"]) == (2 * batches, 4 * batches)
        model = METHODS["rve_pfl"].build((1, 8, 8), 4, {"init_logvar": -2.0}).train()
        model.load_state_dict({**sent, **before["parameters"]})
        optimizer = torch.optim.Adam([{"params": list(part.parameters()), "lr": lr} for part, lr in
                                      ((model.encoder, 4e-3), (model.classifier, 1.2e-3))], eps=1e-7)
        warm = 0.2 * 2 * batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done, behind=before["steps"], warm=warm:
            min(1, (done + 1) / warm) / (1 + 0.1 * (behind + done)))
        orders = rng(SEED, "order", k, 2)
        seed_torch(SEED, "train", k, 2)
        for _ in range(2):
            tally, order = [], orders.permutation(own)
            for start in range(0, len(own), 32):
                batch = order[start:start + 32]
                optimizer.zero_grad()
                output = model(ran.pixels(batch))
                loss = F.cross_entropy(output.logits, ran.labels[batch])
                (loss + 0.5 * 0.01 * output.kl.mean()).backward()   # half of beta: round 2 of 2
                optimizer.step()
                scheduler.step()
                tally.append(loss.item() * len(batch))
        found = {**ran.file("rve_pfl", 2, "shared.pt")["uploads"][k], **after["parameters"]}
        assert all(torch.allclose(p, found[name], atol=2e-5) for name, p in model.state_dict().items())
        row = ran.csv("rve_pfl").query(f"round == 2 and client == {k} and split == 'train'").iloc[0]
        assert row["loss"] == pytest.approx(sum(tally) / len(own), rel=1e-3)


def files_of(place):
    """The last checkpoint's head, and the bytes of its files but for the server's."""
    folder = max(place.models.glob("round_*"))
    return load_checked(folder / "server.pt")["head"], {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "server.pt"}


def spoil(place, arrays, index):
    """The data file with other images at these pooled numbers."""
    images = np.concatenate([arrays["train_images"], arrays["test_images"]])
    images[index] = np.random.default_rng(9).integers(0, 256, images[index].shape)
    cut = len(arrays["train_images"])
    np.savez(place.folder / "data" / "tiny.npz", **{
        **arrays, "train_images": images[:cut], "test_images": images[cut:]})


@pytest.mark.parametrize("flags", [("--method", "lg_fedavg"), pytest.param(
    ("--method", "fedavg", "--validate"), marks=pytest.mark.slow)])
def test_held_out_images_reach_no_weight(place, tiny_arrays, flags):
    """Were the test images other ones, training, uploads and heads would be the same to the bit; so would all
    figures of a run that validates."""
    flags = ("--rounds", 2, "--num_users", 3, *flags)
    test = np.concatenate([images for _, images in setup.partition(args_parser(place.argv(
        *(flag for flag in flags if flag != "--validate"))), load("tiny", place.folder / "data"))[1]])
    assert place.main(*flags) == 0
    before, rows = files_of(place), pd.read_csv(place.results / "clients.csv")
    spoil(place, tiny_arrays, test)
    assert place.main(*flags, "--overwrite") == 0
    after, again = files_of(place), pd.read_csv(place.results / "clients.csv")
    assert before[1] == after[1] and all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    if "--validate" in flags:
        pd.testing.assert_frame_equal(rows, again)
    else:
        train = rows["split"] == "train"
        pd.testing.assert_frame_equal(rows[train], again[train])
        assert (rows["loss"] != again["loss"])[~train].all()   # and these alone differ


def test_the_seed_decides_who_owns_what_the_start_and_who_trains(place):
    seen = {}
    for seed in (1, 2):
        assert place.main("--num_users", 6, "--frac", 0.5, "--rounds", 3, "--save_rounds", 1, "--seed", seed,
                          "--local_bs", 8, "--overwrite", "--aggregation", "mean", "--method", "fedavg") == 0
        sent = place.saved(1, "shared.pt")["sent"]["classifier.output.weight"]
        asked = pd.read_csv(place.results / "server.csv").groupby("round")["client"].agg(tuple).tolist()
        with np.load(place.results / "partition.npz") as parts:
            seen[seed] = sent, asked, {*parts["train_0"], *parts["test_0"]}
    assert not torch.equal(seen[1][0], seen[2][0])
    assert all(seen[1][i] != seen[2][i] for i in (1, 2))
    assert len(set(seen[1][1])) > 1 and {len(clients) for clients in seen[1][1]} == {3}


def test_nbafls_noise_is_for_the_smallest_client(place):
    assert place.main("--method", "nbafl", "--num_users", 4, "--unequal", "--partition", "iid", "--rounds", 3,
                      "--epsilon", 30, "--delta", 0.02, "--exposures", 2, "--clip", 9, "--local_bs", 8) == 0
    facts = place.config["server"]
    sizes = pd.read_csv(place.results / "clients.csv").query("split == 'train'")["n"]
    assert facts["smallest"] == sizes.min() < sizes.max()
    options = {"epsilon": 30, "delta": 0.02, "exposures": 2, "rounds": 3, "num_users": 4, "new_clients": 0}
    expected = nbafl_sigmas(options, 9, sizes.min())
    assert (facts["sigma_uplink"], facts["sigma_downlink"]) == pytest.approx(expected)
    for upload in place.saved(3, "shared.pt")["uploads"].values():   # the server saw them clipped, then noise
        whole = torch.cat([value.flatten() for value in upload.values()]).double()
        assert whole.square().sum().item() == pytest.approx(81 + len(whole) * expected[0]**2, rel=0.05)


def test_malicious_clients_alone_lie_and_no_mean_has_them(ran, place, driver, monkeypatch):
    """They flip labels and claim more images, and are evaluated on the true labels; means are of the honest."""
    seen, train, evaluate = {}, setup.Trainer.train, setup.Trainer.evaluate

    def training(self, client, *rest):
        seen["trained", client] = self.labels.clone()
        return train(self, client, *rest)

    def evaluating(self, client, *rest):
        seen["evaluated", client] = self.labels.clone()
        return evaluate(self, client, *rest)
    monkeypatch.setattr(setup.Trainer, "train", training)
    monkeypatch.setattr(setup.Trainer, "evaluate", evaluating)
    assert place.main("--num_users", 4, "--rounds", 1, "--malicious_frac", 0.5, "--malicious_behaviour",
                      "false_size") == 0
    server = pd.read_csv(place.results / "server.csv").set_index("client")
    clients = pd.read_csv(place.results / "clients.csv")
    sizes = clients.query("split == 'train'").set_index("client")["n"]
    assert server["malicious"].sum() == 2
    for k, bad in server["malicious"].items():
        assert server.loc[k, "n"] == sizes[k] * (10 if bad else 1)
        assert torch.equal(seen["evaluated", k], ran.labels)
        assert torch.equal(seen["trained", k], 3 - ran.labels if bad else ran.labels)
    honest = clients[clients["client"].map(server["malicious"]) == 0].groupby(["stage", "split"])["loss"].mean()
    means = pd.read_csv(place.results / "rounds.csv").set_index(["stage", "split"])["loss"]
    assert means.to_dict() == pytest.approx(honest.to_dict())
    assert means["trained", "train"] != pytest.approx(
        clients.query("stage == 'trained' and split == 'train'")["loss"].mean())   # the others' would show


# The attack.

BUDGET = ("--images", 3, "--restarts", 1, "--iterations", 3, "--train_epochs", 1, "--draws", 2, "--scores", 2)


@pytest.fixture(scope="module")
def attacked(ran, tiny_arrays):
    """Public images are another data set's, of which some are clients' own."""
    found = Attacked(ran.place, tiny_arrays, flags=BUDGET)
    arrays = {**tiny_arrays, "train_images": 255 - tiny_arrays["train_images"]}
    np.savez(ran.place.folder / "data" / "public.npz", **arrays)   # its test half is tiny's own
    return found


def scene(attacked, run, *flags):
    return evaluation.Evaluation(attacked.target(run), mi_attack.make_parser().parse(attacked.argv(run, *flags)))


def test_the_evaluator_and_the_adversaries_know_no_private_image(ran, attacked, tiny_arrays):
    """Were the clients' training images other ones, the evaluator would be the same to the bit, and so would
    be what an adversary makes of the same observation."""
    turned = {f"{half}_images": 255 - tiny_arrays[f"{half}_images"] for half in ("train", "test")}
    np.savez(attacked.place.folder / "data" / "apart.npz", **{**tiny_arrays, **turned})
    parts, found = ran.part("rve_pfl"), []
    for _ in range(2):
        made, results = scene(attacked, "rve_pfl", "--public", "apart"), {}
        results["evaluator"] = torch.cat([p.flatten() for p in made.evaluator.model.parameters()])
        results["public"] = made.public.images
        z = torch.linspace(-1, 1, 192).reshape(1, 3, 64)
        for who, how, seen in (("stolen_model", "latent_decoder", [latents.Seen(z)]),
                               ("stolen_model", "gmi", None), ("curious_client", "margin", None),
                               ("curious_server", "gmi", None),
                               ("prediction_api", "score_decoder", torch.eye(4)[:3])):
            adversary, labels = made.adversary(who, 2, 0), torch.tensor([0, 1, 2])
            seed_torch(1, f"{who} {how}")
            solved = ATTACKS[how].solve(adversary, *((labels,) if seen is None else (seen, 3)))
            results[f"{who} {how}"] = solved if seen is None else solved[0]
        found.append(results)
        spoil(attacked.place, tiny_arrays, np.concatenate([parts[f"train_{k}"] for k in range(USERS)]))
    np.savez(attacked.place.folder / "data" / "tiny.npz", **tiny_arrays)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def as_bytes(images):
    """Floats ``N x C x H x W`` or bytes ``N x H x W x C`` -> a set of images."""
    if isinstance(images, torch.Tensor):
        images = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return {image.tobytes() for image in images}


def test_public_images_are_nobodys(ran, attacked, place, tiny_arrays):
    """Those of another data set, of which 40 are clients' own; and those of this one that no client owns."""
    found = as_bytes(scene(attacked, "fedavg").public.images)
    assert len(found) == 200 and not found & as_bytes(ran.images)
    labels = np.concatenate([tiny_arrays["train_labels"]] * 4)
    few = np.flatnonzero((labels != 3) | (np.arange(len(labels)) < 100))   # a rare class: many stay unused
    images = np.concatenate([tiny_arrays["train_images"]] * 4)[few]
    images = images + np.random.default_rng(1).integers(0, 30, images.shape).astype(np.uint8)   # no two alike
    arrays = {**tiny_arrays, "train_images": images, "train_labels": labels[few]}
    np.savez(place.folder / "data" / "tiny.npz", **arrays)
    assert place.main("--rounds", 1) == 0
    parts = np.load(place.results / "partition.npz")
    owned = np.concatenate([parts[name] for name in parts.files])
    pooled = np.concatenate([images, tiny_arrays["test_images"]])
    found = as_bytes(scene(Attacked(place, tiny_arrays), "run", "--public", "unowned").public.images)
    assert len(found) >= 200
    assert found == as_bytes(np.delete(pooled, owned, 0)) and not found & as_bytes(pooled[owned])


def test_scores_and_controls_recomputed(ran, attacked, monkeypatch):
    calls, rows = [], evaluation.Evaluation.rows

    def noting(self, unit, outcome, control):
        calls.append((control, outcome.images[0], outcome.numbers[0], rows(self, unit, outcome, control),
                      self.evaluator.model.eval()))
        return calls[-1][3]
    monkeypatch.setattr(evaluation.Evaluation, "rows", noting)
    assert attacked.attack("rve_pfl", "--overwrite", "--adversary", "stolen_model", "--attack", "latent_search",
                           "--observe", "z", "--clients", 1) == 0
    train = ran.part("rve_pfl")["train_1"]
    private, labels = ran.pixels(train), ran.labels
    assert [control for control, *_ in calls] == ["", "foreign"]
    _, originals, chosen, *_ = calls[0]
    for control, images, numbers, scored, evaluator in calls:
        for i, (x, number, row) in enumerate(zip(images, numbers, scored, strict=True)):
            label = labels[number]
            assert number == row["image"] == chosen[i] and number in train and label == row["label"]
            mse = (x - ran.pixels([number])[0]).double().square().mean().item()
            assert row["mse"] == pytest.approx(max(mse, 1e-10), rel=1e-4)
            assert row["psnr"] == pytest.approx(10 * np.log10(1 / max(mse, 1e-10)), abs=1e-3)
            apart = (private - x).square().mean((1, 2, 3))   # the client's own images, and no others
            assert row["nearest_rank"] == pytest.approx(1 + (apart < mse * (1 - 1e-5)).sum().item())
            alike = apart[labels[train] == label]
            assert row["class_rank"] == 1 + (alike < mse * (1 - 1e-5)).sum() <= row["class_size"] == len(alike)
            assert row["evaluator_correct"] == (evaluator(x[None])[0].argmax() == label)
            others = [j for j in range(len(chosen)) if labels[chosen[j]] == label and j != i]
            if control == "foreign":   # what was made of another image of the class
                assert not torch.equal(x, originals[i])
                assert not others or any(torch.equal(x, originals[j]) for j in others)
