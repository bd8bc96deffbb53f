"""A run under attack: the images, who has which, the evaluator, and one attack's rows and picture."""
from argparse import Namespace

import numpy as np
import torch
from torch import Tensor

import datasets
from attack import picture, scoring
from attack.access import Target, Victim, hold
from attack.attacks import ATTACKS, Adversary, Budget
from utils import InputError, rng, seed_torch

ATTACK_COLUMNS = ["adversary", "attack", "round", "client", "label", "image", "restart", "mse", "psnr",
                  "ssim", "label_match", "evaluator_correct", "nearest_rank", "control"]
UNIT = ATTACK_COLUMNS[:4]
METRICS = ATTACK_COLUMNS[7:13]
PUBLIC = {"mnist10k": "mnist", "mnist": "fmnist", "fmnist": "mnist"}   # what would do as --public
ENOUGH = 200      # public images; fewer are not worth training on
POOL = 500        # of a client's images that a reconstruction is ranked among


class Scene:
    """A run under attack: the images, who has which, the evaluator, and the budget all have alike."""

    def __init__(self, target: Target, args: Namespace):
        self.target, self.args = target, args
        self.train, self.test = target.owned()
        self.public_data = self._public()
        images, self.public_labels = (part[:args.public_images] for part in self.public_data)
        self.public = as_floats(images)
        # NAME10k holds ten thousand of NAME's images (benchmarks/make_10k.py), so its classes are the same.
        self.same_classes = args.public == "unowned" or (
            args.public.removesuffix("10k") == target.options["dataset"].removesuffix("10k"))
        self.budget = Budget(args.restarts, args.iterations, args.train_epochs, args.draws, 0.1, args.scores)
        seed_torch(args.seed, "evaluator")
        unseen = torch.from_numpy(np.concatenate(self.test))
        self.evaluator = scoring.evaluator(self.pixels(unseen), self.labels(unseen), target.data.num_classes)
        self.adversaries: dict[tuple, Adversary] = {}   # what one has trained serves all its attacks

    def pixels(self, index: Tensor) -> Tensor:
        """Image numbers -> ``N x C x H x W`` in [0, 1]."""
        return as_floats(self.target.data.images[index.numpy()])

    def labels(self, index: Tensor) -> Tensor:
        return torch.from_numpy(self.target.data.labels[index.numpy()])

    def _public(self) -> tuple[np.ndarray, Tensor]:
        """Images that no client has, neither to train nor to test on, in random order: uint8, and labels."""
        data, name = self.target.data, self.args.public
        if name == "unowned":
            index = np.setdiff1d(np.arange(len(data.labels)), np.concatenate([*self.train, *self.test]))
            images, labels = data.images[index], data.labels[index]
        else:
            other = datasets.load(name, self.args.data_dir)
            if other.image_shape != data.image_shape or other.num_classes > data.num_classes:
                raise InputError(f"--public {name}: images {other.image_shape}, {other.num_classes} classes, "
                                 f"but the run's are {data.image_shape}, {data.num_classes} classes")
            ours = {image.tobytes() for image in data.images}
            apart = np.array([image.tobytes() not in ours for image in other.images])
            images, labels = other.images[apart], other.labels[apart]
        if len(labels) < ENOUGH:
            other = PUBLIC.get(self.target.options["dataset"], "NAME")
            shape = " x ".join(map(str, data.image_shape))
            raise InputError(f"--public {name}: only {len(labels)} images are not the clients' own; give "
                             f"--public {other}, or the NAME of another data set of {shape} images")
        index = rng(self.args.seed, "public").permutation(len(labels))
        return images[index], torch.from_numpy(labels[index])

    def of_classes(self, classes: Tensor) -> Tensor:
        """Public images of these classes alone, as an adversary would choose them who has seen the labels; of
        all classes where they are too few."""
        images, labels = self.public_data
        chosen = torch.isin(labels, classes).nonzero().flatten()[:self.args.public_images]
        return self.public if len(chosen) < ENOUGH else as_floats(images[chosen.numpy()])

    def about(self) -> str:
        """What the figures rest on."""
        return (f"evaluator: right on {self.evaluator.accuracy:.1%} of images that neither it nor any victim "
                f"has seen; public images: {len(self.public)} ({self.args.public})")

    def latents(self, round: int, client: int) -> dict | None:
        """What z can tell of one of the client's images, and how near that lets anybody come."""
        images = self.pixels(torch.from_numpy(self.train[client]))
        noise = Victim(self.target, round, client).noise(images)
        if noise is None:
            return None
        return {"round": round, "client": client, **noise,
                "mse_bound": scoring.distortion_bound(images, noise["kl_nats"])}

    def adversary(self, name: str, round: int, client: int) -> Adversary:
        """One adversary of one client in one round."""
        key = (name, round, client)
        if key not in self.adversaries:
            target, holdings, query = self.target, None, None
            own = (client + 1) % target.options["num_users"]
            if name == "prediction_api":
                victim = Victim(target, round, client)
                query = lambda x: victim.answers(x, self.budget.draws, self.budget.keep)   # noqa: E731
            else:
                holdings = hold(target, name, round, client, own)
            seed_torch(target.options["seed"], "init")
            start = target.network()
            self.adversaries = {key: Adversary(holdings, query, start, self.public, self.public_labels,
                                               self.of_classes if self.same_classes else None,
                                               target.options.get("kl_weight") or 0.0, self.budget)}
        return self.adversaries[key]

    def classes(self, client: int) -> Tensor:
        """The classes of a client's training images, but for those of which nobody held an image out: the
        evaluator has never seen them, and there is nothing to rank the client's images among."""
        held_out = self.target.data.labels[np.concatenate(self.test)]
        return torch.from_numpy(np.intersect1d(self.target.data.labels[self.train[client]], held_out))

    def unfit(self, how: str, client: int) -> str | None:
        """Why an attack on a client could not be scored, or None."""
        if ATTACKS[how].observe is None and not len(self.classes(client)):
            return f"nobody held out an image of client {client}'s classes"
        return None

    def attack(self, who: str, how: str, round: int, client: int) -> list[dict]:
        """One attack's rows, and its picture."""
        adversary, attack = self.adversary(who, round, client), ATTACKS[how]
        drawn = rng(self.args.seed, f"images {how}", client, round)
        own = torch.from_numpy(drawn.permutation(self.train[client]))
        seed_torch(self.args.seed, f"{who} {how}", client, round)
        if attack.observe is None:
            labels = self.classes(client)
            found = attack.solve(adversary, labels)
            found = found.nan_to_num(0.5, 0.5, 0.5)   # of a model that is not finite
            truth, image, rank = self.nearest(found, labels, client)
            match = self.victims_label(round, client, found) == labels
        else:
            image = own[:self.args.images]
            truth, labels = self.pixels(image), self.labels(image)
            seen = attack.observe(Victim(self.target, round, client), truth, labels, self.budget)
            pool, is_true = self.pool(image, client)
            if attack.chooses:
                likely, guessed = attack.solve(adversary, seen, pool)
                found = pool[likely.nan_to_num(-torch.inf).argmax(1)][None]
                rank = scoring.rank_by(-likely, is_true)[None]
            else:
                found, guessed = attack.solve(adversary, seen, len(image))
                found = found.nan_to_num(0.5, 0.5, 0.5)   # a gradient of 0 says nothing: grey is handed in
            if attack.unordered:
                found = torch.stack([scoring.assigned(one, truth) for one in found])
                right = torch.equal(guessed, labels.sort().values)
                guessed = labels if right else torch.full_like(labels, -1)
            match = (guessed == labels).expand(len(found), -1)
            if not attack.chooses:
                rank = torch.stack([scoring.rank_of(one, pool, is_true) for one in found])
            truth, image = truth.expand(len(found), *truth.shape), image.expand(len(found), -1)
        rows = []
        for restart in range(len(found)):
            rows += self.rows((who, how, round, client), found[restart], truth[restart], labels,
                              image[restart], restart, match[restart], rank[restart], "")
        controls = scoring.controls(self.public, self.public_labels, labels, truth[0])
        for name, images in controls.items():
            again = self.nearest(images[None], labels, client) if attack.observe is None else (
                truth[:1], image[:1], scoring.rank_of(images, pool, is_true)[None])
            match = self.victims_label(round, client, images[None])[0] == labels
            rows += self.rows((who, how, round, client), images, again[0][0], labels, again[1][0], 0, match,
                              again[2][0], name)
        path = self.target.results / f"attack_{who}_{how}_round{round}_client{client}.png"
        reference = "nearest of the client's" if attack.observe is None else "truth"
        picture.grid(path, {reference: truth[0], how: found[0], **controls}, labels,
                     f"{self.target.results.name}: {who}, round {round}")
        return rows

    def rows(self, unit: tuple, found: Tensor, truth: Tensor, labels: Tensor, image: Tensor, restart: int,
             match: Tensor, rank: Tensor, control: str) -> list[dict]:
        """One row a reconstruction."""
        like = scoring.likeness(found, truth)
        correct = self.evaluator.classes(found) == labels
        columns = {"label": labels, "image": image, **like, "label_match": match.int(),
                   "evaluator_correct": correct.int(), "nearest_rank": rank}
        return [{**dict(zip(UNIT, unit, strict=True)), "restart": restart, "control": control,
                 **{name: values[i].item() for name, values in columns.items()}} for i in range(len(found))]

    @torch.no_grad()
    def victims_label(self, round: int, client: int, found: Tensor) -> Tensor:
        """What the victim's own model says of reconstructions, ``R x N``."""
        victim = Victim(self.target, round, client)
        return torch.stack([victim.answers(one, self.budget.draws, 10**9).argmax(1) for one in found])

    def pool(self, image: Tensor, client: int) -> tuple[Tensor, Tensor]:
        """The client's own images that true ones are ranked among, and which is which's: ``N x M`` bool."""
        others = torch.from_numpy(np.setdiff1d(self.train[client], image.numpy())[:POOL])
        pool = torch.cat([image, others])
        return self.pixels(pool), pool[None, :] == image[:, None]

    def nearest(self, found: Tensor, labels: Tensor, client: int) -> tuple[Tensor, Tensor, Tensor]:
        """For class attacks, ``R x P``: the client's nearest training image of the class, its number, and
        its rank among as many of the class that the client has not."""
        truth, image, rank = (torch.stack(column) for column in zip(*(
            self._nearest_of_class(found[:, p], int(label), client) for p, label in enumerate(labels)),
            strict=True))
        return truth.transpose(0, 1), image.transpose(0, 1), rank.transpose(0, 1)

    def _nearest_of_class(self, found: Tensor, label: int, client: int) -> tuple[Tensor, Tensor, Tensor]:
        everyone = self.target.data.labels
        own = self.train[client][everyone[self.train[client]] == label][:POOL]
        unseen = np.concatenate(self.test)
        unseen = unseen[everyone[unseen] == label]
        size = min(len(own), len(unseen))
        pool = torch.from_numpy(np.concatenate([own[:size], unseen[:size]]))
        apart = scoring.distances(found, self.pixels(torch.from_numpy(own)))
        image = torch.from_numpy(own)[apart.argmin(1)]
        is_true = (torch.arange(len(pool)) < size).expand(len(found), -1)
        return self.pixels(image), image, scoring.rank_of(found, self.pixels(pool), is_true)


def as_floats(images: np.ndarray) -> Tensor:
    """uint8 ``N x H x W x C`` -> ``N x C x H x W`` in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255).contiguous()
