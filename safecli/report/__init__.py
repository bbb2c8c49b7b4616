"""What an evaluation found: one self-contained HTML page, and the headline as a Markdown table."""

from safecli.report.headline import markdown_table
from safecli.report.page import write_report

__all__ = ["markdown_table", "write_report"]
