"""Importing fallow is cheap and changes nothing for the rest of the program."""

import json
import statistics
import subprocess
import sys

EXTRAS = "timm transformers torchvision sklearn matplotlib rich typer jinja2 joblib PIL safetensors".split()

COST = """
import time
import torch
before = time.process_time()
import fallow
print(time.process_time() - before)
"""

# Everything a library could change behind a program's back, before and after its import.
SIDE_EFFECTS = """
import json, logging, os, random, signal, sys, threading, warnings
import numpy, torch

def state():
    loggers = {name: (logger.level, logger.propagate, len(logger.handlers))
               for name, logger in logging.root.manager.loggerDict.items()
               if isinstance(logger, logging.Logger) and (not known or name in known)}
    return {
        "random": hash(random.getstate()),
        "numpy": numpy.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()),
        "defaults": (str(torch.get_default_dtype()), str(torch.get_default_device()), torch.is_grad_enabled(),
                     torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "root logger": (logging.root.level, len(logging.root.handlers)),
        "loggers": loggers,
        "warnings": len(warnings.filters),
        "environment": dict(os.environ),
        "interrupt": str(signal.getsignal(signal.SIGINT)),
        "hooks": (str(sys.excepthook), len(sys.meta_path), sys.path),
    }

known = set()
before = state()
known = set(before["loggers"])
import fallow
after = state()
changed = [key for key in before if before[key] != after[key]]
print(json.dumps({"changed": changed, "modules": sorted(sys.modules)}))
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_importing_adds_little_to_importing_torch():
    """Processor time of the import alone, the middle of three, so that a busy machine does not count."""
    assert statistics.median(float(run(COST)) for _ in range(3)) < 0.1


def test_importing_changes_nothing_and_brings_no_extra_along():
    found = json.loads(run(SIDE_EFFECTS))
    assert found["changed"] == []
    assert [name for name in EXTRAS if name in found["modules"]] == []
