"""Downloads that nobody states a hash of: their size, and what an archive may contain."""

import gzip
import io
import tarfile
from dataclasses import replace

import pytest

from transfer.core.files import lock
from transfer.vgg.published import download

SLIM = download.PUBLISHED["vgg16-slim"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Weights of a network with few parameters, without a hash."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    weights = download.Weights(replace(SLIM.entry, network="vgg_small", num_classes=7))
    weights.path.parent.mkdir(parents=True)
    return weights


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_page_with_an_error_is_not_taken_for_weights(small, monkeypatch):
    class Response(io.BytesIO):
        status, headers = 200, {}

    monkeypatch.setattr(download, "_opened", lambda _: Response(b"<html>not found</html>"))
    small.path.write_bytes(b"version https://git-lfs.github.com/spec/v1")  # of another time
    with pytest.raises(ValueError, match=r"\(its size of 22 bytes differs\); it was deleted"):
        download.download(small)
    assert not small.path.with_name(f"{small.path.name}.part").exists()
    assert small.difference(small.path)
    small.path.write_bytes(bytes(small.min_bytes))
    assert not small.difference(small.path)


def test_second_download_waits_for_the_first(small, monkeypatch):
    first = lock(small.path.with_name(f"{small.path.name}.lock"))
    first.acquire()
    said = []

    def wait(line):
        said.append(line)
        small.path.write_bytes(bytes(small.min_bytes))
        first.release()

    monkeypatch.setattr(download.logger, "info", wait)
    monkeypatch.setattr(download, "_opened", lambda _: pytest.fail("downloaded twice"))
    download.download(small)
    assert said == [f"another process downloads {small.path.name}; waiting for it"]


def test_only_checkpoint_of_an_archive_is_unpacked(small):
    write_archive(small.path, {"vgg_16.ckpt": b"weights", "README": b""})
    with download.unpacked(small) as file:
        assert file.read_bytes() == b"weights"
    assert not file.exists()


def test_checkpoint_with_holes_is_not_unpacked(small):
    header = tarfile.TarInfo("a.ckpt")
    header.type = tarfile.GNUTYPE_SPARSE
    data = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    data[483:495] = b"%011o\0" % 8_000_000_000  # the size with its holes
    data[148:156] = b"%06o\0 " % tarfile.calc_chksums(data)[0]
    with gzip.open(small.path, "wb") as file:
        file.write(data + bytes(1024))
    with pytest.raises(ValueError, match="its checkpoint has over"), download.unpacked(small):
        pass


@pytest.mark.parametrize("files, message", [
    ({"README": b""}, "it has 0 checkpoints; expected one"),
    ({"a.ckpt": b"", "b.ckpt": b""}, "it has 2 checkpoints; expected one"),
    ({"a.ckpt": bytes(10**6)}, "it unpacks to over 100,000 bytes"),
])  # fmt: skip
def test_other_archives_are_refused(small, monkeypatch, files, message):
    monkeypatch.setattr(download.Weights, "max_bytes", 100_000)
    write_archive(small.path, files)
    with pytest.raises(ValueError, match=message), download.unpacked(small):
        pass


def test_damaged_archives_are_refused(small):
    write_archive(small.path, {"a.ckpt": bytes(range(256)) * 100})
    data = small.path.read_bytes()
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    for contents in (b"", b"<html>", data[: len(data) // 2], bytes(damaged)):
        small.path.write_bytes(contents)
        with (
            pytest.raises(ValueError, match="is not the published archive .* pull again"),
            download.unpacked(small),
        ):
            pass
