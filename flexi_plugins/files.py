"""Files that are whole or not there: each is written under a temporary name in its own folder, synced and renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from flexi_plugins.errors import FlexiError

if TYPE_CHECKING:
    from torch import Tensor

LOCKLESS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
TEMPORARY = re.compile(r"\.(\d+)\.tmp$")  # of a file or folder that the process of this number was writing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file takes the place of ``path`` if all goes well, and goes away if not."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> FlexiError:
    return FlexiError(
        f"{path}: cannot be written ({error.strerror or error}); free space on that disk or make the folder "
        "writable, then give the same command again: what is finished is kept"
    )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; raise where it is held, by another process or in this one. The folder goes if it ends empty.

    What killed processes left in the folder goes too. Who only reads there leaves it alone: of a process on another host, or
    in another container, its number says nothing, and it may be writing. The lock ends with the process, however that ends.
    File systems without locks (some of clusters) have none to hold.
    """
    lock = folder / "lock"
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while True:
                file = stack.enter_context(lock.open("ab+", buffering=0))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno())):
                    break  # else its last holder has removed it meanwhile
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode().strip() or "unknown"
            raise FlexiError(
                f"{folder} is in use by process {holder}; wait for its end, or write to another place"
            ) from None
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise _unwritable(lock, error) from error
        with suppress(OSError):  # on a full disk: the number is for messages
            file.truncate(0)
            file.write(b"%d\n" % os.getpid())
        remove_leftovers(folder)
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink(missing_ok=True)
                folder.rmdir()


def remove_leftovers(folder: Path, pattern: str = "**/*.tmp") -> None:
    """Remove the temporary files and folders that killed processes left in a folder; those of running ones stay.

    pattern: which of them, as a glob from the folder on; by default all, at any depth.
    """
    import psutil

    for path in list(folder.glob(pattern)):
        match = TEMPORARY.search(path.name)
        if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name, with a text or more beside them, as a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(found, temporary, dict(metadata) if metadata else None)
        except SafetensorError as error:  # its only way to say that the disk is full
            raise OSError(str(error)) from None
