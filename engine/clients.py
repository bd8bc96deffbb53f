"""The clients of a run: selection, local training, upload and evaluation, in processes and threads."""
import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

import sampling
from engine import signals
from engine.stacks import draws_of, in_stacks, stack_size
from engine.threads import in_threads, threads_for
from runs.run import Run
from server.base import Round, State
from server.malicious import MaliciousClients
from update import ClientState, Diverged, LocalUpdate, Trainer
from utils import InputError, participants, rng


def train_each(trainer: Trainer, round: int, indices: dict[int, np.ndarray], sent: State,
               state_of: Callable[[int], ClientState],
               stack: int | None) -> Iterator[tuple[int, LocalUpdate | Diverged]]:
    """Train clients one after another, or small ones in stacks on a GPU or in threads on a CPU; equal to rounding.

    A method with a loss or a trainer of its own is always trained one client after another, and so is a network
    with draws that ``draws_of`` does not know. Stacked clients train all their parameters at once.

    Args:
        indices: client -> its training images.
        state_of: client -> its state.
        stack: how many to train as one stacked model, 1 for one after another; None for the fastest.
    """
    plain = trainer.training.part == "all" and len(trainer.training.phases()) == 1
    most = stack or stack_size(trainer.labels.device, trainer.training.batch_size) if plain else 1
    threads = 1 if stack else threads_for(trainer)
    if most == threads == 1 or trainer.method.sequential or draws_of(trainer) is None:
        for k, images in indices.items():
            try:
                yield k, trainer.train(k, round, images, sent, state_of(k))
            except Diverged as error:
                yield k, error
    elif most > 1:
        yield from in_stacks(trainer, round, indices, sent, state_of, most)
    else:
        yield from in_threads(trainer, round, indices, sent, state_of, threads)


class Clients:
    """All clients of a run, of which each process trains and evaluates its own.

    Args:
        trainer: the working model, which plays every client in turn.
        owned: the images of each client.
        splits: the (training, held-out) images of each client.
        run: keeps the clients' states and uploads.
        start: all parameters at the start, but for what clients begin with alone.
    """

    def __init__(self, args: Namespace, trainer: Trainer, malicious: MaliciousClients, owned: list, splits: list,
                 run: Run, start: State):
        self.args, self.malicious, self.owned, self.splits = args, malicious, owned, splits
        self.run, self.ranks, self.start = run, run.ranks, start
        self.count = participants(vars(args))   # of the clients that take part; new clients have higher numbers
        self.trainer, self.full_sharing = trainer, trainer.in_round(1)

    def trainer_in(self, number: int) -> Trainer:
        """Return the trainer of a round; in the first ``--full_sharing_rounds`` all parameters are shared."""
        return self.full_sharing if number <= self.args.full_sharing_rounds else self.trainer

    def splits_in(self, number: int) -> list:
        """Return each client's (training, held-out) images in a round; they differ under ``--resplit`` only."""
        if not self.args.resplit:
            return self.splits
        return sampling.split_all(self.owned, self.trainer.labels.cpu().numpy(), self.args.test_share,
                                  self.args.seed, "resplit", number)

    def evaluates(self, number: int) -> bool:
        """Return whether a round is evaluated."""
        return number % self.args.eval_every == 0 or number == self.args.rounds

    def select(self, number: int) -> list[int]:
        """Draw the clients that train in a round."""
        draw = rng(self.args.seed, "sample", round=number)
        poisson = self.trainer_in(number).method.poisson
        return sampling.sample_clients(self.count, self.args.frac, draw, poisson)

    def send(self, number: int) -> State:
        """Return the shared parameters that clients receive in a round.

        After the full sharing rounds, every client keeps the parameters that are shared no more.
        """
        head = self.run.progress.head
        if number != self.args.full_sharing_rounds + 1 or number == 1:
            return head
        head, private = self.trainer.method.shared_and_private(head)
        self.run.states.start_from(private, self.ranks.mine(range(self.args.num_users)))
        return head

    def train(self, number: int, selected: list[int], sent: State) -> tuple[Round, list[dict]]:
        """Train the selected clients; return their uploads and their rows of ``clients.csv``, on the first rank.

        A client whose loss does not stay finite uploads nothing, and keeps its state.
        """
        signals.check()
        splits, run = self.splits_in(number), self.run
        mine = {k: splits[k][0] for k in self.ranks.mine(selected)}
        uploads, rows = {}, {}
        for k, outcome in self._local_updates(number, mine, sent):
            run.advance(number, len(mine))
            if isinstance(outcome, Diverged):
                run.say(f"warning: {outcome}; this client's round is dropped")
                continue
            uploads[k] = outcome.upload
            run.states.put(k, outcome.client_state)
            if self.evaluates(number):
                held_out = self.trainer_in(number).evaluate(k, number, splits[k][1], outcome.upload,
                                                            outcome.client_state)
                rows[k] = [self._row(number, k, "trained", "train", outcome.metrics),
                           self._row(number, k, "trained", run.evaluation_split, held_out)]
        arrived = {k: upload for some in self.ranks.gather_parts(uploads) for k, upload in some.items()}
        if self.ranks.first and selected and not arrived:
            raise InputError(f"round {number}: no client's loss stayed finite; start again with a smaller --lr")
        sizes = {k: len(splits[k][0]) for k in selected}
        return (Round(number, sent, {k: arrived[k] for k in sorted(arrived)}, sizes),
                list(itertools.chain(*self.ranks.gather(rows).values())))

    def _local_updates(self, number: int, indices: dict[int, np.ndarray],
                       sent: State) -> Iterator[tuple[int, LocalUpdate | Diverged]]:
        """Train clients, malicious ones last and as they behave."""
        for trainer, members in self.malicious.groups(self.trainer_in(number), indices):
            for k, outcome in train_each(trainer, number, members, sent, self.run.states.get, self.args.stack):
                if isinstance(outcome, LocalUpdate):
                    outcome = self.malicious.retrained(trainer, k, number, len(members[k]), outcome)
                yield k, outcome

    def evaluate(self, number: int, head: State) -> list[dict]:
        """Evaluate every client with the new shared parameters; return rows, on the first rank.

        After the last round, also evaluate fine-tuned models, and new clients.
        """
        if not self.evaluates(number):
            return []
        splits = self.splits_in(number)
        mine = self.ranks.mine(range(self.count))
        rows = {k: [self._deployed(number, k, splits[k][1], head)] for k in mine}
        if number == self.args.rounds:
            for epochs, k in itertools.product(self.args.finetune_ep, mine):
                rows[k] += self._finetuned(number, k, head, epochs)
            for k in self.ranks.mine(range(self.count, self.args.num_users)):
                rows[k] = self._new_client(number, k, head)
        return list(itertools.chain(*self.ranks.gather(rows).values()))

    def _deployed(self, number: int, client: int, held_out: np.ndarray, head: State) -> dict:
        """Return a client's row of the stage ``deployed``; an honest one's has the success of a backdoor."""
        trainer, state = self.trainer_in(number), self.run.states.get(client)
        row = self._row(number, client, "deployed", self.run.evaluation_split,
                        trainer.evaluate(client, number, held_out, head, state))
        if self.malicious.behaviour.trigger is not None and client not in self.malicious.members:
            row["backdoor"] = self.malicious.backdoor(trainer, client, number, held_out, (head, state))
        return row

    def _finetuned(self, number: int, client: int, head: State, epochs: int) -> list[dict]:
        """Return the row of a client's model after this many local epochs from the deployed one."""
        trainer = self.trainer_in(number)
        training = replace(trainer.training, epochs=epochs, local_steps=None,
                           seed=trainer.training.seed + epochs)   # DP-SGD accounts for noise of its own
        return self._further(replace(trainer, training=training), number, client, f"finetuned_{epochs}",
                             self.splits_in(number)[client][0], head, self.run.states.get(client))

    def _new_client(self, number: int, client: int, head: State) -> list[dict]:
        """Return a new client's rows: behind the final head (``new``) and alone (``alone``), by its images.

        ``new_0`` is the model as the client receives it, without training.
        """
        trainer, first = self.trainer_in(number), self.run.states.get(client)
        state = replace(first, parameters=trainer.model.joined(head, first.parameters))
        images = self.splits_in(number)[client][0]
        images = rng(self.args.seed, "new client", client).permutation(images)
        epochs = replace(trainer.training, epochs=self.args.new_ep, local_steps=None, private_ep=None)
        behind = replace(epochs, local_steps=epochs.steps_of(len(images)),
                         part="private" if trainer.method.predicts_privately else "all")
        # Nothing was sent to a client on its own, so no proximal term holds it there.
        alone = replace(behind, part="all", options={**behind.options, "prox": 0.0})
        shared, private = trainer.method.shared_and_private(self.start)
        start = ClientState({**private, **self.run.states.own_start(client)})
        held_out = self.splits_in(number)[client][1]
        rows = [self._row(number, client, "new_0", self.run.evaluation_split,
                          trainer.evaluate(client, number + 1, held_out, head, state))]
        for training, name, begin in ((behind, "new", (head, state)), (alone, "alone", (shared, start))):
            for size, chosen in (("10", images[:10]), ("50", images[:50]), ("all", images)):
                rows += self._further(replace(trainer, training=training), number, client, f"{name}_{size}",
                                      np.sort(chosen), *begin)
        return rows

    def _further(self, trainer: Trainer, number: int, client: int, stage: str, images: np.ndarray, shared: State,
                 state: ClientState) -> list[dict]:
        """Train one client after round ``number`` and return its row of a stage, without changing the run."""
        (_, outcome), = train_each(trainer, number + 1, {client: images}, shared, lambda _: state, self.args.stack)
        if isinstance(outcome, Diverged):
            self.run.say(f"warning: {outcome}; it has no row of stage {stage}")
            return []
        return [self._row(number, client, stage, self.run.evaluation_split, trainer.evaluate(
            client, number + 1, self.splits_in(number)[client][1], outcome.upload, outcome.client_state))]

    @staticmethod
    def _row(number: int, client: int, stage: str, split: str, metrics: dict[str, float]) -> dict:
        return {"round": number, "client": client, "stage": stage, "split": split, **metrics}
