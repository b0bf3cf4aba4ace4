"""What a file is by its first bytes, and a plain word for what people have instead of a checkpoint."""

from __future__ import annotations

from flowdistill.checkpoints.content import Refusal

_HEAD_BYTES = 512
_ZIP = b"PK\x03\x04"
_PICKLE = 0x80
_BRACE = b"{"
_UNPACK = "unpack it and import what is inside"
_AGAIN = "download the checkpoint itself; what the page says may tell why it was not sent"
_LFS = "run `git lfs pull` where it was cloned, or download the file from its page"

_STARTS: dict[bytes, tuple[str, str]] = {
    b"version https://git-lfs": ("a Git LFS pointer, not the file it stands for", _LFS),
    b"PK\x05\x06": ("a zip file with nothing in it", ""),
    b"\x1f\x8b": ("compressed by gzip", "decompress it first: `gunzip`"),
    b"BZh": ("compressed by bzip2", "decompress it first: `bunzip2`"),
    b"\xfd7zXZ": ("compressed by xz", "decompress it first: `unxz`"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "decompress it first: `unzstd`"),
    b"\x78\x01": ("compressed by zlib, as joblib does", "no checkpoint of a known family is"),
    b"\x78\x9c": ("compressed by zlib, as joblib does", "no checkpoint of a known family is"),
    b"\x78\xda": ("compressed by zlib, as joblib does", "no checkpoint of a known family is"),
    b"7z\xbc\xaf": ("a 7-Zip archive", _UNPACK),
    b"Rar!": ("a RAR archive", _UNPACK),
    b"\x89HDF": ("an HDF5 file", "only PyTorch checkpoints and safetensors are read"),
    b"\x93NUMPY": ("a numpy array", "only PyTorch checkpoints and safetensors are read"),
    b"GGUF": ("a GGUF file", "only PyTorch checkpoints and safetensors are read"),
    b"\x89PNG": ("a PNG picture", ""),
    b"\x7fELF": ("a program", ""),
}


def form(data: memoryview) -> str:
    """`zip`, `safetensors` or `pickle`, whichever a file that is not empty wants to be.

    Raises:
        Refusal: it is none of them; says what it is instead, as far as that shows.
    """
    head = bytes(data[:_HEAD_BYTES])
    if head.startswith(_ZIP):
        return "zip"
    for start, (found, fix) in _STARTS.items():
        if head.startswith(start):
            raise Refusal(f"is {found}", fix)
    if head[257:262] == b"ustar":
        raise Refusal(
            "is a tar archive", "unpack it; if PyTorch 0.1 wrote it, save it again with a newer one"
        )
    if head[8:9] == _BRACE and int.from_bytes(head[:8], "little") < 1 << 40:
        return "safetensors"
    if head[0] == _PICKLE:
        return "pickle"
    return _text(head, bytes(data[-1:]))


def _text(head: bytes, last: bytes) -> str:
    """The first protocols of pickle are text too; they begin with an instruction and end with a full stop."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")):
        raise Refusal("is a web page, not a checkpoint: the download went wrong", _AGAIN)
    if start.startswith((b"{", b"[")):
        raise Refusal("is JSON, not a checkpoint", "give the file that holds the weights")
    if last == b"." and head[:1] in b"(c]}":
        return "pickle"
    if all(byte >= 0x20 or byte in b"\t\n\r" for byte in head):
        raise Refusal("is text, not a checkpoint", "give the file that holds the weights")
    raise Refusal("is no checkpoint of a known kind", "give a .pkl, .pt, .pth, .ckpt or .safetensors file")
