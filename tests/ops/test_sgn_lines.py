"""SGN's lines: equal to plain Python, by hand, hostile maps, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from instseg.ops.sgn_lines import (
    END,
    INTERIOR,
    NONE,
    START,
    decode_lines,
    decode_lines_reference,
    group_lines,
    group_lines_reference,
)


def maps(labels: list[list[int]], classes: list[list[int]] | None = None) -> tuple[Tensor, Tensor]:
    """Label map and semantic map; of one class unless said otherwise."""
    drawn = torch.tensor(labels, dtype=torch.uint8)
    kinds = torch.ones(drawn.shape, dtype=torch.int64)
    return drawn, kinds if classes is None else torch.tensor(classes)


def test_thin_breakpoints_follow_an_end_and_precede_a_start() -> None:
    labels, semantic = maps([[START, INTERIOR, END, START, START, INTERIOR, INTERIOR, END]])
    assert decode_lines(labels, semantic, widened=False).tolist() == [[0, 0, 0, 1, 2, 2, 2, 2]]


def test_widened_breakpoints_lie_where_labels_change() -> None:
    labels, semantic = maps([[START, START, INTERIOR, END, END, START, START, END]])
    assert decode_lines(labels, semantic, widened=True).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]


def test_either_label_alone_is_a_widened_breakpoint() -> None:
    labels, semantic = maps([[INTERIOR, END, END, INTERIOR, START, START, INTERIOR]])
    assert decode_lines(labels, semantic, widened=True).tolist() == [[0, 0, 0, 1, 2, 2, 2]]


def test_classes_and_background_end_lines_and_rows_are_numbered_on() -> None:
    labels, semantic = maps([[INTERIOR] * 6] * 2, [[0, 3, 3, 5, -1, 5], [3, 3, 0, 0, 0, 2]])
    expected = [[NONE, 0, 0, 1, NONE, 2], [3, 3, NONE, NONE, NONE, 4]]
    assert decode_lines(labels, semantic, widened=False).tolist() == expected


@given(
    st.integers(0, 9), st.integers(0, 40), st.booleans(), st.integers(1, 4), st.integers(0, 2**31)
)
def test_any_map_gives_what_plain_python_gives(
    height: int, width: int, widened: bool, classes: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 6, (height, width), generator=generator).to(torch.uint8)
    semantic = torch.randint(-1, classes, (height, width), generator=generator)
    expected = decode_lines_reference(labels, semantic, widened=widened)
    assert torch.equal(decode_lines(labels, semantic, widened=widened), expected)


@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("label", [0, INTERIOR, START, END, 4, 255])
def test_a_map_of_one_label_is_decoded_as_by_plain_python(label: int, widened: bool) -> None:
    labels, semantic = maps([[label] * 70] * 50)
    expected = decode_lines_reference(labels, semantic, widened=widened)
    assert torch.equal(decode_lines(labels, semantic, widened=widened), expected)
    assert expected.max() + 1 == (50 * 70 if label in (START, END) and not widened else 50)


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    labels = torch.randint(0, 4, (400, 300)).to(torch.uint8)
    semantic = torch.randint(0, 3, (400, 300))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    decoded = decode_lines(labels, semantic, widened=True)
    torch.set_num_threads(before)
    assert torch.equal(decoded, decode_lines_reference(labels, semantic, widened=True))


def test_lines_are_joined_in_the_order_of_pairs() -> None:
    pairs = torch.tensor([[0, 2], [3, 2], [5, 4]])
    assert group_lines(pairs, torch.zeros(6, dtype=torch.bool)).tolist() == [0, 1, 0, 0, 2, 2]


def test_lines_that_touch_never_come_into_one_component() -> None:
    """0 and 1 touch; 2 lies below both of them and joins the first that comes."""
    touches = torch.tensor([True, False, False])
    assert group_lines(torch.tensor([[1, 2], [0, 2]]), touches).tolist() == [0, 1, 1]
    assert group_lines(torch.tensor([[0, 2], [1, 2], [0, 1]]), touches).tolist() == [0, 1, 0]


@given(st.integers(0, 12), st.integers(0, 40), st.integers(0, 2**31))
def test_any_pairs_give_what_sets_give(lines: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    touches = torch.rand(lines, generator=generator) < 0.4
    touches[-1:] = False
    pairs = torch.randint(0, max(lines, 1), (count if lines else 0, 2), generator=generator)
    assert torch.equal(group_lines(pairs, touches), group_lines_reference(pairs, touches))


def test_the_operators_pass_opcheck() -> None:
    labels, semantic = maps([[START, INTERIOR, END, START]] * 3)
    torch.library.opcheck(torch.ops.instseg.decode_lines.default, (labels, semantic, True))
    arguments = (torch.tensor([[0, 1], [2, 0]]), torch.tensor([False, True, False]))
    torch.library.opcheck(torch.ops.instseg.group_lines.default, arguments)
