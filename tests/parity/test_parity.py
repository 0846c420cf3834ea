"""Our models against what the published implementations compute.

``VISTOK_PARITY_CASES`` names another folder of cases. A component without a runner fails: it is not skipped.
"""

import pytest
from harness import CASES, find_cases
from runners import RUNNERS

ALL = find_cases()


def test_there_are_cases():
    assert ALL, f"no parity cases below {CASES}"


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_parity(case):
    component = case.json["component"]
    assert component in RUNNERS, f"{case.name}: no runner for component {component!r}"
    problems = case.check(RUNNERS[component](case))
    assert not problems, f"{case.name}: " + "; ".join(problems)
