"""Names of files in an output folder that more than one room has to know, without importing who writes them."""

from __future__ import annotations

__all__ = ["REPORT", "ROUTING"]

REPORT = "merge_report.html"
ROUTING = "routing.json"
