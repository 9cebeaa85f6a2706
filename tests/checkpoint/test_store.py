"""Step folders that are whole or absent, and models that open as they were saved."""

import contextlib
import os
import pickle
import signal
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import save_checkpoint

from configurator import UserError
from model import GPT, GPTConfig
from plaingpt.checkpoint import folders, store
from plaingpt.files import remove_leftovers

SHAPE = GPTConfig(vocab_size=257, block_size=16, n_layer=2, n_head=4, n_embd=32)
IDX = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))


def save(out_dir, step=1, config=SHAPE, val_loss=None, seed=1):
    """A model with random biases too, and its step folder."""
    model = GPT(config).init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / 10)
    state = {"step": step, "val_loss": val_loss, "data": "x", "settings": {}}
    optimizer = {"parameters": {"a": {"m": torch.ones(2)}}, "scaler": {}}
    return model, save_checkpoint(out_dir, model, optimizer=optimizer, state=state)


def test_loaded_weights_do_not_depend_on_the_file(tmp_path):
    model, folder = save(tmp_path)
    loaded = store.load_model(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert torch.equal(loaded(IDX), model(IDX))


def test_all_files_have_the_mode_that_the_umask_gives(tmp_path):
    _, folder = save(tmp_path)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


@pytest.mark.skipif(os.name == "nt", reason="RLIMIT_FSIZE is POSIX")
@pytest.mark.parametrize("limit", [200, 40_000, 112_000])
def test_a_full_disk_is_an_oserror_that_leaves_nothing(tmp_path, limit):
    import resource

    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="step_000002"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_system_call_of_a_save_leaves_whole_folders(tmp_path, monkeypatch):
    """Kill -9 a process at each step of saving and pruning in turn, and open what is left."""
    deadly_calls = [
        (os, "fsync"),
        (os, "rename"),
        (os, "unlink"),
        (os, "rmdir"),
        (os, "mkdir"),
        (torch, "save"),
        (safetensors.torch, "save_file"),
        (store, "write_json"),
    ]

    def save_and_die(out_dir, fatal):
        calls = 0

        def deadly(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for owner, name in deadly_calls:
            monkeypatch.setattr(owner, name, deadly(getattr(owner, name)))
        save(out_dir, 2)
        folders.prune(out_dir, keep=1)
        os._exit(0)

    killed = 0
    while True:
        out_dir = tmp_path / str(killed)
        save(out_dir, 1)
        child = os.fork()
        if child == 0:
            save_and_die(out_dir, killed + 1)
        status = os.waitpid(child, 0)[1]
        found = folders.step_folders(out_dir)
        assert found
        for folder in found:
            store.load_model(folder)
            store.read_optimizer(folder)
            folders.read_state(folder)
        remove_leftovers(out_dir)  # as a run does when it begins
        save(out_dir, 3)
        assert not list(out_dir.glob(".*"))
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed += 1
    assert killed > 20


# --- damage


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "optimizer.pt"])
def test_a_pickle_is_never_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    _, folder = save(tmp_path / "out")
    (folder / "SHA256SUMS").unlink()  # which would notice the change
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    read = store.read_optimizer if name == "optimizer.pt" else store.load_model
    with pytest.raises(UserError, match="damaged|pickle"):
        read(folder)
    assert not (tmp_path / "exploded").exists()
    torch.save({"parameters": Bomb()}, folder / "optimizer.pt")
    with pytest.raises(UserError, match="or contains code, and was not loaded"):
        store.read_optimizer(folder)
    assert not (tmp_path / "exploded").exists()


def test_any_damage_of_the_optimizer_file_is_one_error(tmp_path):
    for other, message in (
        ([1, 2], "expected an object, got a list"),
        ({"x": 1}, "missing field parameters"),
        ({"parameters": {"a": {"step": 1}}, "scaler": {}}, r"parameters.*: expected Tensor, got a"),
    ):
        torch.save(other, tmp_path / "optimizer.pt")
        with pytest.raises(UserError, match=r"optimizer\.pt: .*" + message):
            store.read_optimizer(tmp_path)
    parameters = {"a": {"step": torch.ones(3)}}
    torch.save({"parameters": parameters, "scaler": {}}, tmp_path / "optimizer.pt")
    with zipfile.ZipFile(tmp_path / "optimizer.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "optimizer.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)
    with pytest.raises(UserError, match="compressed"):  # a small file may grow without limit
        store.read_optimizer(tmp_path)
    torch.save({"parameters": parameters, "scaler": {}}, tmp_path / "optimizer.pt")
    content = (tmp_path / "optimizer.pt").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            damaged[place] ^= int(rng.integers(1, 256))
        (tmp_path / "optimizer.pt").write_bytes(damaged)
        with contextlib.suppress(UserError):
            store.read_optimizer(tmp_path)


def test_a_full_disk_is_named(tmp_path):
    resource = pytest.importorskip("resource")  # POSIX
    moments = {"a": {"exp_avg": torch.zeros(100_000)}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # as a full disk, or a quota
    try:
        with pytest.raises(OSError, match="File too large"):
            store.write_optimizer(tmp_path, {"parameters": moments, "scaler": {}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
