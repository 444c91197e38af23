"""What batch scripts say of the ranks."""

import pytest

from b2t.errors import UserError
from b2t.train import main
from b2t.train.launched import check_complete, check_numbers

SOUND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node0"}


@pytest.fixture
def environment(monkeypatch):
    def set_all(**changes):
        for name, value in {**SOUND, "MASTER_PORT": "29500", **changes}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return set_all


def test_what_launchers_say_passes(environment):
    environment()
    check_numbers()
    check_complete()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": "29500x"}, "MASTER_PORT=29500x: expected a whole number from 1"),
        ({"RANK": "-1"}, "RANK=-1: expected a whole number from 0"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: expected a whole number from 1"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK=: expected a whole number from 0"),
        ({"RANK": "2"}, "RANK=2 of WORLD_SIZE=2: ranks count from 0"),
    ],
)
def test_numbers_that_cannot_be_are_a_message(environment, capsys, changes, message):
    environment(**changes)
    assert main.main(["--config", "demo"]) == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_is_named(environment):
    environment(MASTER_ADDR=None, WORLD_SIZE=None)
    check_numbers()
    with pytest.raises(UserError, match=r"RANK=1, but not WORLD_SIZE, MASTER_ADDR"):
        check_complete()
