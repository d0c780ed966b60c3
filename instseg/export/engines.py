"""Run exported networks in onnxruntime or OpenVINO."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from instseg.config.rules import is_whole
from instseg.errors import CheckpointError, ConfigError, ProcessError, reason_of, short
from instseg.export.exporting import INPUT, METADATA, STATE, import_optional
from instseg.inference.precision import BFLOAT16, DTYPES, FLOAT32
from instseg.optional import require

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
_MOST_THREADS = 1024


@dataclass(frozen=True)
class Opened:
    """A file that an engine has opened.

    Attributes:
        run: from arrays by the names of the inputs to the outputs in order; threads may share it.
        inputs: name of an input → number type, by the engine's name for it.
        metadata: of ``instseg export``, "" if there are none.
        dtype: number type in which what is not in 8 bits computes.
    """

    run: Callable[[Arrays], list[np.ndarray]]
    inputs: dict[str, str]
    metadata: str
    dtype: str = FLOAT32


@dataclass(frozen=True)
class Engine:
    """What runs a network, and how.

    Attributes:
        name: a key of :data:`ENGINES`.
        threads: None is the engine's own number, usually that of the processor's cores.
        dtype: number type in which what is not in 8 bits computes; "bfloat16" needs OpenVINO, which
            computes in float32 where the processor has no instructions for it.
    """

    name: str = "onnxruntime"
    threads: int | None = None
    dtype: str = FLOAT32

    def __post_init__(self) -> None:
        """
        Raises:
            ConfigError: a value that cannot be used, or a package that is missing.
        """
        if not isinstance(self.name, str) or self.name not in ENGINES:
            raise ConfigError(f"engine is {short(self.name)}; expected one of {', '.join(ENGINES)}")
        if self.threads is not None and not (
            is_whole(self.threads) and 1 <= self.threads <= _MOST_THREADS
        ):
            raise ConfigError(
                f"threads is {short(self.threads)}; expected 1 to {_MOST_THREADS}, or None"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {short(self.dtype)}; expected {' or '.join(DTYPES)}")
        if self.dtype == BFLOAT16 and self.name != "openvino":
            raise ConfigError(
                "dtype is 'bfloat16', in which onnxruntime does not compute; expected float32, or "
                "engine='openvino'"
            )
        if self.name == "openvino":
            require("openvino", "openvino", "engine='openvino'")

    def load(self, path: Path) -> tuple["EngineNetwork", str]:
        """The network in a file, and the metadata of ``instseg export`` ("" if there are none).

        Raises:
            CheckpointError: the file is missing or damaged, or the engine cannot run it.
            ImportError: onnxruntime is not installed.
        """
        if self.name == "onnxruntime":
            import_optional("onnxruntime")
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; `instseg export` writes it")
        try:
            opened = ENGINES[self.name](path, self)
        except Exception as error:  # the engines have classes of their own, partly not public
            hint = self._hint(error)
            raise CheckpointError(f"{path} cannot be run{hint}: {reason_of(error)}") from error
        try:
            network = EngineNetwork(opened, self.name)
        except ValueError as error:
            raise CheckpointError(f"{path} cannot be run: {error}") from error
        if network.dtype != self.dtype:
            _warn_of_float32()
        return network, opened.metadata

    def _hint(self, error: Exception) -> str:
        if "DeformConv" not in str(error):
            return ""
        if self.name == "openvino":
            return "; OpenVINO reads no DeformConv: use engine='onnxruntime'"
        version = import_optional("onnxruntime").__version__
        return f"; DeformConv needs onnxruntime 1.25, found {version}"


@cache
def _warn_of_float32() -> None:
    logger.warning(
        "dtype is bfloat16, for which this processor has no instructions: OpenVINO computes in "
        "float32 (said once)"
    )


class EngineNetwork(nn.Module):
    """A network in an engine.

    It takes and gives float32, whatever precision other tools have converted the file to.

    Attributes:
        dtype: see :class:`Opened`.
    """

    def __init__(self, opened: Opened, engine: str) -> None:
        """
        Args:
            opened: its file.
            engine: the name of the engine.
        Raises:
            ValueError: the network takes something other than floating-point numbers.
        """
        super().__init__()
        self.dtype = opened.dtype
        self._run = opened.run
        self._process = os.getpid()
        self._engine = engine
        self._dtypes: dict[str, type[np.floating[Any]]] = {}
        for name, dtype in opened.inputs.items():
            if dtype not in _DTYPES:
                raise ValueError(
                    f"its input {name} is {dtype}, expected one of {', '.join(_DTYPES)}"
                )
            self._dtypes[name] = _DTYPES[dtype]

    def forward(self, images: Tensor, *state: Tensor) -> list[Tensor]:
        if os.getpid() != self._process:
            raise ProcessError(
                "an exported network was opened before this process was forked, and a fork does "
                f"not copy the threads of {self._engine}: make the ExportedPredictor in the "
                "process that uses it, or start that process by "
                "multiprocessing.get_context('spawn')"
            )
        names = (INPUT, *(f"{STATE}{i}" for i in range(len(state))))
        inputs = {
            name: np.ascontiguousarray(x.cpu().numpy(), dtype=self._dtypes.get(name))
            for name, x in zip(names, (images, *state), strict=True)
        }
        try:
            outputs = self._run(inputs)
        except Exception as error:  # the engine's, see Engine.load()
            raise CheckpointError(
                "an exported network cannot be run; its file is damaged, or overrides change what "
                f"the network takes, such as INPUT.SQUARE_SIZE: {error}"
            ) from error
        return [torch.from_numpy(x).float() for x in outputs]


def _onnxruntime(path: Path, engine: Engine) -> Opened:
    onnxruntime = import_optional("onnxruntime")
    options = onnxruntime.SessionOptions()
    if engine.threads is not None:
        options.intra_op_num_threads = engine.threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    dtypes = {value.name: value.type for value in session.get_inputs()}
    metadata = session.get_modelmeta().custom_metadata_map.get(METADATA, "")
    return Opened(lambda inputs: list(session.run(None, inputs)), dtypes, metadata)


def _openvino(path: Path, engine: Engine) -> Opened:
    import openvino

    core = openvino.Core()
    network = core.read_model(str(path))
    keys = ["framework", METADATA]
    metadata = str(network.get_rt_info(keys).value) if network.has_rt_info(keys) else ""
    # Without a hint OpenVINO computes in bfloat16 wherever the processor can.
    properties = {"INFERENCE_PRECISION_HINT": "bf16" if engine.dtype == BFLOAT16 else "f32"}
    if engine.threads is not None:
        properties["INFERENCE_NUM_THREADS"] = str(engine.threads)
    compiled = core.compile_model(network, "CPU", properties)
    hint = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    request, lock = compiled.create_infer_request(), Lock()
    dtypes = {x.get_any_name(): x.get_element_type().get_type_name() for x in compiled.inputs}

    def run(inputs: Arrays) -> list[np.ndarray]:
        with lock:  # the request holds inputs and outputs of one call
            results = request.infer(inputs)
        return [results[output] for output in compiled.outputs]

    return Opened(run, dtypes, metadata, BFLOAT16 if hint == "bf16" else FLOAT32)


ENGINES: dict[str, Callable[[Path, Engine], Opened]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
"""Name → function that opens a file."""
_DTYPES: dict[str, type[np.floating[Any]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "f32": np.float32,
    "f16": np.float16,
    "f64": np.float64,
}
"""Name of a number type in onnxruntime or OpenVINO → NumPy's type."""
