"""Names of files: what stands behind one, and one for any text."""

import hashlib
import os
import re


def is_device(path: str | os.PathLike[str]) -> bool:
    """Whether it is there as neither file nor folder: a device, a pipe, a socket.

    Reading one may wait for ever; a file in its place takes it from every other program.
    """
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def file_name(text: str) -> str:
    """The name of a file or folder for ``text``, which may be a path or anything else.

    Letters, digits, ``_``, ``.`` and ``-``, at most 100, are the name themselves.  Of other texts
    it has the end, by which paths are told apart, and a hash of the whole.
    """
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", text):
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    words = re.sub(r"[^A-Za-z0-9.-]+", "_", text)[-80:].lstrip("_.-")
    return f"{words}-{digest[:8]}".lstrip("-")
