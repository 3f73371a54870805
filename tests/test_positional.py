"""Positional reads and writes, also where the system has no calls for them."""

from __future__ import annotations

import os

import pytest

from mergekit.checkpoint.positional import read_at, write_at


@pytest.mark.parametrize("native", [True, False])
def test_read_back_what_was_written(tmp_path, monkeypatch, native):
    if not native:
        monkeypatch.delattr(os, "preadv", raising=False)
        monkeypatch.delattr(os, "pwrite", raising=False)
    descriptor = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    assert write_at(descriptor, memoryview(b"later"), 7) == 5
    assert write_at(descriptor, memoryview(b"first"), 0) == 5
    buffer = bytearray(20)
    assert read_at(descriptor, memoryview(buffer), 5) == 7
    assert bytes(buffer[:7]) == b"\0\0later"
    assert read_at(descriptor, memoryview(buffer), 12) == 0
    os.close(descriptor)
