"""Classes read off an upload: by hand, and on a trained run whose partition is known."""
import numpy as np
import pytest
import torch

from attack.uploads import BIAS, WEIGHT, class_scores, owned_classes
from runs.checkpoint import load_checked


def test_scores_by_hand():
    sent = {BIAS: torch.zeros(3), WEIGHT: torch.zeros(3, 2)}
    upload = {BIAS: torch.tensor([2.0, -4.0, 0.0]), WEIGHT: torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, -2.0]])}
    assert class_scores(sent, upload).tolist() == pytest.approx([0.5 + 1, -1 - 0.5, 0 - 1])
    assert class_scores(sent, sent).tolist() == [0, 0, 0]


@pytest.mark.parametrize("scores, owned", [([5.0, 4.0, -1.0, -2.0], [1, 1, 0, 0]), ([0.0, 3.0, 0.1], [0, 1, 0]),
                                           ([1.0, 1.0, 1.0, -9.0], [1, 1, 1, 0])])
def test_the_widest_gap_parts_them(scores, owned):
    assert owned_classes(torch.tensor(scores)).int().tolist() == owned


@pytest.mark.parametrize("method", ["fedavg", "rve_pfl"])
def test_a_trained_runs_uploads_name_their_classes(place, tiny_arrays, method):
    assert place.main("--method", method, "--num_users", 4, "--rounds", 1, "--local_ep", 6) == 0
    shared = load_checked(place.models / "round_1" / "shared.pt")
    labels = np.concatenate([tiny_arrays["train_labels"], tiny_arrays["test_labels"]])
    with np.load(place.results / "partition.npz") as parts:
        for k, upload in shared["uploads"].items():
            has = np.isin(np.arange(4), labels[parts[f"train_{k}"]])
            scores = class_scores(shared["sent"], upload).numpy()
            assert has.sum() == 2 and scores[has].min() > scores[~has].max()
