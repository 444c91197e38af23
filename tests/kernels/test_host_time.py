"""What operators launch on a GPU, by a driver that starts nothing: the same with addresses alone.

In processes of their own, as interpretation and compilation cannot share one.
"""

import pytest

from tests.kernels.compiling import run

PROGRAM = """
import sys
import torch
sys.path.insert(0, "scripts")
import host_time
from b2t_kernels import launching


def launches(driver, call, addresses):
    launching.ADDRESSES = addresses
    driver.launches.clear()
    made, blocks = torch.empty, []

    def noted(*sizes, **options):
        blocks.append(made(*sizes, **options))
        return blocks[-1]

    torch.empty = noted
    kept = call()
    torch.empty = made
    room = {each.data_ptr(): each.untyped_storage().nbytes() for each in blocks if each.numel()}
    return list(driver.launches), room, (kept, blocks)


def pointer(argument):
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


def same(operator, driver, call):
    launches(driver, call, True)
    # All buffers, so that none is taken twice.
    watched, room, held = launches(driver, call, False)
    again, blocks, held_again = launches(driver, call, True)
    assert [each[:2] for each in watched] == [each[:2] for each in again], operator
    assert len(blocks) <= len(room)
    moved, places = {}, []
    for (name, _, one), (_, _, other) in zip(watched, again, strict=True):
        assert len(one) == len(other)
        for theirs, ours in zip(map(pointer, one), map(pointer, other), strict=True):
            tensor = isinstance(theirs, int) and theirs > 1 << 32
            if tensor:
                assert moved.setdefault(theirs, ours) == ours, (operator, name, "a buffer moved")
                inside = any(at <= ours < at + size for at, size in blocks.items())
                assert theirs == ours or inside, (operator, name, "lies nowhere")
            else:
                assert theirs == ours, (operator, name, theirs, ours)
    starts = sorted((moved[at], size) for at, size in room.items() if at in moved)
    for (first, size), (second, _) in zip(starts, starts[1:]):
        assert first + size <= second, (operator, "two buffers overlap")
    return len(again)


with host_time.as_on_a_gpu() as driver, torch.no_grad():
    calls = host_time.operators(300, 300, 20, 2)
    # These make some of what they launch with by other operators of torch.
    del calls["draw"], calls["beam of 8, 2 layers"]
    for operator, call in calls.items():
        print(operator, same(operator, driver, call))
"""


def test_addresses_are_those_of_buffers_apart(repository):
    """Same kernels, grids and numbers; each buffer lies in what was taken, beside the others."""
    assert len(run(repository, "-c", PROGRAM).splitlines()) > 10


@pytest.mark.parametrize("sizes", [("300", "70", "20")])
def test_the_script_tells_what_a_call_takes(repository, sizes):
    said = run(repository, "scripts/host_time.py", "--sizes", *sizes, "--calls", "2")
    rows = [line.strip("| ").split(" | ") for line in said.splitlines()[2:]]
    found = {name: [int(each) for each in numbers] for name, *numbers in rows}
    assert found["nearest exact, prepared"][:3] == [4, 0, 0]
    assert found["search and usage"][:3] == [6, 0, 0]
    assert found["prepare one"][0] == found["prepare four"][0] == 3
    assert found["beam of 8, 4 layers"][2] < 4, "prepared codes were looked through again"
    assert all(spent > 0 for *_, spent in found.values())
