"""Hooks that fail: which end a run, which are switched off, and what is said."""

import errno
import logging
import os

import pytest

from b2t.errors import UserError
from b2t.train import guard as guards
from b2t.train import hook_states, snapshot
from b2t.train.callback import Callback
from b2t.train.guard import Guard


class Hook(Callback):
    """Fails in `on_log` and at the start with what it is given; counts its calls."""

    def __init__(self, error):
        self.error = error
        self.calls = []

    def on_start(self, trainer):
        self.calls.append("on_start")
        raise self.error

    def on_log(self, trainer, record):
        self.calls.append("on_log")
        raise self.error

    def on_eval(self, trainer, metrics):
        self.calls.append("on_eval")

    def on_end(self, trainer):
        self.calls.append("on_end")

    def state_dict(self):
        raise self.error


class Meeting(Hook):
    collective = True


@pytest.fixture
def said(monkeypatch):
    """What is logged once, with its level."""
    lines = {}
    for module in (guards, hook_states):
        monkeypatch.setattr(
            module, "log_once", lambda key, text, level: lines.setdefault(key, (text, level))
        )
    return lines


def call_all(hook):
    guard = Guard()
    for name, arguments in (("on_log", (None, {})), ("on_log", (None, {})),
                            ("on_eval", (None, {})), ("on_end", (None,))):  # fmt: skip
        guard.call(hook, name, *arguments)


def test_a_hook_that_fails_is_switched_off_and_still_closes(said):
    hook = Hook(RuntimeError("figure has no axes"))
    call_all(hook)
    assert hook.calls == ["on_log", "on_end"]
    ((text, level),) = said.values()
    assert level == logging.ERROR
    assert text.startswith("Hook.on_log failed: RuntimeError: figure has no axes (test_guard.py:")


def test_a_hook_that_cannot_write_is_called_again(said):
    hook = Hook(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    call_all(hook)
    assert hook.calls == ["on_log", "on_log", "on_eval", "on_end"]
    assert len(said) == 1


@pytest.mark.parametrize("error", [RuntimeError("lost"), OSError("lost"), UserError("lost")])
def test_errors_where_ranks_meet_pass(error):
    with pytest.raises(type(error), match="lost"):
        call_all(Meeting(error))
    with pytest.raises(type(error), match="lost"):
        states([Meeting(error)])


def test_mistakes_of_the_user_end_a_start_and_nothing_later(said):
    with pytest.raises(UserError, match="no such project"):
        Guard().call(Hook(UserError("no such project")), "on_start", None)
    Guard().call(Hook(RuntimeError("no network")), "on_start", None)
    Guard().call(Hook(UserError("no such project")), "on_log", None, {})
    assert len(said) == 2


def states(hooks):
    checkpoint = snapshot.take(
        weights={}, moments={}, averages={}, progress=guards_progress(), callbacks=hooks,
        numbers={}, origin={},
    )  # fmt: skip
    return checkpoint.state["callbacks"]


def guards_progress():
    from b2t.train.progress import Progress

    return Progress()


def test_a_checkpoint_is_written_without_the_state_of_a_hook_that_fails(said):
    class Fine(Callback):
        key = "fine"

        def state_dict(self):
            return {"seen": 3}

    assert states([Hook(ValueError("half a figure")), Fine()]) == {"fine": {"seen": 3}}
    assert "half a figure" in said["Hook-state"][0]
