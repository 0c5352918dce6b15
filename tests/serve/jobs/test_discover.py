from __future__ import annotations

import os
from pathlib import Path

import pytest

from serve.jobs.discover import EXTENSIONS, find_items


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(found, root: Path) -> list[str]:
    return [os.path.relpath(item.path, root) for item in found.items]


def test_folders_are_walked_in_a_stable_order_and_hidden_names_are_left_out(tmp_path: Path):
    touch(tmp_path, "b.png", "a.JPG", "sub/c.mp4", "a/z.webp", ".hidden.png", ".git/x.png", "a/.DS_Store")
    found = find_items([str(tmp_path)])
    assert names(found, tmp_path) == ["a.JPG", "b.png", "a/z.webp", "sub/c.mp4"]
    assert [item.kind for item in found.items] == ["image", "image", "image", "video"]
    assert not found.skipped
    assert not found.problems


def test_other_files_are_counted_by_extension(tmp_path: Path):
    touch(tmp_path, "a.png", "b.txt", "c.TXT", "d.tiff", "README")
    assert find_items([str(tmp_path)]).skipped == {".txt": 2, ".tiff": 1, "no extension": 1}


def test_a_file_reached_by_several_inputs_is_one_item(tmp_path: Path):
    touch(tmp_path, "sub/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    inputs = ["sub/a.png", ".", "sub/../sub/a.png", "link", "link/a.png", "*/*.png", "**"]
    found = find_items([str(tmp_path / text) for text in inputs])
    assert names(found, tmp_path) == ["sub/a.png"]


def test_a_link_to_a_file_is_an_item_of_its_own_even_when_it_leads_nowhere(tmp_path: Path):
    touch(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert names(find_items([str(tmp_path)]), tmp_path) == ["a.png", "b.png", "gone.png"]


def test_linked_folders_that_lead_back_are_not_walked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    touch(tmp_path, "sub/a.png")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    scandir, read = os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda path: read.append(path) or scandir(path))
    assert names(find_items([str(tmp_path)]), tmp_path) == ["sub/a.png"]
    assert len(read) == 3


def test_globs_take_files_and_folders(tmp_path: Path):
    touch(tmp_path, "x1/a.png", "x2/b.png", "y/c.png", "x3.png")
    assert names(find_items([str(tmp_path / "x*")]), tmp_path) == ["x1/a.png", "x2/b.png", "x3.png"]
    assert names(find_items([str(tmp_path / "**" / "[bc].png")]), tmp_path) == ["x2/b.png", "y/c.png"]


def test_a_file_whose_name_looks_like_a_glob_is_taken_as_it_is(tmp_path: Path):
    touch(tmp_path, "a[1].png", "a1.png")
    assert names(find_items([str(tmp_path / "a[1].png")]), tmp_path) == ["a[1].png"]


def test_patterns_choose_among_the_names_in_folders(tmp_path: Path):
    touch(tmp_path, "a.png", "b.jpg", "sub/c.png")
    assert names(find_items([str(tmp_path)], patterns=["*.png"]), tmp_path) == ["a.png", "sub/c.png"]
    assert names(find_items([str(tmp_path), str(tmp_path / "b.jpg")], patterns=["c*"]), tmp_path) == [
        "sub/c.png",
        "b.jpg",
    ]


def test_inputs_that_lead_nowhere_are_reported(tmp_path: Path):
    touch(tmp_path, "a.png")
    found = find_items([str(tmp_path / "missing"), str(tmp_path / "*.webp"), str(tmp_path)])
    assert len(found.items) == 1
    assert [problem.split(str(tmp_path))[0] for problem in found.problems] == ["", "nothing matches "]


def test_an_unreadable_folder_is_reported_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    touch(tmp_path, "a/x.png", "locked/y.png", "z/z.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything, so the mode of the folder cannot do it
    found = find_items([str(tmp_path)])
    assert names(found, tmp_path) == ["a/x.png", "z/z.png"]
    assert found.problems == [f"the folder {tmp_path}/locked cannot be read: Permission denied"]


def test_the_output_folder_is_left_out(tmp_path: Path):
    touch(tmp_path, "a.png", "out/captions.jsonl", "out/b.png")
    found = find_items([str(tmp_path)], exclude=str(tmp_path / "out"))
    assert names(found, tmp_path) == ["a.png"]
    assert not found.skipped


def test_extensions_are_lower_case_with_a_dot():
    assert all(extension == extension.lower() and extension.startswith(".") for extension in EXTENSIONS)
