"""What is compared: the quantizer of each point and the weights of its losses, by name."""

from typing import Any

COMMITMENT = 0.2


def _point(
    layers: int = 4,
    codes: int = 256,
    commitment: float = COMMITMENT,
    first: float = 0.0,
    reconstruction: float = 0.0,
    head: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """One point.

    Args:
        layers: quantizers.
        codes: of each.
        commitment: weight of the commitment loss.
        first: weight of a second CTC loss, of the phonemes heard in the first layer's code alone.
        reconstruction: weight of the signal decoder's loss.
        head: projections on ``codebook_dim`` directions that the phoneme head looks at most.
        options: others of the quantizer.
    """
    preset = {"rotation_trick": True, "revival_threshold": 0.3}
    quantizer = {"num_quantizers": layers, "codebook_size": codes, **preset, **options}
    weights = {"commitment": commitment, "reconstruction": reconstruction}
    return {"quantizer": quantizer, "weights": weights, "first": first, "head": head}


POINTS: dict[str, dict[str, Any]] = {
    "none": {"quantizer": None, "weights": {}, "first": 0.0, "head": False},
    "1x64": _point(1, 64),
    "2x64": _point(2, 64),
    "4x64": _point(4, 64),
    "8x64": _point(8, 64),
    "1x256": _point(1),
    "2x256": _point(2),
    "4x256": _point(4),
    "8x256": _point(8),
    "1x1024": _point(1, 1024),
    "2x1024": _point(2, 1024),
    "commitment-0.05": _point(commitment=0.05),
    "commitment-1": _point(commitment=1.0),
    "straight-through": _point(rotation_trick=False),
    "decay-0.9": _point(decay=0.9),
    "dim-32": _point(codebook_dim=32),
    "dim-64": _point(codebook_dim=64),
    "head-40": _point(codebook_dim=40, head=True),
    "head-40-1x256": _point(1, codebook_dim=40, head=True),
    "head-20": _point(codebook_dim=20, head=True),
    "cosine": _point(use_cosine_sim=True),
    "beam-8": _point(eval_beam_size=8),
    "training-beam-4": _point(beam_size=4),
    "joint": _point(joint_update=True),
    "joint-beam-8": _point(joint_update=True, eval_beam_size=8),
    "first-layer": _point(first=0.5),
    "no-revival": _point(revival=None),
    "reconstruction-0.1": _point(reconstruction=0.1),
    "reconstruction-1": _point(reconstruction=1.0),
}
