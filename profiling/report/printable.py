"""Text from compiled programs made safe to show."""


def printable(text: str) -> str:
    r"""Write out what cannot be seen, starts a new line, or reorders the text around it.

    Args:
      text: anything, as found in a dump from anywhere.

    Returns:
      The text with the escapes that `repr` has for such characters; the same where it has none.

    Example:
      >>> print(printable("a\x1b[31m\u202eb"))
      a\x1b[31m\u202eb
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
