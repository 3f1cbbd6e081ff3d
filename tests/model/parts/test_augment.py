"""Pictures shifted at random: exactly those pixels, quickly."""

import pytest
import torch

from libra_ray.model.parts.augment import shift_pictures
from libra_ray.model.parts.draws import integers


@pytest.mark.parametrize("pixels", [1, 3])
@pytest.mark.parametrize("last", [False, True], ids=["channels_first", "channels_last"])
def test_a_shift_is_a_look_up_of_every_pixel_with_edges_repeated(pixels, last):
    images = torch.randint(0, 256, (5, 2, 3, 7, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) if last else images
    down, right = integers(2 * pixels + 1, (2, 5), images, torch.Generator().manual_seed(1)) - pixels
    shifted = shift_pictures(images, pixels, torch.Generator().manual_seed(1))
    assert len({*zip(down.tolist(), right.tolist(), strict=True)}) > 1
    for window, (rows, columns) in enumerate(zip(down, right, strict=True)):
        y, x = (torch.arange(7) + rows).clamp(0, 6), (torch.arange(9) + columns).clamp(0, 8)
        assert torch.equal(shifted[window], images[window][:, :, y][..., x])
    assert shifted.permute(0, 1, 3, 4, 2).is_contiguous(), "as convolutions want them"
