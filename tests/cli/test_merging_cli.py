"""``python -m vistok.merging benchmark`` as a user types it."""

import pytest
import timm
import torch
from safetensors.torch import save_file

ARGS = ("benchmark", "--model", "test_vit", "--count", 4, "--batch-size", 2, "--rounds", 1)


@pytest.fixture
def benchmark(run_script):
    """Runs the command; gives exit code, the rows of the table by their name, stdout and stderr."""

    def run(*words):
        code, out, err = run_script("vistok.merging", *ARGS, *words)
        cells = (line.strip("│ ").split("│") for line in out.splitlines() if line.startswith("│"))
        return code, {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}, out, err

    return run


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights that tell images apart, which fresh ones hardly do."""
    generator = torch.Generator().manual_seed(0)
    state = timm.create_model("test_vit").state_dict()
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file({key: torch.randn(value.shape, generator=generator) for key, value in state.items()}, path)
    return path


def test_a_row_for_each_setting(benchmark, weights):
    code, rows, out, _ = benchmark("--weights", weights, "--methods", "tome,pitome", "--r", "0,8", "--ratio", "0.9")
    assert code == 0 and "weights drawn" not in out
    settings = [f"{method} {setting}" for method in ("tome", "pitome") for setting in ("r=0", "r=8", "ratio=0.9")]
    assert list(rows) == ["unmerged", *settings]
    tokens, gmacs, speed, ratio, same, cosine = zip(*rows.values())
    assert tokens == ("101", "101", "53", "55", "101", "53", "55")  # 100 patches, 6 blocks
    assert gmacs[1] == gmacs[4] == gmacs[0] and float(gmacs[2]) < float(gmacs[0])
    assert ratio[0] == "1.00" and all(float(value) > 0 for value in (*speed, *ratio))
    assert same[1] == same[4] == "100.0%" and cosine[1] == cosine[4] == "1.0000" and float(cosine[2]) < 1


def test_fresh_weights_are_told(benchmark):
    code, rows, out, _ = benchmark("--methods", "random", "--r", 4)
    assert code == 0 and list(rows) == ["unmerged", "random r=4"] and "weights drawn with seed 0" in out


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "nothing to measure: give --r or --ratio"),
        (("--ratio", "1.5"), "ratio must lie in (0, 1], got 1.5"),
        (("--ratio", "most"), "argument --ratio: must be numbers such as 0.9,0.95, got 'most'"),
        (("--r", "8", "--methods", "tomme"), "no merging method 'tomme': choose from tome, pitome"),
        (("--r", "8", "--inflection", "3"), "inflection must lie in [-1, 1], got 3.0"),
        (("--r", "8", "--model", "vit_smal"), "timm has no model 'vit_smal'; did you mean"),
        (("--r", "8", "--model", "vit_pwee_patch16_reg1_gap_256"), "blocks.0 (ParallelScalingBlock)"),
        (("--r", "8", "--weights", "missing.safetensors"), "missing.safetensors"),
        (("--r", "8", "--data", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_line(benchmark, words, message):
    code, _, _, err = benchmark(*words)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0] and "Traceback" not in err


def test_too_many_merges_warn(benchmark):
    with pytest.warns(UserWarning, match="block 0 was asked to merge 90 tokens and can merge 50"):
        code, rows, _, _ = benchmark("--methods", "tome", "--r", "90")
    assert code == 0 and rows["tome r=90"][0] == "3"
