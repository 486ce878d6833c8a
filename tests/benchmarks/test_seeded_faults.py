"""The faults of benchmarks/seeded_faults.py can still be put in."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("faults", ROOT / "benchmarks" / "seeded_faults.py")
seeded_faults = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(seeded_faults)


@pytest.mark.parametrize("fault", seeded_faults.FAULTS, ids=lambda fault: fault.name)
def test_a_fault_has_its_line_and_its_tests(fault):
    assert seeded_faults.outdated(fault, ROOT) == []
