"""One run on one allocation: input lines, plan, output, resume."""

from hpckv.workload.runfile import RunConfig, load_run

__all__ = ["RunConfig", "load_run"]
