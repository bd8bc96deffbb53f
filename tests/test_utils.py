"""Seeding (every bit of the drawn seed decides what PyTorch draws) and the automatic precision."""
import numpy as np
import pytest
import torch

import utils
from devices import choose_precision, seed_torch, torch_rng
from utils import rng

# Two seeds of a run whose 63-bit draws agree in their low 32 bits, all that a Mersenne twister's seed has.
ALIKE = 89575, 144360


def drawn_after_seeding(seed):
    seed_torch(seed, "train")
    return torch.randn(50)


@pytest.mark.parametrize("draw", [lambda seed: torch.randn(50, generator=torch_rng(seed, "train")),
                                  drawn_after_seeding])
def test_seeds_alike_in_32_bits_draw_differently(draw):
    low = {int(rng(seed, "train").integers(2**63)) % 2**32 for seed in ALIKE}
    assert len(low) == 1
    assert not torch.equal(draw(ALIKE[0]), draw(ALIKE[1]))
    assert torch.equal(draw(ALIKE[0]), draw(ALIKE[0]))


def test_a_seeded_generator_is_uniform_and_normal_and_begins_anew():
    """A state filled at the wrong place would repeat numbers or leave zeros."""
    uniform = torch.rand(100_000, generator=torch_rng(1, "test"), dtype=torch.float64)
    assert len(uniform.unique()) == 100_000
    counts = np.histogram(uniform.numpy(), 100, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 160   # chi-square, 99 degrees of freedom: p < 1e-4
    assert torch.randn(100_000, generator=torch_rng(1, "test")).std().item() == pytest.approx(1, abs=0.02)
    torch.randn(3)   # half of a pair of normal numbers is left over
    seed_torch(1, "test")
    assert torch.equal(torch.randn(3), torch.randn(3, generator=torch_rng(1, "test")))


def test_auto_precision_is_fp32_where_pytorch_is_held_to_avx2(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for capability, dtype in (("AVX2", torch.float32), ("AVX512", torch.bfloat16)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        assert choose_precision("auto", torch.device("cpu")) is dtype


def test_commands_paths_and_times_are_shown_as_users_write_them(monkeypatch, tmp_path):
    monkeypatch.chdir(utils.ROOT)
    monkeypatch.setattr("sys.orig_argv", ["my python", "RVE-PFL.py"])
    options = {"run": "r", "public": "unowned", "results_dir": utils.ROOT / "results", "models_dir": tmp_path}
    assert utils.typed("attack/mi_attack.py", options, *options) == (
        f"'my python' attack/mi_attack.py --run r --models_dir {tmp_path}")
    assert utils.nearby(utils.ROOT / "results" / "r") == "results/r" and utils.nearby(tmp_path) == str(tmp_path)
    assert [utils.duration(s) for s in (4.6, 80, 3700)] == ["5 s", "1 min 20 s", "1 h 1 min 40 s"]
