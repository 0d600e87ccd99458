"""Checkpoints as upstream projects write them, and files that are no data."""

import argparse
import json
import os
import pathlib
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from gate4d.models import WeightsError
from gate4d.models.checkpoints import arguments_of, read_checkpoint

STATE = {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3).bfloat16()}


def same(found):
    assert found.state.keys() == STATE.keys()
    assert all(torch.equal(found.state[n], x) and found.state[n].dtype == x.dtype for n, x in STATE.items())
    return found


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module.model.", "_orig_mod.module."])
@pytest.mark.parametrize("under", [None, "model", "state_dict", "model_state_dict"])
def test_state_dicts(tmp_path, under, prefix, zipped):
    state = {prefix + n: x for n, x in STATE.items()}
    content = state if under is None else {under: state, "epoch": 3, "optimizer": {"state": {0: torch.zeros(2)}}}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    found = same(read_checkpoint(tmp_path / "c.pth"))
    assert (found.source, found.config, found.args) == ("c.pth", None, None)


def test_what_a_training_run_notes(tmp_path):
    """DUSt3R's family: an argparse Namespace beside the weights, with paths and numpy's numbers."""
    args = argparse.Namespace(model="M(depth=2)", lr=1e-4, output_dir=pathlib.Path("out"), best=np.float64(2.0))
    torch.save({"args": args, "model": STATE, "best_so_far": np.float32(1.5), "epoch": 3}, tmp_path / "c.pth")
    found = same(read_checkpoint(tmp_path / "c.pth"))
    assert found.args["model"] == "M(depth=2)"
    assert found.args["best"] == 2.0
    assert str(found.args["output_dir"]) == "out"


def test_omegaconf_without_omegaconf(tmp_path, monkeypatch):
    """Its nodes hold each other, their parents and metadata; they come back as dicts and lists."""
    made = {}
    for module, names in {"dictconfig": ["DictConfig"], "listconfig": ["ListConfig"], "base": ["ContainerMetadata"],
                          "nodes": ["AnyNode"]}.items():  # fmt: skip
        fake = types.ModuleType(f"omegaconf.{module}")
        for name in names:
            made[name] = type(name, (), {"__module__": fake.__name__})
            setattr(fake, name, made[name])
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))

    def node(kind, parent=None, **values):
        new = made[kind]()
        new.__dict__ |= {"_parent": parent, "_metadata": made["ContainerMetadata"](), **values}
        return new

    top = node("DictConfig")
    numbers = node("ListConfig", top)
    numbers._content = [node("AnyNode", numbers, _val=1), node("AnyNode", numbers, _val=None)]
    top._content = {"model": node("AnyNode", top, _val="M(depth=2)"), "numbers": numbers}
    torch.save({"model": STATE, "args": top}, tmp_path / "c.pth")
    for name in list(sys.modules):
        if name.startswith("omegaconf"):
            monkeypatch.delitem(sys.modules, name)
    found = same(read_checkpoint(tmp_path / "c.pth"))
    assert found.args == {"model": "M(depth=2)", "numbers": [1, None]}
    assert not any(name.startswith("omegaconf") for name in sys.modules)


def test_folders_and_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(STATE, tmp_path / "model.safetensors")
    same(read_checkpoint(tmp_path / "model.safetensors"))
    assert same(read_checkpoint(tmp_path)).config is None
    (tmp_path / "config.json").write_text(json.dumps({"depth": 2}))
    assert same(read_checkpoint(tmp_path)).config == {"depth": 2}
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(WeightsError, match=r"config.json must hold the model's arguments by name, got list"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold one of model.safetensors, .*; it has none"):
        read_checkpoint(tmp_path)


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Assigns:
    """``__setstate__`` of a class that is not known."""

    def __setstate__(self, state):
        pathlib.Path(state).touch()

    def __getstate__(self):
        return "ran"


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_that_a_file_asks_for_is_run(tmp_path, zipped, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mark = tmp_path / "ran"
    for content, what in (
        (Command(mark), r"\w+\.system"),
        ({"model": STATE, "args": Command(mark)}, r"\w+\.system"),
        ({"model": STATE, "args": argparse.Namespace(x=Command(mark))}, r"\w+\.system"),
        ({"model": STATE, "args": Assigns()}, r"\S*test_checkpoints\.Assigns"),
        ({"model": STATE, "args": eval}, r"(builtins\.)?eval"),
    ):
        torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(WeightsError, match=rf"it asks for {what}, which is no data. Nothing of it was run"):
            read_checkpoint(tmp_path / "c.pth")
        assert not mark.exists()
    torch.load(tmp_path / "c.pth", weights_only=False)
    torch.save(Command(mark), tmp_path / "c.pth")
    torch.load(tmp_path / "c.pth", weights_only=False)
    assert mark.exists()  # it would have run


def test_what_is_no_checkpoint(tmp_path):
    path = tmp_path / "c.pth"
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        read_checkpoint(path)
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(WeightsError, match=r"it asks for torch.nn.modules.linear.Linear, which is no data.*--trust"):
        read_checkpoint(path)
    torch.save({"epoch": 3, "loss": 1.0}, path)
    with pytest.raises(WeightsError, match=r"must hold a state_dict.*; got a dict of 'epoch', 'loss'"):
        read_checkpoint(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(WeightsError, match=r"must hold a state_dict.*; got list"):
        read_checkpoint(path)
    torch.save(STATE, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:20], b"", b"\x80", b"hello"):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"c.pth is (damaged or no checkpoint|no file of weights)"):
            read_checkpoint(path)


def test_calls_are_read_as_data():
    text = "M(Config(depth_mode=('exp', -inf, inf), size=[2, 3], high=float('inf'), x=None, on=True), desc=('norm'))"
    inf = float("inf")
    want = {"depth_mode": ("exp", -inf, inf), "size": [2, 3], "high": inf, "x": None, "on": True, "desc": "norm"}
    assert arguments_of(text) == want
    for bad in (
        "M",
        "M(1)",
        "M(**x)",
        "M(a=f())",
        "M(a=__import__('os'))",
        "os.system('x')",
        "M(a=b)",
        "M(",
        "(" * 5000,
    ):
        with pytest.raises(WeightsError, match="must be written as one call with plain values"):
            arguments_of(bad)
