import pytest
import torch

from vistok.errors import UserError
from vistok.key_maps import KeyMap, KeyRule, is_repository


def test_key_maps_join_split_and_refuse():
    keys = KeyMap(
        "test", [KeyRule("a.{i}.qk", ("x{i}.q", "x{i}.k")), KeyRule("t", ("u",), lambda x: x.T, lambda x: x.T)]
    )
    published = {"x0.q": torch.ones(2, 3), "x0.k": torch.zeros(2, 3), "u": torch.rand(2, 5)}
    ours = keys.to_ours(published)
    assert ours["a.0.qk"].shape == (4, 3) and ours["t"].shape == (5, 2)
    again = keys.to_published(ours)
    assert again.keys() == published.keys() and all(torch.equal(again[k], published[k]) for k in published)
    with pytest.raises(UserError, match=r"x0\.k missing"):
        keys.to_ours({"x0.q": published["x0.q"]})
    with pytest.raises(UserError, match=r"unknown key\(s\) z"):
        keys.to_ours(published | {"z": torch.zeros(1)})


def test_a_repository_has_an_owner_and_is_no_file_of_weights():
    assert is_repository("owner/FLUX.1-dev")
    assert not any(map(is_repository, ("name", "/owner/name", "owner/name/file", "weights/model.safetensors")))
