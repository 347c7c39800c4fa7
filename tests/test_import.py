"""Importing hctrain is cheap: torch, numpy and the standard library, whatever else is installed."""
import json
import subprocess
import sys

import pytest
from chapters import ROOT, modules

NEW = """
import json, sys, torch
before = set(sys.modules)
import {names}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def loaded(names):
    done = subprocess.run([sys.executable, "-W", "error", "-c", NEW.format(names=names)], cwd=ROOT, check=True,
                          stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


EVERY = ", ".join(["hctrain"] + [f"hctrain.{m}" for m in modules() if m != "plotting"])


@pytest.mark.parametrize("names", ["hctrain", EVERY], ids=["package", "modules"])
def test_loads_only_torch_and_numpy(names):
    new = loaded(names)
    assert "hctrain" in new
    foreign = {m.split(".")[0] for m in new} - {"hctrain", "torch", "numpy"} - sys.stdlib_module_names
    assert not foreign
    assert "torch._dynamo" not in new  # 1.5 s; torch.optim imports it when the first optimizer is made
