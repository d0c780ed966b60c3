"""Every CUDA kernel, run on the CPU, gives what the CPU operator gives.

``make cuda-emulate SANITIZE=address`` or ``thread`` runs them under a sanitizer.
"""

import os

import pytest
import torch

from tests.emulate.build import COMPILE_SECONDS, CSRC, SUPPORTED
from tests.emulate.cases import OPERATORS, first_difference
from tests.emulate.compare import ORDERS
from tests.emulate.emulated import Emulated, load

KIND = os.environ.get("INSTSEG_EMULATE", "plain")
pytestmark = [
    pytest.mark.timeout(COMPILE_SECONDS),
    pytest.mark.skipif(not SUPPORTED, reason="needs Linux on x86-64"),
]


@pytest.fixture(scope="session")
def emulated() -> Emulated:
    return load(KIND)


def test_every_kernel_is_emulated() -> None:
    assert set(OPERATORS) == {path.parent.name for path in CSRC.glob("*/*_cuda.cu")}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("order", "most_blocks"), ORDERS)
def test_kernels_give_what_the_cpu_gives(
    name: str, order: int, most_blocks: int, emulated: Emulated
) -> None:
    with emulated.threads(order, most_blocks):
        assert first_difference(name, 1, emulated.operators, seed=order) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("seed", range(3))
def test_kernels_give_what_the_cpu_gives_for_many_shapes(
    name: str, seed: int, emulated: Emulated
) -> None:
    with emulated.threads(10 + seed, 1 + 2 * seed):
        assert (
            first_difference(name, 2 if name == "mean_shift" else 8, emulated.operators, seed) == ""
        )


def test_the_host_waits_for_the_device_at_no_cluster(emulated: Emulated) -> None:
    points = torch.arange(40).repeat_interleave(9).float()[:, None] * 10
    bins = torch.arange(40).repeat_interleave(9)
    emulated.synchronisations()
    labels, _ = emulated.operators.peel_clusters(points, bins, 1.0, 100, 1e-3, 1, 100)
    assert labels.max() == 39
    assert emulated.synchronisations() == 0
