"""A file of Inception weights as the published one, with random weights."""

import torch
import torch_fidelity.feature_extractor_inceptionv3 as published


def write_random_inception(path, images, monkeypatch):
    """A weight file in the published layout whose features differ between images (default weights give a constant)."""
    with monkeypatch.context() as patch:
        patch.setattr(published, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(published.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = published.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(images)
    torch.save(dict(network.state_dict()), path)
