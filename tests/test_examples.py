"""Every script in examples/ runs, and writes an image."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert {"pca", "match_stereo", "custom_loss", "own_module"} <= {example.stem for example in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_example_writes_an_image(example: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    environment = {**os.environ, "VITFEATS_EXAMPLE_STEPS": "2", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, str(example), "--out", str(out)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"wrote {out}")
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]
    with Image.open(out) as picture:
        picture.load()
        assert min(picture.size) > 100
        assert any(low < high for low, high in picture.convert("RGB").getextrema())
