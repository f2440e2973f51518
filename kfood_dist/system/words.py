"""Numbers with their nouns, for messages."""


def plural(number: int, noun: str, several: str = "") -> str:
    """Return `1 fault` or `2 faults`. `several` is the plural of a noun that does not just add an s."""
    return f"{number:,} {noun if number == 1 else several or noun + 's'}"
