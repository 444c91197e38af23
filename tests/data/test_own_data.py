"""docs/DATA.md: what it says of the columns, and the example that a reader would paste."""

import re

import numpy as np

from b2t.data.dataset import dataset_info, load_trials
from b2t.data.phonemes import to_names
from b2t.data.trials import COLUMNS, read_signal


def test_every_column_is_described(repository):
    text = (repository / "docs" / "DATA.md").read_text().partition("## Columns")[2]
    described = re.findall(r"^\| `(\w+)` \|", text, re.M)
    assert sorted([*described, "split"]) == sorted(COLUMNS)


def test_the_example_makes_a_dataset(repository, tmp_path, monkeypatch):
    text = (repository / "docs" / "DATA.md").read_text()
    block = re.search(r"( {4}import numpy as np\n(?:(?: {4}.*)?\n)*?.*save_to_disk\(.*\n)", text)[1]
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line[4:] for line in block.splitlines()), {})
    info = dataset_info("mine")
    assert (info.channels, info.sampling_rate, info.splits) == (16, 50.0, {"train": 2, "val": 1})
    row = load_trials("mine", "val").with_format("arrow")[0]
    assert " ".join(to_names(row["phonemes"][0].as_py())) == "AY SIL AE M SIL K OW L D SIL"
    signal = read_signal(row)
    assert signal.shape == (80, 16)
    np.testing.assert_allclose(signal.std(0), 1, rtol=1e-5)
