"""Features of an image encoder that is taken from a checkpoint alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import Hub, serve, use_hub
from tiny import write_tiny_checkpoint

from everanimate_cli.clip_features import load_clip_features
from everanimate_cli.errors import WeightsError
from everanimate_cli.person_metrics import cosine

CPU = torch.device("cpu")


def test_the_image_encoder_alone_is_fetched_and_tells_pictures_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    hub.add("owner/tiny", write_tiny_checkpoint(tmp_path / "tiny"))
    with serve([hub]) as address:
        use_hub(address, tmp_path / "cache", monkeypatch)
        with pytest.raises(WeightsError) as caught:
            load_clip_features("owner/tiny", CPU, lambda _: None, download=False)
        assert hub.requests == []
        features_of = load_clip_features("owner/tiny", CPU, lambda _: None, download=True)
    assert str(caught.value) == (
        "the image encoder of --model owner/tiny is not on this machine, and --no-download "
        "fetches none"
    )
    sent = [request.path for request in hub.requests if request.path.startswith("/cdn/")]
    assert sent == ["/cdn/owner/tiny/image_encoder/model.safetensors"]
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 256, (2, 20, 30, 3), np.uint8)
    features = features_of(one)
    assert features.ndim == 1
    assert cosine(features, features_of(one)) == pytest.approx(1)
    assert cosine(features, features_of(other)) < 1 - 1e-4
    again = load_clip_features(str(tmp_path / "tiny"), CPU, lambda _: None, download=False)
    np.testing.assert_array_equal(again(one), features)
