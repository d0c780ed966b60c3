"""Builds a library of CUDA kernels that run on the CPU: ``torch.ops.instseg_emulated``.

An object is compiled again only if what it is made of has changed: its name is a hash of that.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "emulated"
MOST_KEPT = 64
"""Objects and libraries of a kind; those that were used longest ago go first."""
LIBRARY = "instseg_emulated"
COMPILE_SECONDS = 1800
"""At most, for one file: a busy machine needs ten times as long as an idle one."""

# Products and sums are contracted wherever nvcc may do it; at -O1 gcc would not.
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-mfma", "-ffp-contract=fast", "-w")
KINDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "address": ("-g", "-fsanitize=address,undefined", "-fno-sanitize=vptr"),
    "thread": ("-g", "-fsanitize=thread"),
    # See traffic.cpp, which is there in place of the sanitizer.
    "traffic": ("-fsanitize=thread", "-fno-tree-vectorize"),
}
Edits = tuple[tuple[str, str], ...]


def rewrite(text: str, path: Path) -> str:
    """Launches and shared memory as plain C++."""
    text = re.sub(
        r"(\w+)((?:<[\w, ]+>)?)(\s*)<<<(.+?)>>>\(",  # lines keep their numbers
        r'cuda_on_cpu::launch(cuda_on_cpu::Launch("\1",\3\4), [](auto... a) { \1\2(a...); }, ',
        text,
        flags=re.DOTALL,
    )
    text = re.sub(
        r"__shared__ ([^;]+?) (\w+)((?:\[[^\]]*\])*);",
        r"auto& \2 = cuda_on_cpu::shared<\1\3>();",
        text,
    )
    # The CPU's allocator raises this one.
    text = text.replace("catch (const c10::OutOfMemoryError&)", "catch (const c10::Error&)")
    if "<<<" in text or "__shared__" in text:
        raise ValueError(f"{path}: a launch or shared memory in a form that is not known")
    return text


def translate(text: str, path: Path) -> str:
    """A ``.cu`` file as C++ that registers its operators in ``LIBRARY``, for the CPU."""
    text = rewrite(text, path)
    text = text.replace("TORCH_LIBRARY_IMPL(instseg, CUDA,", f"TORCH_LIBRARY_IMPL({LIBRARY}, CPU,")
    head, first_own, rest = text.partition('#include "')  # the emulator follows torch's headers
    line = head.count("\n") + 1
    return (
        f'#line 1 "{path.name}"\n{head}#include "cuda_on_cpu.h"\n#line {line} "{path.name}"\n'
        f"{first_own}{rest}"
    )


@dataclass(frozen=True)
class Build:
    """A library: of which kind (see KINDS), from which sources, with which edits of them.

    Attributes:
        kind: one of KINDS.
        edits: (before, after), each replaced once in the copied sources, for tests of mistakes.
        stems: names of operators; all if empty.
        csrc: the folder of sources.
    """

    kind: str = "plain"
    edits: Edits = ()
    stems: tuple[str, ...] = ()
    csrc: Path = CSRC

    @cached_property
    def headers(self) -> dict[Path, str]:
        """Edited text of every header, by its path below ``csrc``."""
        paths = [p for p in sorted(self.csrc.rglob("*")) if p.suffix in (".h", ".cuh")]
        return {path.relative_to(self.csrc): rewrite(self._edited(path), path) for path in paths}

    def _edited(self, path: Path) -> str:
        text = path.read_text()
        for before, after in self.edits:
            text = text.replace(before, after, 1)
        return text

    @cached_property
    def _common(self) -> str:
        own = "".join(path.read_text() for path in sorted(HERE.rglob("*.h")))
        import torch

        return repr((own, FLAGS, KINDS[self.kind], torch.__version__, sys.version))

    def included(self, text: str) -> dict[Path, str]:
        """The headers of ``csrc`` that a source reads, by way of others too."""
        reached: dict[Path, str] = {}
        texts = [text]
        while texts:
            names = re.findall(r'#include "([^"]+)"', texts.pop())
            for path in map(Path, names):
                if path in self.headers and path not in reached:
                    reached[path] = self.headers[path]
                    texts.append(reached[path])
        return reached

    def sources(self) -> dict[str, str]:
        """Name and text of what is compiled."""
        chosen = self.stems or tuple(p.parent.name for p in sorted(self.csrc.glob("*/*_cuda.cu")))
        texts = {}
        for stem in chosen:
            path = self.csrc / stem / f"{stem}_cuda.cu"
            texts[stem] = translate(self._edited(path), path)
        schemas = self._edited(self.csrc / "register.cpp")
        texts["register"] = schemas.replace("TORCH_LIBRARY(instseg,", f"TORCH_LIBRARY({LIBRARY},")
        for name in ("scheduler", "traffic"):
            texts[name] = (HERE / f"{name}.cpp").read_text()
        return texts

    def library(self) -> Path:
        """Compile what is missing; the path of the library."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        with FileLock(FOLDER / f"{self.kind}.lock"):
            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(lambda item: self._compile(*item), self.sources().items()))
            digest = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
            library = FOLDER / f"{self.kind}-{digest}.so"
            if not library.exists():
                sanitizers = () if self.kind == "traffic" else KINDS[self.kind]
                partial = library.with_suffix(".part")
                run("-shared", *sanitizers, *objects, "-o", partial, *torch_libraries())
                partial.rename(library)
            used = [library, *(path.parent for path in objects)]
            for path in used:
                os.utime(path)
            forget_old(self.kind)
            return library

    def _compile(self, name: str, text: str) -> Path:
        light = name in ("scheduler", "traffic")
        headers = self.included(text)
        made_of = repr((text, sorted(headers.items()), self._common))
        digest = hashlib.sha256(made_of.encode()).hexdigest()[:16]
        folder = FOLDER / f"{self.kind}-{name}-{digest}"
        done = folder / f"{name}-{digest}.o"
        if done.exists():
            return done
        for path, header in headers.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(header)
        folder.mkdir(exist_ok=True)
        source, partial = folder / f"{name}.cpp", folder / "part.o"
        source.write_text(text)
        # The scheduler changes fibers, which no sanitizer may watch.
        kind = () if light else KINDS[self.kind]
        define = ("-DCUDA_ON_CPU_TRAFFIC",) if self.kind == "traffic" else ()
        folders = [f"-I{HERE}", f"-I{folder}"] + ([] if light else [f"-I{p}" for p in includes()])
        run("-c", *FLAGS, *kind, *define, *folders, source, "-o", partial)
        partial.rename(done)
        return done


def forget_old(kind: str) -> None:
    """Bound what is kept of a kind."""
    paths = [path for path in FOLDER.glob(f"{kind}-*") if path.suffix != ".part"]
    for path in sorted(paths, key=lambda p: p.stat().st_mtime)[:-MOST_KEPT]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def includes() -> list[str]:
    """Folders of the headers of torch and of Python."""
    import torch

    torch_headers = Path(torch.__file__).parent / "include"
    return [
        str(torch_headers),
        str(torch_headers / "torch/csrc/api/include"),
        sysconfig.get_path("include"),
    ]


def torch_libraries() -> list[str]:
    """Arguments that link torch."""
    import torch

    folder = Path(torch.__file__).parent / "lib"
    return [f"-L{folder}", "-ltorch", "-ltorch_cpu", "-lc10"]


def run(*arguments: object) -> None:
    """Call the compiler."""
    command = [os.environ.get("CXX", "c++"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")


if __name__ == "__main__":
    print(Build(*sys.argv[1:]).library())
