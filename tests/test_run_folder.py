"""Run folders: one process at a time, whatever starts at the same moment; what was edited or lost is noticed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from command_lines import one_line_error
from PIL import Image

from bilevel_imaging.cli import RUN_EXISTS, RUN_FILES, read_config, train_main
from bilevel_imaging.training import CheckpointStore, checkpoints, read_metrics, run_folder
from bilevel_imaging.training.run_folder import LOCK_FILE, locked, new_folder

TINY = (
    "--data.patch_size=24 --data.patches_per_image=1 --data.max_images=2 --data.eval_size=32 "
    "--logging.tensorboard=false --logging.progress=false --logging.evaluate=false"
).split()


def fails(capsys, *arguments: str) -> str:
    """The one line printed to standard error."""
    return one_line_error(capsys, train_main, arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train_main([f"--output={folder}", "--upper.max_steps=1", *TINY]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A run of one step, to be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def claim(folder: Path):
    return new_folder(str(folder), "", RUN_FILES, RUN_EXISTS)


def test_a_folder_belongs_to_one_at_a_time(tmp_path):
    folder = tmp_path / "run"
    with claim(folder) as first:
        assert first == folder
        with pytest.raises(ValueError, match="run: another process is working in it"), claim(folder):
            pass
        with pytest.raises(ValueError, match="another process"), locked(folder):
            pass
        (folder / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="already holds a run"), claim(folder):
        pass
    with locked(folder), pytest.raises(ValueError, match="another process"), locked(folder):
        pass
    assert [p.name for p in folder.iterdir()] == ["config.yaml"]


def test_folders_of_mistakes_are_removed_and_those_with_files_kept(tmp_path):
    for name, content in (("empty", False), ("used", True)):
        with pytest.raises(KeyError), claim(tmp_path / name) as folder:
            if content:
                (folder / "data.json").write_text("{}")
            raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["used"]


def test_a_lock_file_that_was_just_removed_is_not_taken_for_a_lock(tmp_path, monkeypatch):
    if run_folder.fcntl is None:
        pytest.skip("no such locks on this system")
    real, calls = run_folder.fcntl.flock, []

    def flock(descriptor, how):
        if not calls:
            (tmp_path / LOCK_FILE).unlink()  # by whoever had it, between our opening and our locking
        calls.append(how)
        real(descriptor, how)

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    with locked(tmp_path), pytest.raises(ValueError, match="another process"), locked(tmp_path):
        pass
    assert len(calls) == 3


@pytest.mark.parametrize("missing", ["module", "file system"])
def test_without_locks_there_is_no_protection_but_no_error(missing, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if missing == "module":
        monkeypatch.setattr(run_folder, "fcntl", None)
    elif run_folder.fcntl is not None:
        monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    with locked(tmp_path), locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_refused_run_changes_nothing(run, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    with locked(tmp_path / "new") as folder:
        assert "another process" in fails(capsys, f"--output={folder}", "--problem.sigma=0.2", *TINY)
        assert not contents(folder)
    before = contents(run)
    with locked(run):
        assert "another process" in fails(capsys, f"--resume={run}", "--upper.max_steps=2")
    assert contents(run) == before


def test_edited_settings_are_noticed(run, capsys):
    edit(run / "config.yaml", "sigma: 0.1\n", "sigma: 0.2\n")
    edit(run / "config.yaml", "tolerance: 1.0e-05", "tolerance: 1.0e-03")
    before = contents(run)
    assert "problem.sigma, upper.tolerance: cannot change when a run is resumed" in fails(capsys, f"--resume={run}")
    assert contents(run) == before


def test_without_a_comparison_there_are_scores_but_no_grid_search(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["grid_search"] is None and not (finished / "grid_search.json").exists()
    for metric in ("psnr", "ssim"):
        assert set(summary[metric]) == {"measurement", "learned"}
        assert summary[metric]["learned"] > summary[metric]["measurement"]


def test_checkpoints_without_settings_are_still_resumed(run):
    store = CheckpointStore(run / "checkpoints")
    state, path = store.load()
    assert state["config"]["problem"]["sigma"] == 0.1
    state["config"]["problem"].pop("views")  # as of a version that had no such setting
    state["config"]["problem"]["older"] = 1
    store.save(state, 1)
    assert train_main([f"--resume={run}"]) == 0
    del state["config"]
    store.save(state, 1)
    assert train_main([f"--resume={run}"]) == 0


def test_test_images_are_looked_at_before_the_training_and_may_change(run, tmp_path, capsys):
    folder, images = tmp_path / "new", tmp_path / "images"
    images.mkdir()
    bad = [f"--output={folder}", *TINY, f"--data.test={images}"]
    assert "images: no images found" in fails(capsys, *bad) and not folder.exists()
    (images / "a.png").write_bytes(b"no image")
    assert "a.png: cannot be read" in fails(capsys, *bad) and not folder.exists()
    Image.new("L", (40, 33), 99).save(images / "a.png")
    assert train_main([f"--resume={run}", f"--data.test={images}"]) == 0
    assert read_config(run).data.test == str(images)
    assert list(json.loads((run / "summary.json").read_text())["images"]) == ["a.png"]
    assert "data.max_images: cannot change" in fails(capsys, f"--resume={run}", "--data.max_images=1")


def test_lost_checkpoints_are_noticed(run, capsys):
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    assert "checkpoints: no checkpoint, but metrics.jsonl has 1 steps" in fails(capsys, f"--resume={run}")
    assert contents(run) == before
    assert "already holds a run" in fails(capsys, f"--output={run}", *TINY)


def test_incomplete_checkpoints_are_named(run, capsys):
    store = CheckpointStore(run / "checkpoints")
    state, _ = store.load()
    path = store.save({key: state[key] for key in ("step", "theta")}, 2)
    assert f"{path.name} is incomplete: method, objective, cost" in fails(capsys, f"--resume={run}")


def test_a_full_disk_at_the_end_says_what_to_do(run, monkeypatch, capsys):
    real = os.replace

    def replace(source, target):
        if Path(target).name == "summary.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(checkpoints.os, "replace", replace)
    message = fails(capsys, f"--resume={run}")
    assert f"{run}/summary.json: No space left on device; free space, then --resume {run}." in message
    monkeypatch.undo()
    assert train_main([f"--resume={run}"]) == 0
    assert [r["step"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "step"] == [1]
