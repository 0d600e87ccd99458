"""Upstream models by name: from checkouts that have upstream's folders and our stand-ins' classes."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gate4d.cli.main import main
from gate4d.models.zoo import ZOO, looks_like

TESTS = Path(__file__).parents[1]
# What a checkout holds, and arguments that its loader must find in the checkpoint: a module each.
VGGT = """\
from standins.vggt import {0} as Base


class {1}(Base):
    def __init__(self, dim=64):
        super().__init__(dim=dim)
"""
CROCO = """\
from standins.croco import {0} as Base


class {1}(Base):
    def __init__(self, enc_dim=0, head_type=None, depth_mode=None, landscape_only=True, patch_embed_cls=None):
        assert (head_type, depth_mode) == ("dpt", ("exp", -float("inf"), float("inf")))
        assert (landscape_only, patch_embed_cls) == (False, "PatchEmbedDust3R")
        super().__init__(enc_dim=enc_dim)
"""
CUT3R = """\
from standins.croco import {0} as Base


class {1}Config:
    def __init__(self, **given):
        self.__dict__.update(given)


class {1}(Base):
    def __init__(self, config):
        self.kept = config
        assert config.landscape_only is False
        super().__init__(enc_dim=config.enc_dim)
        self.config = config
"""
FAKES = {
    "dust3r": (CROCO, "Dust3r", {}), "mast3r": (CROCO, "Dust3r", {}), "monst3r": (CROCO, "Dust3r", {}),
    "cut3r": (CUT3R, "Cut3r", {}), "ttt3r": (CUT3R, "Ttt3r", {}),
    "vggt": (VGGT, "Vggt", {"dim": 32}), "streamvggt": (VGGT, "StreamVggt", {"dim": 32}),
    "stream3r": (VGGT, "Stream3r", {"dim": 32}),
}  # fmt: skip
CALL = "M(Config(enc_dim=32, head_type='dpt', depth_mode=('exp', -inf, inf), landscape_only=True, " \
       "patch_embed_cls='ManyAR_PatchEmbed'))"  # fmt: skip


def checkout(folder, name):
    """As the repository lies on disk."""
    text, base, _ = FAKES[name]
    module, _, cls = ZOO[name].target.partition(":")
    path = folder.joinpath(ZOO[name].folders[0], *module.split("."))
    path.parent.mkdir(parents=True)
    path.with_suffix(".py").write_text(text.format(base, cls))
    for parent in path.parents:
        if parent in (folder, folder / ZOO[name].folders[0]):
            break
        (parent / "__init__.py").touch()
    return folder


def model_of(name):
    from standins import croco, vggt

    cls = getattr(vggt if FAKES[name][0] == VGGT else croco, FAKES[name][1])
    return cls(**(FAKES[name][2] or {"enc_dim": 32}))


def save(name, path, kind):
    state = model_of(name).state_dict()
    if kind == "safetensors":
        import safetensors.torch

        path = path / "saved"
        path.mkdir()
        safetensors.torch.save_file(state, path / "model.safetensors")
        config = FAKES[name][2] or {"enc_dim": 32, "head_type": "dpt", "depth_mode": ["exp", "-inf", "inf"],
                                    "patch_embed_cls": "ManyAR_PatchEmbed", "_class": "M"}  # fmt: skip
        (path / "config.json").write_text(json.dumps(config))
        return path
    path = path / "model.pth"
    if FAKES[name][2]:
        FAKES[name][2]["dim"] = 32
    content = {"model": state, "args": argparse.Namespace(model=CALL, lr=0.1), "epoch": 1}
    torch.save({f"module.{n}": x for n, x in state.items()} if kind == "state" else content, path)
    return path


def loaded(tmp_path, name, path):
    """In a process of its own, as several checkouts claim one package name: what was loaded equals what was saved."""
    code = """
import sys, torch
from gate4d.models.checkpoints import read_checkpoint
from gate4d.models.zoo import load_upstream
name, path, checkout = sys.argv[1:]
model = load_upstream(name, path, checkout=checkout)
state = read_checkpoint(path).state
assert state.keys() == model.state_dict().keys()
assert all(torch.equal(x, state[n]) for n, x in model.state_dict().items()) and not model.training
print(type(model).__module__, type(model).__name__, getattr(getattr(model, "config", None), "model_update_type", ""))
"""
    command = [sys.executable, "-c", code, name, str(path), str(tmp_path / "checkout")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("name", FAKES)
def test_by_name_from_files_as_upstream_saves_them(tmp_path, name):
    pytest.importorskip("safetensors")
    checkout(tmp_path / "checkout", name)
    module, _, cls = ZOO[name].target.partition(":")
    extra = ["ttt3r"] if name == "ttt3r" else []
    # A state dict alone does not say how DUSt3R's family was built.
    for kind in ("safetensors", "args") if FAKES[name][0] != VGGT else ("safetensors",):
        assert loaded(tmp_path, name, save(name, tmp_path, kind)) == [module, cls, *extra]


def test_a_state_dict_alone(tmp_path, monkeypatch):
    checkout(tmp_path / "checkout", "vggt")
    (tmp_path / "checkout/vggt/models/vggt.py").write_text(VGGT.format("Vggt", "VGGT").replace("dim=64", "dim=32"))
    assert loaded(tmp_path, "vggt", save("vggt", tmp_path, "state")) == ["vggt.models.vggt", "VGGT"]


DEPTH = """\
from torch import nn


class DepthAnything3(nn.Module):
    def __init__(self, model_name="da3-large", **given):
        super().__init__()
        self.model_name, self.model = model_name, nn.Module()
        self.model.backbone, self.model.head = nn.Module(), nn.Linear(3, 2)
        self.model.backbone.pretrained = nn.Linear(2, 3)
"""


@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
def test_a_class_whose_network_is_called_as_a_wrapper_calls_it(tmp_path, prefix):
    """Depth Anything 3 has everything in its attribute ``model``: there the name is no wrapper's prefix."""
    package = tmp_path / "checkout/src/depth_anything_3"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "api.py").write_text(DEPTH)
    parts = {"model.backbone.pretrained": (3, 2), "model.head": (2, 3)}
    state = {f"{n}.{kind}": torch.randn(shape if kind == "weight" else shape[:1])
             for n, shape in parts.items() for kind in ("weight", "bias")}  # fmt: skip
    names = list(state)
    saved = tmp_path / "saved"
    saved.mkdir()
    torch.save({prefix + n: x for n, x in state.items()}, saved / "model.pt")
    (saved / "config.json").write_text(json.dumps({"model_name": "da3-small", "config": {}}))
    code = """
import sys, torch
from gate4d.models.checkpoints import read_checkpoint
from gate4d.models.zoo import load_upstream, looks_like
model = load_upstream("depth-anything-3", sys.argv[1], checkout=sys.argv[2])
saved = torch.load(sys.argv[1] + "/model.pt")
assert all(torch.equal(x, saved[sys.argv[3] + n]) for n, x in model.state_dict().items())
print(model.model_name, *model.state_dict(), *looks_like(read_checkpoint(sys.argv[1]).state))
"""
    command = [sys.executable, "-c", code, str(saved), str(tmp_path / "checkout"), prefix]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["da3-small", *names, "depth-anything-3"]


def test_run_by_name(tmp_path, capsys):
    """The whole command in a process of its own."""
    for package in ("rich", "skimage", "sklearn", "scipy", "safetensors"):
        pytest.importorskip(package)
    text = "from standins.factories import DenseVggt\n\n\nclass VGGT(DenseVggt):\n    pass\n"
    folder = checkout(tmp_path / "checkout", "vggt")
    (folder / "vggt/models/vggt.py").write_text(text)
    from standins.factories import DenseVggt

    torch.save(DenseVggt().state_dict(), tmp_path / "model.pt")
    command = ["run", "more", "--model", "vggt", "--checkout", folder, "--checkpoint", tmp_path / "model.pt"]
    command += ["--frames", "rendered:3", "--max-frames", "3", "--patches", "6", "--out", tmp_path / "out"]
    code = "import sys; from gate4d.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True, check=False, cwd=TESTS
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/summary.json").read_text())["model"] == "vggt"
    assert "random" not in done.stdout


def refused(capsys, *arguments):
    assert main(["run", "more", "--frames", "rendered:3", "--device", "cpu", *map(str, arguments)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in said
    return said


def test_what_is_refused(tmp_path, capsys):
    pytest.importorskip("rich")
    out = ("--out", tmp_path / "out")
    folder = checkout(tmp_path / "checkout", "vggt")
    torch.save(model_of("vggt").state_dict(), tmp_path / "vggt.pt")
    torch.save(model_of("cut3r").state_dict(), tmp_path / "cut3r.pt")
    said = refused(capsys, *out, "--model", "vggt")
    assert "checkpoint must be given for vggt" in said
    assert "facebook/VGGT-1B" in said
    said = refused(capsys, *out, "--model", tmp_path / "cut3r.pt")
    assert "holds weights without the model's code: say --model cut3r or ttt3r --checkout DIR --checkpoint" in said
    said = refused(capsys, *out, "--model", "alternating", "--checkout", folder)
    assert "--checkout belongs to a model by name" in said
    given = ("--model", "vggt", "--checkpoint", tmp_path / "vggt.pt")
    assert "there is no folder" in refused(capsys, *out, *given, "--checkout", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    said = refused(capsys, *out, *given, "--checkout", tmp_path / "empty")
    assert "is no checkout of facebookresearch/vggt: it has no folder vggt" in said
    said = refused(capsys, *out, "--model", "vggt-omega", "--checkpoint", tmp_path / "vggt.pt")
    assert (
        "the package vggt_omega cannot be imported: give the folder of a checkout of facebookresearch/vggt-omega"
        in said
    )
    said = refused(capsys, *out, *given, "--checkpoint", tmp_path / "none.pt", "--checkout", folder)
    assert "there is no file or folder" in said
    assert not (tmp_path / "out").exists()


def test_weights_of_another_model(tmp_path):
    """By names of keys that differ, and whose they look like."""
    checkout(tmp_path / "checkout", "vggt")
    torch.save(model_of("cut3r").state_dict(), tmp_path / "cut3r.pt")
    code = "import sys; from gate4d.models import zoo; zoo.load_upstream('vggt', sys.argv[1], checkout=sys.argv[2])"

    def said(path):
        command = [sys.executable, "-c", code, str(path), str(tmp_path / "checkout")]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS).stderr

    text = said(tmp_path / "cut3r.pt")
    assert "WeightsError: cut3r.pt does not fit vggt: it lacks aggregator." in text
    assert "and has " in text
    assert "it looks like weights of cut3r or ttt3r" in text
    state = model_of("vggt").state_dict()
    torch.save({**state, "track_head.weight": torch.zeros(3)}, tmp_path / "wide.pt")
    assert "its tensors have other shapes (aggregator." in said(tmp_path / "wide.pt")


def test_whose_weights_they_look_like():
    for name in FAKES.keys() - {"dust3r", "mast3r", "monst3r"}:  # whose stand-in has other heads
        assert name in looks_like(model_of(name).state_dict())
    croco = ["enc_blocks.0.attn.qkv.weight", "dec_blocks.0.attn.qkv.weight", "dec_blocks2.0.attn.qkv.weight"]
    assert looks_like([*croco, "downstream_head1.dpt.head.0.weight"]) == ["dust3r", "monst3r"]
    assert "mast3r" in looks_like([*croco, "downstream_head1.head_local_features.fc1.weight"])
    assert looks_like(["weight"]) == []


def test_names_at_the_hub_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    from gate4d.models.zoo import resolve

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"hub cannot be reached, and a/b is not in its cache.*model.saf"):
        resolve("a/b")


def test_names_at_the_hub_need_its_package(monkeypatch):
    from gate4d.models.zoo import resolve

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"a/b is a name at the Hugging Face hub: pip install 'gate4d\[hub\]'"):
        resolve("a/b")
