"""One process per directory: what two processes write into one directory is nobody's result."""
import atexit
import fcntl
import os
import socket

LOCK = ".lock"
held: dict[str, int] = {}                           # absolute path of a lock file -> its descriptor in this process
os.register_at_fork(after_in_child=held.clear)      # what a forked child does at its end is no release of ours


def claim(directory: str, name: str = LOCK, wait: bool = False) -> str | None:
    """Make `directory` this process's, until it ends or calls `release`; create it where it is not there.

    Returns None, or what is known of the other process that has it. `wait`: wait for that process instead. OSError where the
    directory cannot be written.

    A record lock (not flock): the system drops it when the process ends, however it ends, and a forked child does not inherit
    it, so an orphan of a reward function cannot hold the directory of a dead run."""
    path = os.path.abspath(os.path.join(directory, name))
    while path not in held:
        os.makedirs(directory, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue                  # its holder removed the directory between our two calls
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            holder = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            return holder or "another process"
        if is_at(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            held[path] = descriptor
            atexit.register(release, directory, name)
        else:
            os.close(descriptor)      # its holder removed it between our open and our lock: try the next one
    return None


def is_at(descriptor: int, path: str) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def release(directory: str, name: str = LOCK) -> None:
    """Let others have the directory; without a file of a run in it, it goes."""
    path = os.path.abspath(os.path.join(directory, name))
    descriptor = held.pop(path, None)
    if descriptor is None:
        return
    if is_at(descriptor, path):
        os.unlink(path)
    os.close(descriptor)
    try:
        os.rmdir(directory)
    except OSError:
        pass                          # it holds a run
