"""File names are read correctly under any locale, or refused. The console keeps its own encoding."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import write_folder
from running import environment

from kfood_dist import cli
from kfood_dist.errors import LaunchError
from kfood_dist.launch import ranks
from kfood_dist.launch import start as launch
from kfood_dist.pack.sources import scan
from kfood_dist.system import utf8
from kfood_dist.system.files import write_atomically
from kfood_dist.system.utf8 import as_utf8

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def korean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment variables of a console in EUC-KR."""
    folder = tmp_path_factory.mktemp("locales")
    if not shutil.which("localedef"):
        pytest.skip("this system has no localedef")
    subprocess.run(["localedef", "-i", "ko_KR", "-f", "EUC-KR", folder / "ko_KR.EUC-KR"], check=False)
    if not (folder / "ko_KR.EUC-KR").is_dir():
        pytest.skip("the localedef of this system has no ko_KR")
    return {"LOCPATH": str(folder), "LC_ALL": "ko_KR.EUC-KR", "PYTHONUTF8": "0"}


def run(words: list[str | bytes], variables: dict[str, str], cwd: Path) -> "subprocess.CompletedProcess[bytes]":
    env = {name: value for name, value in environment().items() if name not in ("LANG", "PYTHONIOENCODING")}
    command = [sys.executable, *words]
    return subprocess.run(command, env=env | variables, cwd=cwd, capture_output=True, timeout=120, check=False)


def pack(source: str | bytes, out: str | bytes, workers: str, variables: dict[str, str], cwd: Path) -> bytes:
    words = ["--image-size", "32", "--split", "0.6,0.2,0.2", "--workers", workers]
    done = run(["-m", "kfood_dist", "pack", source, out, *words], variables, cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_folder_is_packed_the_same_under_any_locale(tmp_path: Path, korean: dict[str, str]) -> None:
    """The arguments may be in UTF-8 or in the encoding of the locale."""
    write_folder(tmp_path / "음식", {"구이/갈비구이": 4, "회/육회": 4})
    pack("음식", "결과", "1", ASCII, tmp_path)
    output = pack("음식", "다른 결과".encode("euc_kr"), "2", korean, tmp_path)
    assert "다른 결과".encode("euc_kr") in output
    first, second = ((tmp_path / out / "manifest.json").read_bytes() for out in ("결과", "다른 결과"))
    assert [c["name"] for c in json.loads(first)["classes"]] == ["갈비구이", "육회"]
    assert first == second
    done = run(["-m", "kfood_dist", "verify", "결과".encode("euc_kr")], korean, tmp_path)
    assert (done.returncode, done.stdout.split(b":")[0]) == (0, "결과".encode("euc_kr"))


def test_a_program_that_calls_the_library_is_refused_under_another_locale(
    tmp_path: Path, korean: dict[str, str]
) -> None:
    write_folder(tmp_path / "갈비구이", {"a": 1})
    for variables, encoding in ((ASCII, "ascii"), (korean, "euc_kr")):
        call = "from kfood_dist.cli import main; raise SystemExit(main(['pack', '.', 'out']))"
        done = run(["-c", call], variables, tmp_path)
        assert done.returncode == 2
        assert f"kfood: Python reads the names of files as {encoding}, not as UTF-8".encode() in done.stderr
        assert b"PYTHONUTF8=1" in done.stderr
        scanning = "from pathlib import Path; from kfood_dist.pack.sources import scan; scan(Path('.'))"
        assert b"LaunchError: " in run(["-c", scanning], variables, tmp_path).stderr


@pytest.mark.parametrize("main", [cli.main, launch.main, ranks.main])
def test_each_program_restarts_itself_once_with_its_arguments(
    main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]
    started = []

    def execute(*how) -> None:
        started.append(how)
        raise SystemExit(0)

    monkeypatch.setattr(utf8, "names_are_utf8", lambda: False)
    monkeypatch.setattr(os, "execvpe", execute)
    monkeypatch.setattr(utf8.locale, "getencoding", lambda: "EUC-KR")
    for name in ("PYTHONUTF8", "PYTHONIOENCODING"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit):
        main()
    ((program, command, variables),) = started
    assert program == command[0] == words[0]
    assert command[1:] == [b"-X", b"utf8", *words[1:]]
    assert (variables[b"PYTHONUTF8"], variables[b"PYTHONIOENCODING"]) == (b"1", b"euc_kr:backslashreplace")
    monkeypatch.setenv("PYTHONUTF8", "1")  # as after a restart that did not help
    if main is ranks.main:
        with pytest.raises(LaunchError, match="not as UTF-8"):
            main()
    else:
        assert main() == 2
        assert "not as UTF-8 → start Python with PYTHONUTF8=1" in capsys.readouterr().err
    assert len(started) == 1


def test_library_calls_are_refused_if_names_are_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utf8, "names_are_utf8", lambda: False)
    assert cli.main(["verify", str(tmp_path)]) == 2
    assert launch.main(["train", "recipe.yaml"]) == 2
    with pytest.raises(LaunchError, match="not as UTF-8"):
        scan(tmp_path)


def test_arguments_in_the_locales_encoding_become_utf8_unless_they_name_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there = "국".encode("euc_kr")
    os.mkdir(there)
    words = [b"pack", "구이".encode("euc_kr"), there, "구이".encode(), b"\xff", "run.dir=가".encode("euc_kr")]
    expected = [b"pack", "구이".encode(), there, "구이".encode(), b"\xff", "run.dir=가".encode()]
    assert as_utf8(words, "EUC-KR") == expected
    assert as_utf8(words, "no such encoding") == words


def test_a_path_that_is_not_utf8_is_kept_in_json(tmp_path: Path) -> None:
    path = os.fsdecode(b"/data/\xb1\xb8")
    write_atomically(tmp_path / "run.json", json.dumps({"command": [path]}, ensure_ascii=False))
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"command": [path]}
