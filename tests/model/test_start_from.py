"""A new model that starts from another gives what the other gives, on what both know."""

import pytest
import torch

from b2t.errors import UserError
from b2t.model import BrainToText, BrainToTextConfig
from b2t.model.start_from import start_from

NAMES = ["a", "b", "c", "d", "e"]


def build(seed, names=NAMES, sessions=("mon", "tue", "wed"), channels=None, **change):
    torch.manual_seed(seed)
    sections = {
        "encoder": {"patch_size": 4, "patch_stride": 3, "dim": 16, "depth": 2, "heads": 2},
        "quantizer": {"codebook_size": 8, "num_quantizers": 2, "kmeans_init": False},
        "signal_decoder": {"depth": 1, "heads": 2},
        "text_decoder": {
            "dim": 16, "depth": 1, "heads": 2, "ffn_dim": 16, "dropout": 0.0, "max_tokens": 12,
        },
        "vocab_size": 30,
    } | change  # fmt: skip
    model = BrainToText(
        BrainToTextConfig(
            channels=channels or len(names),
            sessions=list(sessions),
            signal={"channel_names": names and list(names)},
            **sections,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def outputs(model, signal, session):
    """Codes [B, P, Q], signal [B, T, C] and phoneme logits [B, P, classes] of all-real trials."""
    sessions = torch.full((len(signal),), session)
    with torch.no_grad():
        encoded = model.encode_batch(signal, None, sessions)
        decoded = model.signal_decoder(encoded.quantized, encoded.frame_mask, signal.shape[1])
        return encoded.codes, decoded, model.phoneme_head(encoded.quantized)


def test_channels_and_sessions_are_matched_by_name():
    source = build(0)
    order = [3, 0, 4, 1, 2]
    model = build(1, [NAMES[i] for i in order], ["fri", "wed", "mon"])
    report = start_from(model, source, "source")
    signal = torch.randn(3, 17, 5)
    for here, there in ((1, 2), (2, 0), (0, -1)):
        sessions = (torch.full((3,), number) for number in (there, here))
        latents = source.latents(signal, None, next(sessions))[0]
        found = model.latents(signal[..., order], None, next(sessions))[0]
        torch.testing.assert_close(found, latents)
        codes, decoded, logits = outputs(source, signal, there)
        own = outputs(model, signal[..., order], here)
        assert torch.equal(own[0], codes)
        torch.testing.assert_close(own[1], decoded[..., order])
        torch.testing.assert_close(own[2], logits)
    assert report["adapter"].note == "1 session by the mean of the source's"
    assert all(taken.taken == taken.total and not taken.new for taken in report.values())
    assert int(model.quantizer.codebooks.updates) == int(source.quantizer.codebooks.updates)


def test_a_lost_electrode_and_a_new_one():
    """Silent, they change nothing: what the others weigh is the source's."""
    without = {"adapter": {"enabled": False}}
    source = build(0, **without)
    model = build(1, ["e", "new", "a", "b", "c"], **without)
    report = start_from(model, source, "source")
    assert report["encoder"].note == "4 of 5 channels are the source's"
    theirs = torch.randn(2, 9, 5)
    theirs[..., 3] = 0
    own = torch.stack((theirs[..., 4], torch.zeros(2, 9), *theirs[..., :3].unbind(-1)), dim=-1)
    expected, found = outputs(source, theirs, -1), outputs(model, own, -1)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1][..., [2, 3, 4, 0]], expected[1][..., [0, 1, 2, 4]])


def test_maps_of_a_new_electrode_leave_it_alone():
    source = build(0)
    model = build(1, [*NAMES, "new"])
    torch.nn.init.zeros_(model.adapter.weight)
    with torch.no_grad():
        model.adapter.weight += torch.eye(6)
    start_from(model, source, "source")
    assert torch.equal(model.adapter.weight[1, :5, :5], source.adapter.weight[1])
    assert torch.equal(model.adapter.weight[:, 5], torch.eye(6)[5].expand(3, 6))
    assert torch.equal(model.adapter.weight[:, :, 5], torch.eye(6)[5].expand(3, 6))


def test_other_channels_without_names_keep_all_but_what_touches_them():
    source = build(0, None, channels=5)
    model = build(1, None, channels=7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = start_from(model, source, "source")
    after, theirs = model.state_dict(), source.state_dict()
    touched = {"adapter.weight", "adapter.bias"} | {
        f"{layer}.{part}"
        for layer in ("encoder.embed", "signal_decoder.to_patch")
        for part in ("weight", "bias")
    }
    for name, value in after.items():
        assert torch.equal(value, (before if name in touched else theirs)[name]), name
    assert report["encoder"].new == ["embed.weight", "embed.bias"]
    assert "new: embed.weight, embed.bias (5 channels there, 7 here, without" in (
        report["encoder"].text()
    )


def test_as_many_channels_without_names_are_taken_as_they_come():
    source, model = build(0, None, channels=5), build(1)
    report = start_from(model, source, "source")
    signal = torch.randn(2, 9, 5)
    assert torch.equal(outputs(model, signal, 1)[0], outputs(source, signal, 1)[0])
    assert "taken as they come" in report["adapter"].note


def test_other_codebooks_vocabulary_and_untrained_heads_start_anew():
    source = build(0)
    source.config.trained = ["adapter", "encoder", "quantizer", "text_decoder"]
    codes = {"codebook_size": 8, "num_quantizers": 3, "kmeans_init": False}
    model = build(1, quantizer=codes, vocab_size=31)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = start_from(model, source, "source")
    notes = {name: taken.note for name, taken in report.items() if not taken.taken}
    assert notes == {
        "quantizer": "other codebooks there",
        "signal_decoder": "untrained in the source",
        "phoneme_head": "untrained in the source",
        "text_decoder": "another tokenizer there",
    }
    for name, value in model.state_dict().items():
        if name.partition(".")[0] in notes:
            assert torch.equal(value, before[name]), name


def test_an_encoder_of_another_shape_is_refused():
    narrow = {"patch_size": 4, "patch_stride": 3, "dim": 32, "depth": 1, "heads": 2}
    with pytest.raises(UserError, match=r"dim=16 \(here 32\), model.encoder.depth=2 \(here 1\)"):
        start_from(build(1, encoder=narrow), build(0), "source")
