"""Weights of a model of other recordings as the start of a new one."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from b2t.counted import counted
from b2t.errors import UserError
from b2t.model.brain_to_text import BrainToText
from b2t.model.objectives import COMPONENTS

_SHAPE = ("kind", "patch_size", "patch_stride", "dim", "depth", "mlp_ratio", "bidirectional")
"""Keys of an encoder's config that its weights depend on, for messages."""


@dataclass
class Taken:
    """What one component took.

    Attributes:
        taken: tensors that are the source's, whole or for the channels and sessions that it knows.
        total: tensors of the component.
        new: names of those that start anew.
        note: what was not simply copied.
    """

    taken: int = 0
    total: int = 0
    new: list[str] = field(default_factory=list)
    note: str = ""

    def text(self) -> str:
        """Return the line that a log shows."""
        names = f", new: {', '.join(self.new[:4])}{' …' if len(self.new) > 4 else ''}"
        parts = [f"{self.taken} of {self.total} tensors"]
        return "".join(parts) + (names if self.new else "") + (f" ({self.note})" * bool(self.note))


@torch.no_grad()
def start_from(model: BrainToText, source: BrainToText, name: str) -> dict[str, Taken]:
    """Copy what fits from a trained model into a new one.

    Channels are matched by name; without names, by place where both have as many. Sessions are
    matched by name; one that the source does not know starts as the source treats unseen ones, by
    the mean of its maps. Codebooks come whole, with their averages, and need no other start.

    Args:
        model: whose weights are replaced.
        source: trained; unchanged.
        name: of the source, for messages.

    Returns:
        What was taken, for each component that the model has.

    Raises:
        UserError: the encoders are of different shapes, so that nothing of use would be taken.
    """
    places, note = _channel_places(model, source)
    found: dict[str, Taken] = {}
    for component in COMPONENTS:
        target = getattr(model, component)
        if target is None:
            continue
        given = getattr(source, component)
        report = found[component] = Taken(total=len(target.state_dict()))
        reason = _unusable(component, model, source)
        if reason:
            report.new, report.note = ["all"], reason
            continue
        tensors = dict(given.state_dict())
        known = any(place is not None for place in places)
        if component == "adapter":
            tensors = _maps(model, source, places) if known else {}
            report.note = note or _sessions_note(model, source)
        elif component in ("encoder", "signal_decoder") and places != list(range(len(places))):
            _place_channels(component, model, source, tensors, places)
            report.note = note
        _copy(target, tensors, report)
    body = [n for n in found["encoder"].new if not n.startswith("embed.")]
    if body:
        raise UserError(_of_another_shape(model, source, name))
    return found


def _channel_places(model: BrainToText, source: BrainToText) -> tuple[list[int | None], str]:
    """Place of each channel among those of the source, None for one that it does not have."""
    count = model.config.channels
    own, theirs = ((m.config.signal or {}).get("channel_names") for m in (model, source))
    if own and theirs:
        index = {channel: place for place, channel in enumerate(theirs)}
        places = [index.get(channel) for channel in own]
        shared = sum(place is not None for place in places)
        return places, "" if shared == count else f"{shared} of {count} channels are the source's"
    if count == source.config.channels:
        return list(range(count)), "channels without names, taken as they come"
    return [None] * count, f"{source.config.channels} channels there, {count} here, without names"


def _unusable(component: str, model: BrainToText, source: BrainToText) -> str:
    """Why nothing of a component is taken, an empty text where it can be."""
    given = getattr(source, component)
    if given is None:
        return "the source has none"
    trained = source.config.trained
    if trained is not None and component not in trained:
        return "untrained in the source"
    own, theirs = getattr(model, component).state_dict(), given.state_dict()
    whole = own.keys() == theirs.keys() and all(own[n].shape == theirs[n].shape for n in own)
    if component == "quantizer" and not whole:
        return "other codebooks there"
    if component == "text_decoder" and model.config.vocab_size != source.config.vocab_size:
        return "another tokenizer there"
    return ""


def _sessions_note(model: BrainToText, source: BrainToText) -> str:
    strange = [name for name in model.config.sessions if name not in source.config.sessions]
    return f"{counted(len(strange), 'session')} by the mean of the source's" if strange else ""


def _maps(
    model: BrainToText, source: BrainToText, places: Sequence[int | None]
) -> dict[str, Tensor]:
    """Maps of the sessions [S, C, C] and [S, C]; the identity at channels of no source."""
    assert model.adapter is not None and source.adapter is not None
    weight, bias = model.adapter.weight.clone(), model.adapter.bias.clone()
    here, there = _pairs(places)
    sessions = {name: number for number, name in enumerate(source.config.sessions)}
    for number in range(len(weight)):
        named = model.config.sessions
        given = sessions.get(named[number]) if named else None
        theirs, shift = (
            (source.adapter.weight.mean(0), source.adapter.bias.mean(0))
            if given is None
            else (source.adapter.weight[given], source.adapter.bias[given])
        )
        weight[number, here[:, None], here] = theirs[there[:, None], there]
        bias[number, here] = shift[there]
    return {"weight": weight, "bias": bias}


def _place_channels(
    component: str,
    model: BrainToText,
    source: BrainToText,
    tensors: dict[str, Tensor],
    places: Sequence[int | None],
) -> None:
    """Bring the weights of the source's channels to their places here, in ``tensors``."""
    size, theirs = model.encoder.patch_size, source.encoder.patch_size
    layer = "embed" if component == "encoder" else "to_patch"
    own = getattr(model, component).get_submodule(layer)
    here, there = _pairs(places)
    given = tensors.pop(f"{layer}.weight")
    shift = tensors.pop(f"{layer}.bias")
    width = own.weight.shape[0] if component == "encoder" else own.weight.shape[1]
    fits = size == theirs and width == given.shape[0 if component == "encoder" else 1]
    if not fits or not len(here):
        return
    if component == "encoder":
        new = own.weight.clone().view(width, size, -1)
        new[:, :, here] = given.view(width, size, -1)[:, :, there]
        tensors |= {"embed.weight": new.view_as(own.weight), "embed.bias": shift}
        return
    new, offset = own.weight.clone().view(size, -1, width), own.bias.clone().view(size, -1)
    new[:, here] = given.view(size, -1, width)[:, there]
    offset[:, here] = shift.view(size, -1)[:, there]
    tensors |= {"to_patch.weight": new.view_as(own.weight), "to_patch.bias": offset.flatten()}


def _pairs(places: Sequence[int | None]) -> tuple[Tensor, Tensor]:
    """Places here and there of the channels that both have, int64."""
    both = [(here, there) for here, there in enumerate(places) if there is not None]
    pairs = torch.tensor(both, dtype=torch.int64).view(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _copy(target: torch.nn.Module, tensors: dict[str, Tensor], report: Taken) -> None:
    for name, own in target.state_dict().items():
        given = tensors.get(name)
        if given is None or given.shape != own.shape:
            report.new.append(name)
        else:
            own.copy_(given)
            report.taken += 1


def _of_another_shape(model: BrainToText, source: BrainToText, name: str) -> str:
    own, theirs = model.config.encoder, source.config.encoder
    differ = [
        f"model.encoder.{key}={theirs[key]} (here {own[key]})"
        for key in _SHAPE
        if theirs[key] != own[key]
    ]
    return (
        f"model.init_from={name}: its encoder is of another shape, nothing of it can be taken; "
        f"give this run {', '.join(differ) or 'the same model.encoder section'}"
    )
