"""The sections of the HTML page; `page` puts them together."""
