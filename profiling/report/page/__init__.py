"""The sections of the HTML page; `txcore.profiling.report.html` puts them together."""
