"""What tests of markup read it by."""

from html.parser import HTMLParser


class Tags(HTMLParser):
    """The elements of some markup, with their attributes, and its text."""

    def __init__(self, markup):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data
