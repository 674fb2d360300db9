"""The lines that `make gpu` begins with."""

import importlib.util

import pytest
import torch

from benchmarks.gpu import ready


def test_a_line_each_of_what_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    ready.main()
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == f"torch  {torch.__version__}"
    assert second.startswith("Triton ")
    assert third == "GPU    NVIDIA H200"


def test_a_line_each_of_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ready.gpu().startswith("none (")
    assert ready.gpu().endswith(")")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ready.main()
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("torch  missing in python")
    assert second.startswith("Triton missing in python")
    assert third == "GPU    unknown without torch"
