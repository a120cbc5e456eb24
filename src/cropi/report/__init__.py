"""Reports: one self-contained HTML page, its Markdown twin, and a summary in JSON."""
