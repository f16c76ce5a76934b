"""What is told through PyTorch's logs and structured traces of each graph that goes through the passes.

Importing this registers the names ``mctf`` (all loggers of this package) and ``mctf_graphs`` for
``torch._logging.set_logs(modules={...})``.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from functools import partial

from torch import fx

from mctf_compile.compat import artifact_log, register_log, trace_artifact
from mctf_compile.passes import State
from mctf_compile.report import Report

for _name in ("mctf", "mctf_compile"):
    register_log(_name, "mctf_compile")
log = logging.getLogger(__name__)
graphs_log = artifact_log(__name__, "mctf_graphs", "The graphs that mctf fuses tokens in, before and after.")


def tell(state: State, report: Report) -> None:
    """Log a line (INFO) and the blocks (DEBUG) of a graph, and put its report and graphs into the trace."""
    if log.isEnabledFor(logging.INFO):
        log.info("%s", line(report))
    if log.isEnabledFor(logging.DEBUG):
        for text in (*map(str, report.blocks), *(f"unmerged before {where}" for where in report.unmerged)):
            log.debug("%s", text)
    graphs = {"before": state.normal, "after": state.result if report.fused else None}
    for name, gm in graphs.items():
        if gm is not None:
            if graphs_log.isEnabledFor(logging.DEBUG):
                graphs_log.debug("%s fusion:\n%s", name, _readable(gm))
            trace_artifact(f"mctf_graph_{name}", "string", partial(_readable, gm))
    trace_artifact("mctf_report", "json", lambda: json.dumps(report.to_dict(), indent=1))


def line(report: Report) -> str:
    """What fuses, why the rest does not, what that saves, and the time of each pass, in one line."""
    reasons = Counter(block.reason for block in report.blocks if block.reason is not None)
    parts = [report.summary, *(f"{count} dense: {reason}" for reason, count in reasons.items() if report.fused)]
    spent = ", ".join(f"{name} {seconds:.2f}" for name, seconds in report.seconds.items())
    return "; ".join([*parts, f"{sum(report.seconds.values()):.2f} s ({spent})"])


def _readable(gm: fx.GraphModule) -> str:
    return gm.print_readable(print_output=False)
