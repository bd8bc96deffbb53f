"""Memory: how much there is, whether a network fits in it, and one line for running out of it."""
import errno
import os
import resource
from pathlib import Path

import torch

from utils import InputError, error_line

LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")   # of a container
COPIES = {"adam": 10, "sgd": 8}   # of the parameters, at the peak of a round: measured with 73 M and 135 M
# Messages of PyTorch, CUDA and C++ where they raise no error type of their own.
MESSAGES = "can't allocate memory", "out of memory", "not enough memory", "bad_alloc", "ALLOC_FAILED"


def available(device: torch.device) -> int:
    """Return the bytes of memory of a GPU, or the least of the machine's, the container's and ``ulimit -v``'s."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limits += [int(text) for path in LIMITS if path.is_file() and (text := path.read_text().strip()).isdecimal()]
    limits += [limit for limit in resource.getrlimit(resource.RLIMIT_AS) if limit != resource.RLIM_INFINITY]
    return min(limits)


def size_of(number: float) -> str:
    """Format a number of bytes, such as `6.7 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} TB"


def check_size(parameters: int, optimizer: str, device: torch.device) -> None:
    """Raise InputError if a client's network, of so many float32 parameters, cannot be trained in the memory."""
    needed, there = 4 * parameters * COPIES[optimizer], available(device)
    if needed > 2 * there:   # half of the copies have to be in memory at one time
        raise InputError(f"the network has {parameters / 1e6:,.0f} M parameters; training takes about "
                         f"{size_of(needed)} of memory, and there are {size_of(there)}: use smaller images, or a "
                         "method without an encoder (--method fedavg)")


def is_exhausted(error: BaseException) -> bool:
    """Return whether an error means that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


def in_one_line(program: str, error: Exception, hint: str = "") -> str | None:
    """Return the line for a user's mistake, a file's fault or a lack of memory; None for a fault of the program.

    Args:
        hint: what to do about a file or the memory.
    """
    if isinstance(error, InputError):
        return error_line(program, error)
    if is_exhausted(error):
        return error_line(program, "out of memory; use fewer images at a time (--local_bs, --eval_samples, "
                          "--stack, --images or --draws, whichever it has), or smaller images", hint)
    return error_line(program, error, hint) if isinstance(error, OSError) else None
