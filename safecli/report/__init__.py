"""What an evaluation found: a self-contained HTML page, the headline as Markdown, and the gates as JUnit."""

from safecli.report.headline import markdown_summary, markdown_table
from safecli.report.junit import write_junit
from safecli.report.page import write_report

__all__ = ["markdown_summary", "markdown_table", "write_junit", "write_report"]
