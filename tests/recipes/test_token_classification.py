"""The recipe on tokens, as a user starts it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "integrations" / "token_classification.py"


@pytest.mark.slow
def test_reweight_learns_fewer_of_the_wrong_tags():
    done = subprocess.run(
        [sys.executable, RECIPE], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    plain, ours = map(float, re.findall(r": +(0\.\d+)", done.stdout))
    assert 1 / 8 < plain < ours - 0.05  # both above chance
