"""The wheel works alone: built from the sdist, installed where there is torch and nothing else of ours."""
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from chapters import ROOT, modules


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    "sdist and wheel, built in a copy so that nothing left behind by an earlier build gets in"
    src, out = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("dist")
    for name in ("settings.ini", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "constraints.txt"):
        shutil.copy(ROOT / name, src)
    shutil.copytree(ROOT / "hctrain", src / "hctrain", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, src], cwd=out,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def run(cwd, *command):
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_contents(dist):
    sdist, wheel = dist
    with tarfile.open(sdist) as t:
        names = {n.partition("/")[2] for n in t.getnames()}
    data = {p.relative_to(ROOT).as_posix() for p in (ROOT / "hctrain/data").glob("*") if p.is_file()}
    assert {"settings.ini", "setup.py", "LICENSE", "README.md", "hctrain/__init__.py"} | data <= names
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        info = next(n.split("/")[0] for n in names if n.endswith(".dist-info/METADATA"))
        points, meta = z.read(f"{info}/entry_points.txt").decode(), z.read(f"{info}/METADATA").decode()
    assert {f"hctrain/{m}.py" for m in modules()} | {"hctrain/__init__.py", "hctrain/_modidx.py"} | data <= set(names)
    assert {n.split("/")[0] for n in names} == {"hctrain", info}
    assert any(n.startswith(info) and n.endswith("LICENSE") for n in names)
    assert "hctrain = hctrain.cli:main" in points
    needs = [line.split(":")[1].split()[0] for line in meta.splitlines()
             if line.startswith("Requires-Dist") and "extra" not in line]
    assert sorted(needs) == ["numpy>=1.26", "torch>=2.4"]


def test_installs_alone(dist, tmp_path):
    "In a venv that sees the packages of this one, but for hctrain: those come by a .pth file, after its own"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", dist[1]], check=True)
    packages = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    imports = "; ".join(f"import hctrain.{m}" for m in modules() if m != "plotting")
    code = f"import hctrain; print(hctrain.__file__); {imports or 'pass'}"
    assert Path(run(tmp_path, python, "-W", "error", "-c", code).strip()).is_relative_to(packages)
    if "cli" in modules():
        assert "acs" in run(tmp_path, tmp_path / "venv/bin/hctrain", "--help")
