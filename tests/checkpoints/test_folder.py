"""A folder is there whole or not at all, whatever lies in it."""

import pytest

from endistill_jax.core.errors import UserError
from endistill_jax.storage import replace_folder


def test_folders_inside_come_along(tmp_path):
    with replace_folder(tmp_path / "model", overwrite=False) as partial:
        (partial / "array" / "deep").mkdir(parents=True)
        (partial / "array" / "deep" / "0.0").write_bytes(b"piece")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "array" / "deep" / "0.0").read_bytes() == b"piece"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folders_inside_are_removed_after_a_failure(tmp_path):
    with (
        pytest.raises(UserError, match="could not write .*model: No space left"),
        replace_folder(tmp_path / "model", overwrite=False) as partial,
    ):
        (partial / "array").mkdir()
        (partial / "array" / "0.0").write_bytes(b"piece")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_only_a_folder_with_the_marker_is_replaced(tmp_path):
    for name in ("known", "unknown"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("old")
    (tmp_path / "known" / "checkpoint").write_text("")
    with replace_folder(tmp_path / "known", overwrite=True, marker="checkpoint") as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in (tmp_path / "known").iterdir()] == ["new"]
    for name, overwrite, marker in (("unknown", True, "checkpoint"), ("known", False, "new"), ("known", True, "other")):
        with (
            pytest.raises(UserError, match="is not empty"),
            replace_folder(tmp_path / name, overwrite=overwrite, marker=marker),
        ):
            pass
    assert (tmp_path / "unknown" / "old").read_text() == "old"
