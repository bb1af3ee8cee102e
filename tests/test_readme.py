"""README's example runs as it stands there, but for a few steps instead of many."""

import re
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_example_of_composition_trains_and_its_result_adapts_to_new_arrays(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    example, deployment = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert "num_steps=100" in example
    names = {}
    exec(example.replace("num_steps=100", "num_steps=2"), names)
    images = np.random.default_rng(0).random((5, 28, 28, 1), np.float32)
    names |= {"images": images, "labels": np.arange(5), "new_images": images[:3]}
    exec(deployment, names)
    assert names["predictions"].shape == (3,)
    predict = names["inductive"](names["net"].apply)
    logits = [
        predict(names["adapted"], (images, names["labels"]), new)
        for new in (images[:3], images[:1])
    ]
    np.testing.assert_allclose(logits[0][:1], logits[1], rtol=1e-4, atol=1e-4)
    before, after = (names[of]["params"]["head"]["kernel"] for of in ("params", "adapted"))
    assert np.isfinite(after).all()
    assert not np.array_equal(before, after)
