"""The plug-in holds to what every extractor of vitfeats holds to."""

from functools import partial

import pytest

import vitfeats as vf
from vitfeats import testing


@pytest.mark.parametrize("check", testing.CHECKS)
def test_hog_conforms(check: str) -> None:
    testing.assert_passes(check, partial(vf.load_extractor, "hog8", device="cpu"))
