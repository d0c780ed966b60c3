"""How fast convolutions of one number type can be on this processor."""

import platform

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from instseg.benchmark.rows import Row, seconds
from instseg.inference.precision import BFLOAT16, cpuinfo, has_bfloat16, processor_flags

INT8 = "int8"
_CHANNELS, _SIDE = 128, 80
_OPERATIONS = 2 * 9 * _CHANNELS**2 * _SIDE**2
"""Multiplications and additions of a 3 x 3 convolution."""
_CALLS = 5
_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
"""Flags of processors, as Linux calls them, with instructions for products of 8 bits."""


@torch.no_grad()
def peak_row(dtype: str) -> Row:
    """The fastest of some calls of oneDNN's convolution in a number type, with torch's threads."""
    image = torch.rand(1, _CHANNELS, _SIDE, _SIDE).contiguous(memory_format=torch.channels_last)
    if dtype == INT8:
        fastest = _int8_seconds(image)
    else:
        number_type = getattr(torch, dtype)
        convolution = nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1)
        convolution = convolution.to(number_type, memory_format=torch.channels_last)  # type: ignore[call-overload]
        fastest = _fastest(convolution, image.to(number_type))
    return Row(
        name=f"peak: convolution in {dtype}",
        peer=f"{processor()}, threads: {torch.get_num_threads()}",
        ours_ms=1000 * fastest,
        peer_ms=None,
        ratio_time=None,
        ratio_memory=None,
        gflops=_OPERATIONS / fastest / 1e9,
        share_of_peak=1.0,
        note=missing_instructions(dtype),
    )


def _int8_seconds(image: torch.Tensor) -> float:
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    try:
        convolution = torch.ao.nn.quantized.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1)
        return _fastest(convolution, torch.quantize_per_tensor(image, 0.01, 0, torch.quint8))
    finally:
        torch.backends.quantized.engine = engine


def _fastest(convolution: nn.Module, image: torch.Tensor) -> float:
    convolution(image)
    return min(seconds(lambda: convolution(image)) for _ in range(_CALLS))


@torch.no_grad()
def operations(network: nn.Module, images: torch.Tensor) -> float:
    """Multiplications and additions of convolutions and products of matrices in ``network``.

    Deformable convolutions do not count.
    """
    with FlopCounterMode(display=False) as counter:
        network(images)
    return float(counter.get_total_flops())


def missing_instructions(dtype: str) -> str | None:
    """What the processor lacks to be fast in a number type; None where it lacks nothing."""
    if dtype == BFLOAT16 and not has_bfloat16():
        return "no avx512_bf16"
    flags = processor_flags()
    if dtype == INT8 and flags is not None and _VNNI.isdisjoint(flags):
        return "no avx512_vnni"
    return None


def processor() -> str:
    """The name of the processor, as Linux tells it; elsewhere what Python knows."""
    name = (cpuinfo() or "").partition("model name")[2].partition("\n")[0].lstrip("\t :")
    return name or platform.processor() or platform.machine()
