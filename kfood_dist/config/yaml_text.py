"""YAML as recipes use it: no text becomes a number, a date, a truth value or a comment by accident.

    a file's text ──► read_file_text ──► tree ──► write_tree ──► text that every YAML reader reads the same way
    `--set`: a text key ──► read_text ──► what was typed;   any other key ──► read_value ──► number, list, …

YAML 1.1 reads 010 as 8, 1:30 as 90, yes as true and 2024-01-01 as a date. Here they stay text, and the types of
the recipe decide what they mean. Null, true, false and decimal numbers keep their meaning.
"""

import re
from typing import Any

import yaml

_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z")
_FLOAT = re.compile(
    r"(?:[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)
_STR_TAG, _FLOAT_TAG = "tag:yaml.org,2002:str", "tag:yaml.org,2002:float"

# Matches a text that is one YAML scalar in quotes and nothing else.
_QUOTED = re.compile(r"""\s*(?:"(?:[^"\\]|\\.)*"|'(?:[^']|'')*')\s*\Z""", re.DOTALL)
_ORDINARY_COMMENT = " \t\r\n\0#"  # may follow the # of an intended comment


class UnclearText(yaml.YAMLError):
    """A text that YAML would cut short without a warning. str() says where and why."""


class _FileLoader(yaml.SafeLoader):
    def scan_plain(self) -> Any:
        token = super().scan_plain()
        follows = self.peek() == "#" and self.line == token.end_mark.line and self.peek(1) not in _ORDINARY_COMMENT
        if follows and self.resolve(yaml.ScalarNode, token.value, (True, False)) == _STR_TAG:
            raise UnclearText(
                f"line {self.line + 1}: YAML ends the text at `{token.value}`, because ` #` begins a comment"
            )
        return token

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Raise MarkedYAMLError if a key is given twice: YAML would drop the first one without a warning."""
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if any(key.value == earlier.value for earlier in keys[:i]):
                raise yaml.MarkedYAMLError(problem=f"`{key.value}` is given twice", problem_mark=key.start_mark)
        return node


class _ValueLoader(_FileLoader):
    """A loader for one value on a command line, where nobody writes comments."""

    def scan_to_next_token(self) -> None:
        while self.peek() in " \t":
            self.forward()
        if self.peek() == "#":
            raise UnclearText("` #` begins a comment in YAML")
        super().scan_to_next_token()


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes each text that YAML 1.1 or this module would read as another type."""


_FileLoader.yaml_implicit_resolvers = {}
_FileLoader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_FileLoader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_FileLoader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_FileLoader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+.0123456789"))
_FileLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<\Z"), ["<"])
_ValueLoader.yaml_implicit_resolvers = _FileLoader.yaml_implicit_resolvers
_Dumper.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+.0123456789"))


def read_file_text(text: str) -> Any:
    """Return the tree of a recipe file. Raises yaml.YAMLError, ValueError or RecursionError."""
    return yaml.load(text, _FileLoader)


def read_value(text: str) -> Any:
    """Return a number, truth value, list or similar, as typed after `--set KEY=`. Raises as `read_file_text` does."""
    return yaml.load(text, _ValueLoader)


def read_text(text: str) -> str:
    """Return the value of a text key as typed. Removes YAML quotes around the complete value. Raises yaml.YAMLError."""
    if not _QUOTED.match(text):
        return text
    quoted = text.strip()
    if quoted.startswith("'"):
        return quoted[1:-1].replace("''", "'")
    return yaml.load(quoted.replace("\n", "\\n"), yaml.BaseLoader)  # YAML would fold a line break into a space


def write_tree(tree: dict[str, Any]) -> str:
    """Return YAML from which `read_file_text` makes the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, allow_unicode=True, sort_keys=False)
