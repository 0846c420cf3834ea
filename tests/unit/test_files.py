import pytest
import torch

from vistok.errors import UserError
from vistok.files import new_folder, write_atomically


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def full_disk(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_atomically(path, full_disk)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/deep/x"):
        write_atomically(tmp_path / "file/deep/x", lambda path: path.touch())


class Interrupted:
    """A file that takes two pieces, then raises ``error``."""

    def __init__(self, error):
        self.error, self.pieces = error, 0

    def write(self, data):
        self.pieces += 1
        if self.pieces > 2:
            raise self.error
        return len(data)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(28, "No space left on device"), UserError, r"No space left on device$"),
        (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError, "inline_container"),
        (KeyboardInterrupt(), RuntimeError, "inline_container"),
    ],
)
def test_the_disk_is_quoted_not_the_library_that_met_it(tmp_path, error, raised, message):
    def write(partial):
        partial.touch()
        torch.save({"x": torch.zeros(9)}, Interrupted(error))  # torch covers the error with one of its own

    with pytest.raises(raised, match=message):
        write_atomically(tmp_path / "x", write)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
def test_what_the_disk_has_no_part_in_is_passed_on(tmp_path, error):
    def write(partial):
        partial.write_text("half")
        raise error

    with pytest.raises(type(error)) as caught:
        write_atomically(tmp_path / "x", write)
    assert caught.value is error and not list(tmp_path.iterdir())


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / ".out.partial/of a killed process").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    with pytest.raises(UserError, match="out exists already"), new_folder(tmp_path / "out"):
        pass
