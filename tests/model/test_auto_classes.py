import subprocess
import sys

import pytest

from tests.model.small_model import build

LOAD = "print(*(type(auto.from_pretrained(f)).__name__ for auto in (AutoConfig, AutoModel)))"


@pytest.mark.parametrize(
    "imports",
    [
        "import b2t; slow = {'torch', 'transformers'} & {*sys.modules}; assert not slow, slow; "
        "from transformers import AutoConfig, AutoModel",
        "from transformers import AutoConfig, AutoModel; import b2t",
    ],
)
def test_importing_b2t_is_quick_and_enough_for_the_auto_classes(imports, tmp_path):
    build().save_pretrained(tmp_path)
    code = f"import sys; {imports}; f = {str(tmp_path)!r}; {LOAD}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["BrainToTextConfig", "BrainToText"], done.stderr
