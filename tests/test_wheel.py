"""The wheel as it is shipped: it must carry the weights, their card and the type marker."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STYLIZERS = ("adaattn_vgg_mini", "sanet_vgg_mini", "adain_vgg_mini")


@pytest.mark.slow
def test_the_wheel_has_all_that_runs(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        inside = {info.filename: info.file_size for info in opened.infolist()}
    for name in ("mini", "vgg_mini", "ddpm_mini", "ddpm_mini_aggregation", *STYLIZERS):
        weights = Path("vitfeats") / "assets" / f"{name}.safetensors"
        assert inside[str(weights)] == (ROOT / weights).stat().st_size
    assert inside["vitfeats/assets/README.md"] > 500
    assert "vitfeats/py.typed" in inside
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "vitfeats").rglob("*.py")}
    assert sources <= set(inside)
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    strangers = {name.split("/")[0] for name in inside} - {"vitfeats"}
    assert all(name.endswith(".dist-info") for name in strangers), strangers
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, {len(inside)} files")
