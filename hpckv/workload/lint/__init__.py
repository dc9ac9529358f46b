"""What in a file of prompts breaks prefix reuse, and what each costs: found by repairing it and planning again. No torch."""

from hpckv.workload.lint.costs import PrefixCosts
from hpckv.workload.lint.fix import check_target, copy_repaired, difference_lines
from hpckv.workload.lint.prompts import Prompt, read_prompts
from hpckv.workload.lint.report import DETECTORS, Finding, Report, lint, safely_repaired

__all__ = [
    "DETECTORS",
    "Finding",
    "PrefixCosts",
    "Prompt",
    "Report",
    "check_target",
    "copy_repaired",
    "difference_lines",
    "lint",
    "read_prompts",
    "safely_repaired",
]
