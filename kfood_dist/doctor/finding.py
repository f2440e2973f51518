"""What a check of `kfood doctor` found."""

from dataclasses import dataclass

OK, WARN, FAULT = "OK", "WARN", "FAULT"


@dataclass(frozen=True)
class Finding:
    """One result of a check: its level, what was found, and the remedy unless all is well."""

    level: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<5} {self.what}" + (f" → {self.remedy}" if self.remedy else "")
