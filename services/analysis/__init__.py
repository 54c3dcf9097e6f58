"""Statistics of stored runs: scores with intervals, and comparisons of runs.

Importing it takes most of a second, because of scipy; a command imports it when it needs it.
"""

from services.analysis.comparison import Comparison, compare_runs
from services.analysis.outcomes import LabelCodes, RunOutcomes, read_outcomes

__all__ = ["Comparison", "LabelCodes", "RunOutcomes", "compare_runs", "read_outcomes"]
