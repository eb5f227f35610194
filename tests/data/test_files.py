from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfgptopt.data import find_files, split_files, standard_library
from tfgptopt.data.files import BadBytes, TextFile, read_pieces


def test_files_folders_and_globs(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("a/one.txt", "a/two.md", "top.txt", ".hidden/no.txt"):
        (tmp_path / name).write_text(name, "utf-8")
    (tmp_path / "a/binary.bin").write_bytes(b"\0\1\2")
    (tmp_path / "a/empty.txt").write_bytes(b"")
    names = lambda source: [f.path.name for f in find_files(source)]  # noqa: E731
    assert names(tmp_path) == ["one.txt", "two.md", "top.txt"]
    assert names(str(tmp_path / "**" / "*.md")) == ["two.md"]
    assert names([tmp_path / "top.txt", tmp_path]) == ["top.txt", "one.txt", "two.md"]


def test_bad_sources(tmp_path):
    (tmp_path / "binary").write_bytes(b"text\0more")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="not text: it has zero bytes"):
        find_files(tmp_path / "binary")
    with pytest.raises(ValueError, match="text is empty"):
        find_files(tmp_path / "empty.txt")
    with pytest.raises(FileNotFoundError, match="no text file"):
        find_files(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no text file"):
        find_files(tmp_path)


def test_no_file_is_in_both_parts_and_the_split_is_stable():
    files = [TextFile(Path(f"/text/{i}.txt"), 0, 100 + i) for i in range(50)]
    training, validation = split_files(files, 0.2)
    assert not set(training) & set(validation)
    assert sorted([*training, *validation], key=str) == sorted(files, key=str)
    share = sum(f.size for f in validation) / sum(f.size for f in files)
    assert 0.2 <= share < 0.23
    assert split_files(files[::-1], 0.2)[1] == validation[::-1]
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        split_files(files, 1.5)


def test_a_single_file_is_cut_at_a_line_end(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {i}\n" for i in range(100)), "utf-8")
    (first,), (second,) = split_files(find_files(path), 0.1)
    assert first.stop == second.start and second.stop == path.stat().st_size
    assert next(read_pieces(second, BadBytes())).startswith("line 9")


@settings(deadline=None, max_examples=40)
@given(st.binary(min_size=1, max_size=300))
def test_text_is_read_as_python_does_with_replacement(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bytes") / "text"
    path.write_bytes(data)
    bad = BadBytes()
    text = "".join(read_pieces(TextFile(path, 0, len(data)), bad))
    valid = data.decode("utf-8", errors="surrogateescape")
    assert bad.count == sum("\udc80" <= c <= "\udcff" for c in valid)
    assert text == "".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in valid)


def test_long_text_comes_in_pieces(tmp_path):
    path = tmp_path / "long.txt"
    text = "äöü line\n" * 300_000
    path.write_text(text, "utf-8")
    pieces = list(read_pieces(find_files(path)[0], BadBytes()))
    assert len(pieces) > 2 and "".join(pieces) == text
    assert max(len(piece) for piece in pieces) < 2_000_000


def test_the_standard_library_is_there_without_tests_and_packages():
    files = standard_library()
    parts = {part for file in files for part in file.path.parts}
    assert len(files) > 300 and not parts & {"site-packages", "test", "tests"}
