"""Memory: how much there is, and one line for running out of it."""
import errno
import os
import resource
from pathlib import Path

from utils import InputError, error_line

LIMITS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")   # of a container
# Messages of PyTorch, CUDA and C++ where they raise no error type of their own.
MESSAGES = "can't allocate memory", "out of memory", "not enough memory", "bad_alloc", "ALLOC_FAILED"


def main_memory() -> int:
    """Return the bytes of memory: the least of the machine's, the container's and ``ulimit -v``'s."""
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


def is_exhausted(error: BaseException) -> bool:
    """Return whether an error means that memory ran out."""
    if isinstance(error, MemoryError):
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
