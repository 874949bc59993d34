"""One process per directory: two processes that write into the same one would mix their results."""
import atexit
import errno
import fcntl
import os
import socket

from data.errors import notice

LOCK = ".lock"
LOCKED = (errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
held: dict[str, tuple] = {}      # absolute path of a lock file -> (descriptor, directories made for it)
os.register_at_fork(after_in_child=held.clear)      # a forked child must not release our claims when it ends


def claim(directory: str, name: str = LOCK, wait: bool = False) -> str | None:
    """Claim `directory` for this process, until it ends or calls `release`; create it where it is not there.

    Returns None, or what is known of the other process that has it. With `wait` it waits for that process
    instead. OSError where the directory cannot be written.

    The lock is a record lock, not flock's: the system drops it when the process ends, however it ends, and a
    forked child does not inherit it, so an orphan of a reward function cannot hold the directory of a dead
    run."""
    path = os.path.abspath(os.path.join(directory, name))
    made = missing(os.path.dirname(path))
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    while path not in held:
        try:
            os.makedirs(directory, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue                  # its holder removed the directory between our two calls
        except FileExistsError:
            if os.path.lexists(directory) and not os.path.isdir(directory):
                raise
            continue                  # its holder removed it between the two calls of makedirs
        try:
            fcntl.lockf(descriptor, operation)
        except OSError as error:
            if error.errno in LOCKED:
                holder = os.read(descriptor, 200).decode(errors="replace")
                os.close(descriptor)
                return holder or "another process"
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            notice(f"{directory} lies on a file system without locks; start no second process in it")
        if is_at(descriptor, path):
            os.ftruncate(descriptor, 0)
            owner = f"process {os.getpid()} on {socket.gethostname()}"
            os.write(descriptor, owner.encode())
            held[path] = descriptor, made
            atexit.register(release, directory, name)
        else:
            os.close(descriptor)      # its holder removed it between our open and our lock: try the next one
    return None


def missing(directory: str) -> list[str]:
    """The directories that must be made for `directory` to be there, the deepest first."""
    found = []
    while not os.path.isdir(directory) and directory != os.path.dirname(directory):
        found.append(directory)
        directory = os.path.dirname(directory)
    return found


def is_at(descriptor: int, path: str) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def release(directory: str, name: str = LOCK) -> None:
    """Let others have the directory. If `claim` made it and nothing was written into it, remove it."""
    path = os.path.abspath(os.path.join(directory, name))
    if path not in held:
        return
    descriptor, made = held.pop(path)
    if is_at(descriptor, path):
        os.unlink(path)
    os.close(descriptor)
    for folder in made:
        try:
            os.rmdir(folder)
        except OSError:
            break                     # it holds a run
