"""A photograph is colored in overlapping tiles by a U-Net that trained on one crop a batch: whose tiles join?"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from streamnorm import SP1, SampleNorm, StreamingNorm

PICTURE = Path(__file__).parents[2] / "docs/gallery/tiles.png"
NORMS = {"StreamingNorm": StreamingNorm, "group": partial(nn.GroupNorm, 4), "instance": partial(SampleNorm, ref=SP1)}
TILE, EDGE, CROP, INNER = 32, 8, 48, (..., slice(8, -8), slice(8, -8))


class UNet(nn.Module):
    def __init__(self, norm: partial | type[nn.Module]) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        self.fine, self.out = nn.Sequential(conv(1, 8, bias=False), norm(8), nn.ReLU()), conv(24, 3)
        self.coarse = nn.Sequential(conv(8, 16, bias=False), norm(16), nn.ReLU())

    def forward(self, gray: Tensor) -> Tensor:
        fine = self.fine(gray)
        return self.out(torch.cat([fine, F.interpolate(self.coarse(F.avg_pool2d(fine, 2)), scale_factor=2)], 1))


def tiled(model: UNet, gray: Tensor) -> Tensor:
    rows = F.pad(gray, [EDGE] * 4, mode="reflect").unfold(2, CROP, TILE).unfold(3, CROP, TILE)[0, 0]
    return torch.cat([torch.cat([model(t[None, None])[INNER] for t in row], 3) for row in rows], 2)


def main(picture: Path = PICTURE, steps: int = 300) -> dict[str, float]:
    photo = torch.tensor(load_sample_image("china.jpg")[:384:2, :640:2] / 255).float().permute(2, 0, 1)[None]
    gray = photo.mean(1, keepdim=True)
    seams, figure = {}, Figure(figsize=(9, 2.2), layout="constrained")
    for axes, (name, norm) in zip(figure.subplots(1, 3), NORMS.items(), strict=True):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam((model := UNet(norm)).parameters(), lr=0.01)
        for _ in range(steps):
            crop = (..., *(slice(i := int(torch.randint(s - CROP, ())), i + CROP) for s in gray.shape[2:]))
            F.mse_loss(model(gray[crop]), photo[crop]).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            made, whole = tiled(model.eval(), gray), model(gray)
        seams[name] = (made - whole)[INNER].abs().mean().item()
        axes.imshow(made[0].clamp(0, 1).permute(1, 2, 0).numpy())
        axes.set(title=f"{name}: off by {seams[name]:.2g}", xticks=[], yticks=[])
    figure.savefig(picture, dpi=110)
    print("tiles less the whole image:", ", ".join(f"{name} {seam:.2g}" for name, seam in seams.items()))
    return seams


if __name__ == "__main__":
    main()
