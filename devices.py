"""Helpers that need PyTorch: seeded generators, the device, the precision, and the check of memory."""
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from engine.memory import main_memory, size_of
from utils import InputError, commit, rng

COPIES = {"adam": 10, "sgd": 8}   # of the parameters, at the peak of a round: measured with 73 M and 135 M


def torch_rng(seed: int, purpose: str, client: int = 0, round: int = 0) -> torch.Generator:
    """Return ``rng`` as a PyTorch generator on the CPU."""
    generator = torch.Generator()
    generator.set_state(_torch_state(rng(seed, purpose, client, round))[1])
    return generator


def seed_torch(seed: int, purpose: str, client: int = 0, round: int = 0) -> None:
    """Seed PyTorch's default generators, which dropout uses, for one client's work in one round."""
    number, state = _torch_state(rng(seed, purpose, client, round))
    torch.manual_seed(number)   # for GPUs, whose Philox uses all of it
    torch.default_generator.set_state(state)


@contextmanager
def drawn_from(seed: int, purpose: str, client: int = 0) -> Iterator[None]:
    """Run ``seed_torch``, and leave the CPU's generator afterwards as it was before."""
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed, purpose, client)
        yield


def _torch_state(drawn: np.random.Generator) -> tuple[int, torch.Tensor]:
    """Draw a seed of 63 bits, and a whole state of PyTorch's Mersenne twister, which uses 32 bits of a seed."""
    number = int(drawn.integers(2**63))
    state = torch.Generator().manual_seed(number).get_state()
    words = state[24:24 + 8 * 624].view(torch.int64)   # ATen/CPUGeneratorImpl.cpp: 32 bits in each
    words.copy_(torch.from_numpy(drawn.integers(2**32, size=624)))
    return number, state


def generator_of(device: torch.device) -> torch.Generator:
    """Return PyTorch's default generator of a device."""
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def choose_device(name: str, turn: int = 0) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; InputError if it does not exist.

    A GPU becomes PyTorch's current device, without TF32 in convolutions. Without a number in ``name``, processes
    take the machine's GPUs in turn.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    count, number = torch.cuda.device_count(), name.removeprefix("cuda").removeprefix(":")
    index = int(number) if number else turn % max(count, 1)
    if index >= count:
        raise InputError(f"--device {name}: this machine has {count} CUDA devices that PyTorch can use; use "
                         "--device cpu")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products for ``fp32``, ``bf16`` or ``auto``: bf16 if the chip is fast at it."""
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
            torch.cpu._is_avx512_bf16_supported() and torch.backends.cpu.get_cpu_capability().startswith("AVX512"))
    return torch.bfloat16 if name == "bf16" or (name == "auto" and fast) else torch.float32


def check_size(parameters: int, optimizer: str, device: torch.device) -> None:
    """Raise InputError if a client's network, of so many float32 parameters, cannot be trained in the memory."""
    needed, there = 4 * parameters * COPIES[optimizer], memory_of(device)
    if needed > 2 * there:   # half of the copies have to be in memory at one time
        raise InputError(f"the network has {parameters / 1e6:,.0f} M parameters; training takes about "
                         f"{size_of(needed)} of memory, and there are {size_of(there)}: use smaller images, or a "
                         "method without an encoder (--method fedavg)")


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or of the machine."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else main_memory()


def environment(device: torch.device) -> dict:
    """Return what a result depends on besides the options: versions, commit, machine."""
    return {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
        f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "system": platform.platform(),
    }
