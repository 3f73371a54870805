"""merge_report.html: what a merge did, to look at. Facts (``data``), numbers to draw (``grids``), words, charts, page.

Here: everything about the page. Not here: figures, which are gathered while merging (``execute``) and pooled in
``output.stats``. To add a heat map, add a grid; the page shows whatever there is.
"""

from mergekit.output.names import REPORT, ROUTING
from mergekit.output.report.charts import check_drawable
from mergekit.output.report.data import AFTER, BEFORE, ReportData, report_data
from mergekit.output.report.grids import Grid
from mergekit.output.report.page import figures, page, render

__all__ = [
    "AFTER",
    "BEFORE",
    "REPORT",
    "ROUTING",
    "Grid",
    "ReportData",
    "check_drawable",
    "figures",
    "page",
    "render",
    "report_data",
]
