"""`prime`, `complete` and `inspect` as their user gives them: on the base that comes along, in this process."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launch import complete, inspect_memory, prime
from titans_ds import TitansModel, assets
from titans_ds.memory import MemoryState

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


ADAPTER = assets.adapter("hybrid")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files that are read, one with an unfinished name, and three that can't or shouldn't be read."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "deep").mkdir()
    (folder / "deep" / "shapes.py").write_text("def area_of(width, height):\n    return width * height\n" * 12)
    (folder / "top.py").write_text("from deep.shapes import area_of\n\n\nprint(area_of(2, 3))\n" * 8)
    (folder / "use.py").write_text("from deep.shapes import area_of\n# </script><b>\nprint(area_of(4, 5))\n" * 4)
    (folder / "bytes.py").write_bytes(b"\xff\xfe\x00")
    (folder / "notes.txt").write_text("not read\n")
    (folder / "link.py").symlink_to("/etc/hostname")
    return folder


def test_a_repository_is_read_once_and_completed_from_anywhere(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "repo.memory"
    assert prime.main([str(repository), "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["files"], said["tokens_left_out"], said["bytes"]) == (3, 0, out.stat().st_size)
    state, about = MemoryState.load(out)
    assert about["adapter"] == str(ADAPTER)
    assert float(state.layers[7]["matrices"].abs().max()) > 0
    # The repository is not needed any more, nor is its folder; FILE's end is the prompt.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.py").write_text("from deep.shapes import area_of\nprint(area_")
    command = ["--memory", str(out), "--max-new-tokens", "6"]
    assert complete.main([*command, "file.py", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 6
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from deep.shapes import area_of\nprint(area_")))
    assert complete.main([*command, "-"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == found["completion"].rstrip("\n")
    assert complete.main([*command, "file.py", "--off"]) == 0
    # A file of ours may be written again; whatever else lies there stays.
    assert prime.main([str(repository), "--out", str(out), "--max-tokens", "50"]) == 0
    assert "read 1 files, 50 tokens" in capsys.readouterr().out
    assert prime.main([str(repository), "--out", "file.py"]) == 2
    assert "print(area_" in (tmp_path / "file.py").read_text()


def test_what_cannot_be_read_is_said_in_one_message(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "x")
    mistakes = [
        (prime, [str(tmp_path / "absent"), "--out", out], "absent can't be read"),
        (prime, [str(repository / "bytes.py"), "--out", out], "is not UTF-8 text"),
        (prime, [str(repository), "--suffix", ".rs", "--out", out], "no text to read"),
        (prime, [str(repository), "--out", out, "--device", "tpu"], "--device 'tpu'"),
        (prime, [str(repository), "--out", out, "--adapter", str(repository)], "adapter"),
        (complete, [str(repository / "top.py"), "--memory", str(repository / "notes.txt")], "not a readable memory"),
        (
            inspect_memory,
            ["--read", str(repository / "top.py"), "--text", str(repository / "top.py")],
            "also in --read",
        ),
        (inspect_memory, ["--read", str(repository), "--text", str(repository / "gone.py")], "can't be read"),
    ]
    for module, arguments, expected in mistakes:
        if module is inspect_memory:
            arguments = [*arguments, "--out", out]
        assert module.main(arguments) == 2, arguments
        captured = capsys.readouterr()
        assert expected in captured.err
        assert "Traceback" not in captured.err
    assert not Path(out).exists()


class Tags(HTMLParser):
    """The tags that a page has."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)


def inspect(repository: Path, out: Path) -> None:
    command = ["--read", str(repository), "--text", str(repository / "use.py"), "--other", str(repository / "top.py")]
    assert inspect_memory.main([*command, "--out", str(out), "--json"]) == 0


def data_of(page: Path) -> dict:
    return json.loads(re.search(r"const data = (\{.*\});\n", page.read_text())[1])


def test_the_page_holds_what_the_model_does(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "memory.html"
    inspect(repository, page)
    said = json.loads(capsys.readouterr().out)
    data = data_of(page)
    # The text itself is not read; text from files can't end the script.
    assert [file["name"] for file in data["read"]] == ["top.py", "deep/shapes.py"]
    assert page.read_text().count("</script>") == 1
    parser = Tags()
    parser.feed(page.read_text())
    assert not parser.tags & {"link", "img", "iframe"}
    assert "http" not in page.read_text().replace("http://www.w3.org/2000/svg", "")
    # The mean losses are those of `compare`, and an empty memory of this kind is the base model.
    assert said["own"] == pytest.approx(sum(data["losses"]["own"]) / said["tokens"])
    assert said["empty"] == pytest.approx(said["ablated"], abs=2e-3)
    assert said["own"] != said["ablated"]
    model = TitansModel.from_pretrained(assets.base(), ADAPTER)
    assert [layer["index"] for layer in data["layers"]] == model.layer_indices
    for layer in data["layers"]:
        assert len(layer["written"]) == len(layer["held"]) == said["read_tokens"]
        assert len(layer["recalled"]) == said["tokens"]
        assert all(0 <= place < said["read_tokens"] for read in layer["recalled"] for place, _ in read)
    # A page of ours may be written again.
    inspect(repository, page)


def test_the_memory_that_comes_along_remembers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """This project's own code, which it has never seen: a file is likelier with the memory of the others of its folder
    than with another's or none, though nothing of it was read."""
    folder = Path(prime.__file__).parents[1] / "data_prep" / "sources"
    command = ["--read", str(folder), "--text", str(folder / "archives.py"), "--text-tokens", "400"]
    assert inspect_memory.main([*command, "--out", str(tmp_path / "memory.html"), "--json"]) == 0
    losses = json.loads(capsys.readouterr().out)
    assert losses["wrong"] - losses["own"] > 0.05
    assert losses["ablated"] > losses["own"]


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; apt-get install chromium")
def test_the_page_in_a_browser(repository: Path, tmp_path: Path) -> None:
    """2,000 tokens and more, in headless Chromium: no error, scripting within 3 seconds, and a picture of the page."""
    repository = Path(shutil.copytree(repository, tmp_path / "larger", symlinks=True))
    (repository / "many.py").write_text("".join(f"def name_{n}(value):\n    return value + {n}\n" for n in range(200)))
    page = tmp_path / "memory.html"
    inspect(repository, page)
    assert sum(len(file["tokens"]) for file in data_of(page)["read"]) > 2000
    words = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1500",
    ]  # fmt: skip
    shown = subprocess.run([*words, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    assert "CONSOLE" not in shown.stderr
    milliseconds = re.search(r'data-milliseconds="(\d+)"', shown.stdout)
    assert milliseconds is not None, shown.stdout[-2000:]
    assert int(milliseconds[1]) < 3000
    assert re.search(r"On this text, its own memory is worth .* nats a token", shown.stdout)
    assert shown.stdout.count('class="recalled"') >= 1
    picture = tmp_path / "memory.png"
    subprocess.run([*words, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=300, check=True)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000
