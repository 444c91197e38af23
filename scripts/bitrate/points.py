"""What is compared: overrides of the preset `phonemes`, by name."""

_Q = "model.quantizer."

POINTS: dict[str, list[str]] = {
    "none": [f"{_Q}enabled=false", "phases.0.losses.commitment=0"],
    "4x256": [],
    "1x256": [f"{_Q}num_quantizers=1"],
    "2x256": [f"{_Q}num_quantizers=2"],
    "8x256": [f"{_Q}num_quantizers=8"],
    "1x64": [f"{_Q}num_quantizers=1", f"{_Q}codebook_size=64"],
    "4x64": [f"{_Q}codebook_size=64"],
    "commitment 0.05": ["phases.0.losses.commitment=0.05"],
    "commitment 1": ["phases.0.losses.commitment=1.0"],
    "straight through": [f"{_Q}rotation_trick=false"],
    "decay 0.9": [f"{_Q}decay=0.9"],
    "dim 32": [f"{_Q}codebook_dim=32"],
    "dim 64": [f"{_Q}codebook_dim=64"],
    "cosine": [f"{_Q}use_cosine_sim=true"],
    "beam 8 in evaluation": [f"{_Q}eval_beam_size=8"],
    "no revival": [f"{_Q}revival=false"],
    "start at once": ["codebook_start.after_steps=25"],
    "start late": ["codebook_start.after_steps=300"],
    "reconstruction 0.1": ["phases.0.losses.reconstruction=0.1"],
    "reconstruction 1": ["phases.0.losses.reconstruction=1.0"],
}
