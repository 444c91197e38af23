import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from b2t.train.safetensors_file import write_safetensors


def tensors(size):
    generator = torch.Generator().manual_seed(size)
    real = torch.randn(size, 3, generator=generator)
    whole = torch.arange(7 * size)
    kinds = (torch.bfloat16, torch.float16, torch.float64, torch.float32)
    counts = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
    return {
        **{f"real/{kind}": real.to(kind) for kind in kinds},
        **{f"whole/{kind}": (whole % 2).to(kind) for kind in counts},
        "transposed": real.T,
        "part of another": real[1:, 1],
        "the same again": real,
        "scalar": torch.tensor(float("nan")),
        "nothing": torch.empty(0, 4),
        'a "quoted" π/name\n': real[:1],
    }


@pytest.mark.parametrize("size", [2, 400_000])
def test_the_file_is_the_librarys_byte_for_byte(tmp_path, size):
    """Below and above what is written at once."""
    given = tensors(size)
    written, digest = write_safetensors(tmp_path / "ours", given)
    save_file({name: t.contiguous().clone() for name, t in given.items()}, tmp_path / "theirs")
    ours = (tmp_path / "ours").read_bytes()
    assert ours == (tmp_path / "theirs").read_bytes()
    assert (written, digest) == (len(ours), hashlib.sha256(ours).hexdigest())


def test_no_tensors_at_all(tmp_path):
    write_safetensors(tmp_path / "file", {})
    assert load_file(tmp_path / "file") == {}


def test_a_dtype_of_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"spectrum \(torch.complex64\)"):
        write_safetensors(tmp_path / "file", {"spectrum": torch.zeros(2, dtype=torch.complex64)})
