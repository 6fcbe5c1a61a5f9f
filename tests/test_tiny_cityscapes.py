"""The fit that the tiny data set's checkpoint is made of belongs to its scenes."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import support  # noqa: F401  (puts the scripts on sys.path)
import tiny_cityscapes


@pytest.mark.skipif(not os.environ.get("SOAK"), reason="takes half a minute; make soak runs it")
def test_the_stored_fit_is_that_of_the_scenes():
    with torch.no_grad():
        fitted = tiny_cityscapes.fit(tiny_cityscapes.make_network(), tiny_cityscapes.read_scenes())
    stored = np.load(tiny_cityscapes.FIT)
    assert fitted.keys() == set(stored)
    for key, values in fitted.items():
        tolerance = 0.01 * np.abs(stored[key]).max()
        np.testing.assert_allclose(values.astype(float), stored[key].astype(float), rtol=0, atol=tolerance, err_msg=key)
