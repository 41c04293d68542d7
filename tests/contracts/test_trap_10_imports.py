"""Trap 10: torch does not require numpy, and imports are paid for by everybody.

On this build torch without numpy warns once, at the first use. ``import pushforward`` brings in
nothing that run time does not need, and changes nothing that others can see.
"""

import importlib.metadata
import json
import subprocess
import sys

UNNEEDED = (
    "scipy",
    "matplotlib",
    "rich",
    "jinja2",
    "sklearn",
    "mlxtend",
    "safetensors",
    "PIL",
    "pandas",
    "torchvision",
    "timm",
    "IPython",
    "pushforward.report",
    "pushforward.cli",
)
PROBE = """
import json, sys, warnings
import torch
state, threads = torch.get_rng_state(), torch.get_num_threads()
before, filters = set(sys.modules), list(warnings.filters)
import pushforward
new = sorted(set(sys.modules) - before)
same = {
    "rng": torch.equal(state, torch.get_rng_state()),
    "threads": threads == torch.get_num_threads(),
    "grad": torch.is_grad_enabled(),
    "dtype": torch.get_default_dtype() == torch.float32,
    "filters": filters == list(warnings.filters),
}
print(json.dumps({"new": new, "same": same}))
"""
WITHOUT_NUMPY = """
import sys
sys.modules["numpy"] = None
import warnings
warnings.simplefilter("ignore")
import torch
try:
    import pushforward
except ImportError as error:
    print(error.name)
"""


def python(code: str, *flags: str) -> str:
    """What a fresh interpreter prints; a warning there is an error here."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    return done.stdout


def test_importing_brings_in_nothing_unneeded():
    report = json.loads(python(PROBE, "-W", "error::UserWarning:pushforward"))
    unneeded = [
        name
        for name in report["new"]
        if any(name == each or name.startswith(f"{each}.") for each in UNNEEDED)
    ]
    assert not unneeded
    assert all(report["same"].values()), report["same"]


def test_numpy_is_required_and_named():
    """Torch imports without it; sets, patterns and colours are arrays of it, so it is declared."""
    required = [each.split(">")[0] for each in importlib.metadata.requires("pushforward") or ()]
    assert "numpy" in required
    assert python(WITHOUT_NUMPY) == "numpy\n"
