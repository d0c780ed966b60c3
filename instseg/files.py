"""What stands behind the name of a file."""

import os


def is_device(path: str | os.PathLike[str]) -> bool:
    """Whether it is there as neither file nor folder: a device, a pipe, a socket.

    Reading one may wait for ever; a file in its place takes it from every other program.
    """
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))
