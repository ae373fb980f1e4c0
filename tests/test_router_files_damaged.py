"""Folders of routers that are damaged, missing or half written."""

from __future__ import annotations

import json
import os

import pytest

from sla_video import SLAConfig, enable_sla, load_routers, save_routers
from tiny_models import build_tiny_transformer

SMALL_BLOCKS = SLAConfig(sparsity=0.8, block_q=16, block_k=8)


@pytest.fixture
def saved(tmp_path):
    """A folder of routers."""
    handle = enable_sla(build_tiny_transformer(), config=SMALL_BLOCKS)
    return save_routers(tmp_path / "routers", handle)


def edit(folder, change):
    path = folder / "routers.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(bytes(content))


def swap_layers(description):
    description["layers"][0] = "transformer.blocks.7.attn1"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: truncate(f / "routers.safetensors", 1000), "routers.safetensors is corrupt, tr"),
        (lambda f: truncate(f / "routers.safetensors", 0), "routers.safetensors is corrupt, trunc"),
        (lambda f: flip(f / "routers.safetensors", -1), "routers.safetensors is corrupt, trunc"),
        (lambda f: flip(f / "routers.safetensors", 3), "routers.safetensors is corrupt, trunc"),
        (lambda f: truncate(f / "routers.json", 100), "routers.json is corrupt or truncated"),
        (lambda f: (f / "routers.json").write_bytes(b"\xff\xfe\x00"), "routers.json is corrupt or"),
        (lambda f: (f / "routers.json").write_text("[]"), "does not describe routers"),
        (lambda f: (f / "routers.json").write_text("{}"), "it has no `format_version`"),
        (lambda f: (f / "routers.json").unlink(), "holds no routers: routers.json is missing"),
        (lambda f: (f / "routers.safetensors").unlink(), "routers.safetensors is missing there"),
        (lambda f: edit(f, lambda d: d.update(format_version=3)), "version 3, but sla-video 0"),
        (lambda f: edit(f, lambda d: d.pop("sla")), "routers.json is corrupt: KeyError 'sla'"),
        (lambda f: edit(f, lambda d: d.update(models=3)), "routers.json is corrupt: Attrib"),
        (lambda f: edit(f, lambda d: d["sla"].update(sparsity=2)), "`sparsity` must be in [0, 1)"),
        (lambda f: edit(f, lambda d: d["sla"].update(odd=2)), "unknown settings odd"),
        (lambda f: edit(f, lambda d: d.update(layers=None)), "routers.json is corrupt: TypeError"),
        (lambda f: edit(f, lambda d: d.update(resolution=5)), "routers.json is corrupt: TypeErr"),
        (lambda f: edit(f, lambda d: d.update(layers=[3])), "does not hold what routers.json"),
        (lambda f: edit(f, swap_layers), "does not hold what routers.json describes"),
        (lambda f: edit(f, lambda d: d["layers"].append("x.y")), "does not hold what routers.json"),
        (
            lambda f: edit(f, lambda d: d["sla"].update(router_per_head=True)),
            "does not hold what routers.json describes",
        ),
        (
            lambda f: edit(f, lambda d: d["models"]["transformer"]["config"].update(ffn_dim=1)),
            "the configuration hash of 'transformer' does not match",
        ),
    ],
)
def test_damaged_folders_give_one_line(saved, damage, message):
    damage(saved)
    with pytest.raises(ValueError) as error:
        load_routers(saved)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no/such/folder", "nowhere", "/nowhere/at/all", ""])
def test_names_that_are_neither_folder_nor_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        load_routers(name)
    assert "\n" not in str(error.value)


def test_a_file_instead_of_a_folder(saved):
    with pytest.raises(ValueError, match="holds no routers"):
        load_routers(saved / "routers.json")


@pytest.mark.parametrize("fails", ["routers.safetensors", "routers.json"])
def test_an_interrupted_save_leaves_no_half_file(saved, monkeypatch, fails):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    replace = os.replace

    def interrupted(source, target):
        if os.path.basename(target) == fails:
            raise KeyboardInterrupt
        replace(source, target)

    handle = enable_sla(build_tiny_transformer(), config=SMALL_BLOCKS)
    for router in handle.routers.values():
        router.alpha_bias.data.fill_(1)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_routers(saved, handle)
    monkeypatch.undo()

    assert sorted(os.listdir(saved)) == sorted(before)
    if fails == "routers.safetensors":
        assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
        load_routers(saved)
    else:  # the pair does not fit together, and that is noticed
        with pytest.raises(ValueError, match=r"not the file that routers.json describes"):
            load_routers(saved)


def test_unwritable_folder(tmp_path):
    handle = enable_sla(build_tiny_transformer(), config=SMALL_BLOCKS)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write routers to"):
        save_routers(tmp_path / "file" / "x", handle)
