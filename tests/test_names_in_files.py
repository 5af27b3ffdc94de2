import json
import os
import socket

import pytest

from transfer.core.files import read_names, read_text, write_names

ORDINARY = [
    "a.jpg",
    "b c/ü.png",
    "C:\\d\\n.jpg",
    "back\\nslash.jpg",
    '"quoted"',
    '"half',
    "",
    "[1]",
    "\\",
]
ODD = [
    "new\nline",
    "r\rn\r\n",
    "\u2028",
    "\u2029",
    "\x85",
    "\v\f",
    "\x1c",
    "\x1b[31m",
    "\0",
    "\udcff.jpg",
]


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_names_are_written_unchanged(tmp_path, name):
    write_names(tmp_path / "names.txt", [name, name])
    assert (tmp_path / "names.txt").read_bytes() == f"{name}\n{name}\n".encode()
    assert read_names(tmp_path / "names.txt") == [name, name]


@pytest.mark.parametrize("name", ODD)
def test_names_with_special_characters_round_trip(tmp_path, name):
    nested = [name, json.dumps(name), json.dumps(json.dumps(name)), f"a{name}\\", '"' + name + '"']
    write_names(tmp_path / "names.txt", nested)
    text = (tmp_path / "names.txt").read_bytes().decode()
    assert len(text.splitlines()) == len(nested)
    assert text.replace("\n", "").isprintable()
    assert read_names(tmp_path / "names.txt") == nested


def test_lists_of_other_programs_are_read(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("a\u2028b.jpg\nc\x85d\n\x0b".encode())  # as written by older versions
    assert read_names(path) == ["a\u2028b.jpg", "c\x85d", "\v"]
    path.write_bytes(b"from\r\nWindows\r\n")
    assert read_names(path) == ["from", "Windows"]
    path.write_bytes(b'"\\u0061"\n"[\n"\n')  # JSON that this program would not have written
    assert read_names(path) == ['"\\u0061"', '"[', '"']
    path.write_bytes(b"")
    assert read_names(path) == []


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def unix_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # socket paths must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def sparse(path):
    path.touch()
    os.truncate(path, 2**40)


@pytest.mark.timeout(120)  # some are endless
@pytest.mark.parametrize("make", [pipe, device, unix_socket, sparse, os.mkdir])
def test_text_is_read_from_small_regular_files_only(tmp_path, make):
    path = tmp_path / "names.txt"
    make(path)
    for read in (read_names, lambda path: read_text(path, 10)):
        with pytest.raises((ValueError, OSError), match="names.txt"):
            read(path)


def test_read_text_accepts_the_maximum_size(tmp_path):
    path = tmp_path / "text"
    path.write_text("üa", encoding="utf-8")
    assert read_text(path, 3) == "üa"
    with pytest.raises(ValueError, match="more than the 2 bytes"):
        read_text(path, 2)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not a UTF-8 text file"):
        read_text(path, 9)
