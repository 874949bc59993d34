"""The operations with which a process changes files below its working directory, in their order; it can be
killed before any of them.

Python reports most of them to audit hooks. A sync and safetensors' writes, which are not reported, are
patched. A file that is open for writing counts twice: before it is opened, and when half of what was written
to it has reached the disk.
"""
import builtins
import io
import os
import signal
import sys

import safetensors.torch

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# audit event -> where its arguments hold paths, and the descriptors these are relative to
CHANGES = {
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.chmod": ((0, 2),),
    "os.truncate": ((0, None),),
}


def watch(log: str, fatal: int | None = None) -> None:
    """Write a line `name paths` for every file operation of this process to the file `log`; SIGKILL before
    the `fatal`-th (from 1)."""
    Operations(log, fatal).install()


class Operations:
    def __init__(self, log: str, fatal: int | None):
        self.root, self.process, self.fatal, self.count = os.path.realpath(os.getcwd()), os.getpid(), fatal, 0
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def install(self) -> None:
        sys.addaudithook(self.audit)
        self.replace(os, "fsync", self.sync)
        self.replace(os, "fdatasync", self.sync)
        self.replace(safetensors.torch, "serialize_file", self.serialize)
        builtins.open = io.open = self.opener(io.open)

    def replace(self, owner, name: str, method) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *arguments, **options: method(original, *arguments, **options))

    def inside(self, path, descriptor: int | None = None) -> str | None:
        """The path (or open descriptor) relative to the working directory of the start; None outside of
        it."""
        if isinstance(path, int):
            full = os.readlink(f"/proc/self/fd/{path}")
        elif descriptor is not None and descriptor >= 0:
            full = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), os.fsdecode(path))
        else:
            full = os.path.abspath(os.fsdecode(path))
        relative = os.path.relpath(full, self.root)
        return None if relative.startswith("..") else relative

    def due(self, name: str, *paths: str | None) -> bool:
        """Note an operation; whether the process must die before it."""
        found = [path for path in paths if path]
        if not found or os.getpid() != self.process:
            return False
        self.count += 1
        os.write(self.log, f"{name} {' '.join(found)}\n".encode())
        return self.count == self.fatal

    def before(self, name: str, *paths: str | None) -> None:
        if self.due(name, *paths):
            kill()

    def audit(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & WRITING and isinstance(path, (str, bytes, os.PathLike)):
                self.before("open", self.inside(path))
        elif event in CHANGES:
            paths = []
            for path, at in CHANGES[event]:
                descriptor = arguments[at] if at is not None else None
                paths.append(self.inside(arguments[path], descriptor))
            self.before(event.removeprefix("os."), *paths)

    def sync(self, original, descriptor: int) -> None:
        self.before("fsync", self.inside(descriptor))
        original(descriptor)

    def serialize(self, original, tensors, path, **options) -> None:
        inside = self.inside(path)
        self.before("save_file", inside)
        original(tensors, path, **options)
        if self.due("half of", inside):
            self.end_with_half(path, 0)

    def opener(self, original):
        def opened(path, mode="r", *arguments, **options):
            stream = original(path, mode, *arguments, **options)
            if set(mode) & set("wax+") and not isinstance(path, int) and self.inside(path):
                self.tear(stream, path)
            return stream
        return opened

    def tear(self, stream, path) -> None:
        """When `stream` is closed, half of what was written to it may be all that is there."""
        close, start = stream.close, os.path.getsize(path)

        def closing():
            if not stream.closed and self.due("half of", self.inside(path)):
                stream.flush()
                self.end_with_half(path, start)
            close()
        stream.close = closing

    def end_with_half(self, path, start: int) -> None:
        """Take away the second half of what stands in a file after its first `start` bytes, and die."""
        self.process = None                            # this is no operation of the run
        size = os.path.getsize(path)
        os.truncate(path, start + max(0, size - start) // 2)
        kill()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
