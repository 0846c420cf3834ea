import pytest
import torch

from vistok.flow.guidance import guide, guide_projected


@pytest.fixture
def branches():
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, 4, 4, generator=rng) for _ in range(2)]


def test_guidance_at_the_ends_of_its_scale(branches):
    conditional, null = branches
    torch.testing.assert_close(guide(conditional, null, 1.0), conditional)
    assert torch.equal(guide(conditional, null, 0.0), null)
    assert torch.equal(guide_projected(conditional, null, 1.0)[0], conditional)


def test_projected_guidance_moves_at_right_angles_and_not_too_far(branches):
    conditional, null = branches
    guided, running = guide_projected(conditional, null, 7.5, threshold=0.3)
    step = (guided - conditional).flatten(1)
    cosine = torch.nn.functional.cosine_similarity(step, conditional.flatten(1))
    torch.testing.assert_close(cosine, torch.zeros(3), atol=1e-5, rtol=0)
    assert (step.norm(dim=1) <= 6.5 * 0.3 + 1e-5).all()
    torch.testing.assert_close(running, conditional - null)


def test_projected_guidance_without_its_three_changes_is_classifier_free_guidance(branches):
    guided, _ = guide_projected(*branches, 3.0, momentum=0.0, eta=1.0, threshold=0.0)
    torch.testing.assert_close(guided, guide(*branches, 3.0))


def test_momentum_runs_over_the_unbounded_differences(branches):
    conditional, null = branches
    _, first = guide_projected(conditional, null, 2.0)
    _, second = guide_projected(conditional, null, 2.0, first)
    torch.testing.assert_close(second, 0.5 * (conditional - null))


def test_a_zero_prediction_stays_finite():
    zeros = torch.zeros(2, 3, 4, 4)
    assert guide_projected(zeros, zeros, 7.5)[0].isfinite().all()
