"""Numbers with their nouns, as messages need them."""


def plural(number: int, noun: str, several: str = "") -> str:
    """`1 fault`, `2 faults`; `several` is the plural where it is not the noun and an s."""
    return f"{number:,} {noun if number == 1 else several or noun + 's'}"
