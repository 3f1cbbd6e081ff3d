"""No page prints a line that nobody has tried: each one is a step of the reader in `steps`, or says why not."""

import pytest

from tests.docs.printed import printed_lines
from tests.docs.steps import ELSEWHERE, STEPS

USAGE = "uv run jobs/pipeline.py [PRESET]"
"""A pattern of lines, and none itself."""


@pytest.mark.parametrize("printed", printed_lines(), ids=lambda printed: f"{printed.page}: {printed.line[:80]}")
def test_a_printed_line_is_run_or_says_why_not(printed):
    known = {step.line for step in STEPS} | set(ELSEWHERE)
    assert printed.line in known or printed.line.startswith(USAGE)


def test_nothing_is_run_that_no_page_prints():
    printed = {line.line for line in printed_lines()}
    assert {step.line for step in STEPS} | set(ELSEWHERE) <= printed
