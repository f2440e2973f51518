"""The console may lose characters, its reader or its terminal: the work continues, and log.txt has every line."""

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import ROOT, environment

from kfood_dist.evaluate.predict import json_line

# Prints more than a pipe can hold, in every way to write to a console. Exit status 7 shows that it reached its end.
TALKS = """
import logging, sys, warnings
from tqdm import tqdm
from kfood_dist.system import console

console.best_effort(waits=False)
for n in tqdm(range(3000), "bar", disable=False, mininterval=0):
    print(f"line {n} – 갈비찜 🍚 \\udcff", flush=n % 2 == 0)
    print("error – 갈비찜", file=sys.stderr)
warnings.warn("a warning – 갈비찜")
logging.error("a record – 갈비찜")
sys.stdout.buffer.write(b"bytes")
raise SystemExit(7)
"""


def run(code: str, redirect: str = "", **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run `code` in a new Python, with a shell's redirection."""
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {redirect}', sys.executable, code],
        capture_output=True,
        text=True,
        errors="replace",
        env=environment() | variables,
        timeout=60,
        check=False,
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    "redirect",
    ["2>&1 | head -2", "2>&1 | true", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>&1", "1</dev/null 2<&1"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "euc-kr:strict"])
def test_work_continues_when_the_console_cannot_be_written(redirect: str, encoding: str) -> None:
    done = run(TALKS, redirect, PYTHONIOENCODING=encoding)
    assert done.returncode == 7
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8:strict", "– 갈비찜 🍚 \\udcff"),
        ("euc-kr:strict", "\\u2013 갈비찜 \\U0001f35a \\udcff"),
        ("ascii:strict", "\\u2013 \\uac08\\ube44\\ucc1c \\U0001f35a \\udcff"),
    ],
)
def test_characters_missing_in_an_encoding_are_shown_as_escapes(encoding: str, shown: str) -> None:
    code = "from kfood_dist.system import console; console.best_effort(); print('– 갈비찜 🍚 \\udcff')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=environment() | {"PYTHONIOENCODING": encoding}, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(encoding.split(":")[0]) == shown + "\n"


def test_work_continues_when_the_terminal_closes() -> None:
    ours, theirs = pty.openpty()
    code = "import time; from kfood_dist.system import console; console.best_effort(); print('on', flush=True)\n"
    code += "input()\nfor _ in range(1000): print('line', flush=True)\nraise SystemExit(7)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs, env=environment(), cwd=ROOT
    )
    os.close(theirs)
    assert os.read(ours, 10).startswith(b"on")
    os.close(ours)
    assert process.stdin is not None
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 7


def test_a_paused_reader_does_not_block_training_and_a_slow_one_gets_all_other_output() -> None:
    code = "import sys; from kfood_dist.system import console; console.best_effort(waits=sys.argv[1] == 'waits')\n"
    code += "for _ in range(20_000): print('a line of some twenty')"
    start = [sys.executable, "-c", code]
    paused = subprocess.Popen([*start, "goes on"], stdout=subprocess.PIPE, env=environment(), cwd=ROOT)
    assert paused.wait(timeout=60) == 0
    assert paused.stdout is not None
    paused.stdout.close()
    slow = subprocess.Popen([*start, "waits"], stdout=subprocess.PIPE, env=environment(), cwd=ROOT)
    time.sleep(2)
    assert slow.poll() is None
    assert len(slow.communicate(timeout=60)[0].splitlines()) == 20_000 and slow.returncode == 0


def test_no_file_takes_the_descriptor_of_a_closed_console(tmp_path: Path) -> None:
    """Otherwise the output of a library or a child to descriptor 1 would go into the next file that is opened."""
    code = "import os, subprocess; from kfood_dist.system import console; console.best_effort()\n"
    code += f"file = open({str(tmp_path / 'shard')!r}, 'wb', buffering=0)\n"
    code += "print('printed', flush=True); os.write(1, b'of a library'); subprocess.run(['echo', 'of a child'])\n"
    code += "file.write(b'data')"
    assert run(code, "<&- >&- 2>&-").returncode == 0
    assert (tmp_path / "shard").read_bytes() == b"data"


def test_the_log_has_every_line_that_the_console_had_or_lost(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    code = TALKS.replace("range(3000)", "range(3)").replace(
        "raise SystemExit(7)", f"console.show('logged already'); raise RuntimeError('the end – 갈비찜 {tmp_path}')"
    )
    code = code.replace(
        "waits=False)\n", f"waits=False); import pathlib; console.keep_in(pathlib.Path({str(log)!r}))\n"
    )
    assert run(code, ">&- 2>&-", PYTHONIOENCODING="ascii:strict").returncode == 1
    lines = [line.split(" ", 2)[2] for line in log.read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if line.startswith("line")] == [f"line {n} – 갈비찜 🍚 \\udcff" for n in range(3)]
    assert lines.count("error – 갈비찜") == 3 and "logged already" not in lines
    assert not any("bar: " in line for line in lines)
    assert any(line.endswith("a warning – 갈비찜") for line in lines)
    assert lines[-1] == f"RuntimeError: the end – 갈비찜 {tmp_path}" and "Traceback (most recent call last):" in lines


def test_an_unwritable_output_is_a_fault_and_a_reader_that_closes_is_not(tiny_shards: Path) -> None:
    order = (
        f"import sys; from kfood_dist.cli import main; sys.exit(main(['order', {str(tiny_shards)!r}, '--epoch', 'E']))"
    )
    done = run(order.replace("'E'", "'0'"), "> /dev/full")
    assert done.returncode == 2
    assert (
        done.stderr
        == "kfood order: the output cannot be written (No space left on device) → write it to another place\n"
    )
    for words in ("order", "predict"):
        helped = run(f"from kfood_dist.cli import main; main(['{words}', '--help'])", "| true")
        assert (helped.returncode, helped.stderr) == (0, "")


def test_a_json_line_is_valid_json_in_every_encoding() -> None:
    value = {"image": "\udcff café.jpg", "name": "갈비찜"}
    for encoding in ("utf-8", "ascii", "euc-kr", None):
        assert json.loads(json_line(value, encoding)) == value
    assert json_line({"name": "갈비찜"}, "euc-kr") == '{"name": "갈비찜"}'
