"""Every operator refuses or handles all bad input of the table in hostile.py."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.hostile import (
    HUGE,
    INF,
    ITEMS,
    NAN,
    OPERATORS,
    VALUES,
    Accepted,
    Arguments,
    Refused,
)
from tests.support.ops import CUDA, DEVICES

SEVERAL = [k for k, v in OPERATORS.items() if not v.any_device and k != "peel_clusters"]
DIFFERENTIABLE = [name for name, operator in OPERATORS.items() if operator.derivatives]
REFUSALS = (ValueError, TypeError, IndexError, RuntimeError)
ALL = pytest.mark.parametrize("name", OPERATORS)


def cases(kind: type, items: tuple[str, ...]) -> Any:
    """A parametrisation by the cases of one kind: name, item and case."""
    named_cases = {
        f"{name}-{item}-{i}": (name, case)
        for name, operator in OPERATORS.items()
        for item in items
        if not isinstance(operator.items[item], str)
        for i, case in enumerate(operator.items[item])
        if isinstance(case, kind)
    }
    return pytest.mark.parametrize(("name", "case"), named_cases.values(), ids=named_cases)


OTHERS = tuple(item for item in ITEMS if item not in VALUES)


def arguments(name: str, change: Arguments | None = None, device: str = "cpu") -> Arguments:
    """The sample with some of it replaced, on a device."""
    if device == "cuda" and not OPERATORS[name].on_gpu:
        pytest.skip("an operator of the CPU alone")
    chosen = OPERATORS[name].sample | (change or {})
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in chosen.items()}


def tensors(name: str) -> dict[str, Tensor]:
    return {k: v for k, v in OPERATORS[name].sample.items() if isinstance(v, Tensor)}


def call(name: str, given_: Arguments) -> list[Tensor]:
    """The results, also of an operator that has one."""
    result = OPERATORS[name].call(**given_)
    return [result] if isinstance(result, Tensor) else list(result)


def with_gradient(name: str, device: str = "cpu") -> tuple[Tensor, list[Tensor]]:
    """The maps of an operator that can be differentiated, and its results that depend on them."""
    chosen = arguments(name, device=device)
    chosen["maps"].requires_grad_()
    return chosen["maps"], [result for result in call(name, chosen) if result.requires_grad]


def refused(name: str, error: Any, message: str) -> Any:
    return pytest.raises(error, match=f"^{name}: .*{message}")


def test_every_compiled_operator_is_in_the_table() -> None:
    schemas = {schema.name.partition("::") for schema in torch._C._jit_get_all_schemas()}
    compiled = {name for library, _, name in schemas if library == "instseg"}
    assert compiled == {kernel for op in OPERATORS.values() for kernel in op.kernels}


@ALL
def test_every_kind_of_bad_input_has_cases_or_a_reason(name: str) -> None:
    assert OPERATORS[name].items.keys() == set(ITEMS)
    assert all(OPERATORS[name].items.values())


@cases(Refused, VALUES)
def test_values_that_cannot_be_used_are_refused_by_name(name: str, case: Refused) -> None:
    with refused(name, case.error, case.message):
        call(name, arguments(name, case.change))


@pytest.mark.parametrize("device", DEVICES)
@cases(Refused, OTHERS)
def test_what_does_not_fit_is_refused_by_name(name: str, case: Refused, device: str) -> None:
    with refused(name, case.error, case.message):
        call(name, arguments(name, case.change, device))


@pytest.mark.parametrize("device", DEVICES)
@cases(Accepted, ITEMS)
def test_what_is_odd_but_valid_has_a_finite_result(name: str, case: Accepted, device: str) -> None:
    results = call(name, arguments(name, case.change, device))
    assert len(results[0].shape) == len(case.shape)
    assert all(n in (-1, size) for n, size in zip(case.shape, results[0].shape, strict=True))
    assert all(result.isfinite().all() for result in results)


@ALL
@pytest.mark.parametrize("device", DEVICES)
def test_another_number_of_dimensions_is_refused_by_name(name: str, device: str) -> None:
    for argument, tensor in tensors(name).items():
        for other in (tensor[0], tensor[None]):
            with refused(name, ValueError, argument):
                call(name, arguments(name, {argument: other}, device))


@ALL
@pytest.mark.parametrize("device", DEVICES)
def test_whole_numbers_for_others_and_the_reverse_are_refused_by_name(
    name: str, device: str
) -> None:
    for argument, tensor in tensors(name).items():
        for dtype in (torch.int32, *(() if tensor.is_floating_point() else (torch.float32,))):
            given_ = arguments(name, {argument: tensor.to(dtype)}, device)
            if argument in OPERATORS[name].any_dtype:
                assert call(name, given_)
            else:
                with refused(name, TypeError, f"{argument} is .*; expected"):
                    call(name, given_)


@ALL
@pytest.mark.parametrize("device", DEVICES)
def test_one_argument_in_double_precision_changes_nothing_else(name: str, device: str) -> None:
    expected = call(name, arguments(name, device=device))
    for argument, tensor in tensors(name).items():
        if tensor.is_floating_point():
            results = call(name, arguments(name, {argument: tensor.double()}, device))
            for one, other in zip(results, expected, strict=True):
                torch.testing.assert_close(one.to(other.dtype), other)


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("device", ["meta", CUDA])
def test_tensors_on_several_devices_are_refused_with_both(name: str, device: str) -> None:
    """With one on the meta device torch would run the fake kernel and return unwritten memory."""
    for argument, tensor in tensors(name).items():
        given_ = arguments(name) | {argument: tensor.to(device)}
        with refused(name, RuntimeError, r"is on .* and \w+ on .*; move one of them") as caught:
            call(name, given_)
        assert device in str(caught.value) and "cpu" in str(caught.value)


@ALL
@pytest.mark.parametrize("device", DEVICES)
def test_the_layout_of_tensors_does_not_matter(name: str, device: str) -> None:
    expected = call(name, arguments(name, device=device))
    for argument, tensor in tensors(name).items():
        layouts = [torch.stack([tensor, tensor], -1)[..., 0]]
        if tensor.dim() == 4:
            layouts.append(tensor.contiguous(memory_format=torch.channels_last))
        for layout in layouts:
            results = call(name, arguments(name, device=device) | {argument: layout.to(device)})
            assert all(map(torch.equal, results, expected))


@ALL
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(name: str, dtype: torch.dtype, device: str) -> None:
    """The first tensor is in halves, as the layer before it leaves it, the others are not."""
    argument, tensor = next(iter(tensors(name).items()))
    halves = {argument: tensor.to(dtype)} if tensor.is_floating_point() else {}
    given_ = arguments(name, halves, device)
    expected = call(name, given_)
    with torch.autocast(device, dtype):
        results = call(name, given_)
    for one, other in zip(results, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@ALL
@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_is_there_for_the_maps_alone(name: str, device: str) -> None:
    """RoIs, boxes and the like may ask for one: it is None, and that of the maps stays right."""
    given_ = arguments(name, device=device)
    for value in given_.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_()
    results = [result for result in call(name, given_) if result.requires_grad]
    assert bool(results) == (name in DIFFERENTIABLE)
    if not results:
        return
    maps, expected = with_gradient(name, device)
    torch.autograd.backward([result.sum() for result in results])
    torch.autograd.backward([result.sum() for result in expected])
    assert torch.equal(given_.pop("maps").grad, maps.grad) and maps.grad.any()
    assert all(value.grad is None for value in given_.values() if isinstance(value, Tensor))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("device", DEVICES)
def test_an_expanded_gradient_gives_what_a_dense_one_gives(name: str, device: str) -> None:
    grads = []
    for stride in (0, 1):
        maps, results = with_gradient(name, device)
        one = torch.ones((), device=device)
        ones = [one.expand(r.shape) if stride == 0 else torch.ones_like(r) for r in results]
        torch.autograd.backward(results, ones)
        grads.append(maps.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("device", DEVICES)
def test_a_second_derivative_is_right_or_refused(name: str, device: str) -> None:
    given_ = arguments(name, device=device)
    maps = given_["maps"].double().requires_grad_()

    def squares(maps: Tensor) -> list[Tensor]:
        results = call(name, given_ | {"maps": maps})
        return [result.square() for result in results if result.requires_grad]

    if OPERATORS[name].derivatives == 2:
        assert torch.autograd.gradgradcheck(squares, maps, fast_mode=True)
        return
    loss = torch.stack([square.sum() for square in squares(maps)]).sum()
    (grad,) = torch.autograd.grad(loss, maps, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        grad.sum().backward()


@ALL
@pytest.mark.parametrize("device", DEVICES)
def test_two_runs_give_the_same_bits(name: str, device: str) -> None:
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            results = call(name, arguments(name, device=device))
            if name in DIFFERENTIABLE:
                maps, outputs = with_gradient(name, device)
                torch.autograd.backward([output.square().sum() for output in outputs])
                results.append(maps.grad)
            runs.append(results)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *runs))


@ALL
@pytest.mark.parametrize("device", [CUDA])
def test_a_gpu_that_is_not_the_current_one_gives_the_same(name: str, device: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = call(name, arguments(name, device=f"{device}:0"))
    results = call(name, arguments(name, device=f"{device}:1"))
    for one, other in zip(results, expected, strict=True):
        assert str(one.device) == f"{device}:1"
        torch.testing.assert_close(one.cpu(), other.cpu())


def filled(tensor: Tensor, rows: int, value: float) -> Tensor:
    """A copy with a number, or the nearest one that its type has, in the first rows."""
    if not tensor.is_floating_point():
        info = torch.iinfo(torch.uint8 if tensor.dtype == torch.bool else tensor.dtype)
        value = int(min(max(value, info.min), info.max)) if value == value else 0
    changed = tensor.clone()
    changed[:rows] = torch.tensor(value).to(tensor.dtype)
    return changed


NUMBERS = [-1, 0, 1, 2, 3, 7, HUGE, 2**62, -(2**63), 0.5, -0.5, 1e300, 1e-300, INF, -INF, NAN]
CHANGES = {
    "first": lambda t, v: filled(t, 1, v),
    "all": lambda t, v: filled(t, len(t), v),
    "cut": lambda t, v: t[:1],
    "none": lambda t, v: t[:0],
    "narrow": lambda t, v: t[..., :0],
    "turned": lambda t, v: t.mT if t.dim() > 1 else t,
    "flipped": lambda t, v: t.flip(0),
    "less": lambda t, v: t[0],
    "more": lambda t, v: t[None],
    "twice": lambda t, v: torch.cat([t, t]),
    "double": lambda t, v: t.double(),
    "half": lambda t, v: t.half(),
    "whole": lambda t, v: t.long(),
    "stretched": lambda t, v: t[:1].expand(t.shape),
}


@ALL
@given(data=st.data())
def test_any_change_of_valid_input_gives_a_result_or_an_error_with_the_name(
    name: str, data: st.DataObject
) -> None:
    operator = OPERATORS[name]
    chosen = dict(operator.sample)
    for argument in data.draw(
        st.lists(st.sampled_from(list(chosen)), min_size=1, max_size=3, unique=True)
    ):
        value, number = chosen[argument], data.draw(st.sampled_from(NUMBERS))
        if isinstance(value, Tensor):
            change = CHANGES[data.draw(st.sampled_from(list(CHANGES)))]
            chosen[argument] = change(value, number)
        elif isinstance(value, tuple):
            chosen[argument] = (number, value[1])
        else:
            chosen[argument] = number
    try:
        results = call(name, chosen)
    except REFUSALS as error:
        assert any(part in str(error) for part in (name, *operator.kernels))
    else:
        assert all(isinstance(result, Tensor) for result in results)
