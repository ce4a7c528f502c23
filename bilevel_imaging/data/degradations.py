"""Clean images to measurements, reproducibly: y = A x + noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deepinv.physics import BlurFFT, Denoising, GaussianNoise, Inpainting, LinearPhysics
from torch import Tensor

from bilevel_imaging.data.splits import keyed_generator

__all__ = ["KINDS", "Degradation", "gaussian_kernel"]

KINDS = ("denoising", "deblurring", "inpainting")


def gaussian_kernel(size: int, std: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gaussian blur kernel ``(1, 1, size, size)`` on the CPU, sum 1; ``std`` in pixels, ``size`` odd."""
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-offsets.square() / (2 * std**2))
    kernel = torch.outer(line, line)
    return (kernel / kernel.sum()).to(dtype)[None, None]


@dataclass(frozen=True)
class Degradation:
    """A forward operator and a noise level.

    Attributes:
        kind: "denoising" (A = identity), "deblurring" (circular Gaussian blur) or "inpainting" (missing pixels are 0).
        sigma: standard deviation of the Gaussian noise, in units of the image range [0, 1].
        blur_size: width of the blur kernel, pixels, odd.
        blur_std: standard deviation of the blur kernel, pixels.
        kept_fraction: part of the pixels that inpainting keeps; 0.7 loses 30 %. All channels of a pixel go together.
        seed: of noise and mask.
        sigma_range: (low, high): every image has a noise level of its own, uniform between them, instead of ``sigma``.

    Raises:
        ValueError: unknown kind or a number out of range.
    """

    kind: str = "denoising"
    sigma: float = 0.1
    blur_size: int = 9
    blur_std: float = 1.5
    kept_fraction: float = 0.7
    seed: int = 0
    sigma_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Expected kind as one of {', '.join(KINDS)}. Got {self.kind!r}.")
        if not 0 <= self.sigma < float("inf"):
            raise ValueError(f"Expected sigma >= 0 and finite. Got {self.sigma}.")
        if self.sigma_range is not None and not 0 <= self.sigma_range[0] <= self.sigma_range[1] < float("inf"):
            raise ValueError(f"Expected sigma_range with 0 <= low <= high, finite. Got {self.sigma_range}.")
        if self.blur_size < 1 or self.blur_size % 2 == 0:
            raise ValueError(f"Expected blur_size odd and >= 1, so that the kernel has a center. Got {self.blur_size}.")
        if not 0 < self.blur_std < float("inf"):
            raise ValueError(f"Expected blur_std > 0 and finite. Got {self.blur_std}.")
        if not 0 < self.kept_fraction <= 1:
            raise ValueError(f"Expected kept_fraction in (0, 1]. Got {self.kept_fraction}.")

    def physics(
        self,
        image_size: Sequence[int],
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
    ) -> LinearPhysics:
        """The deepinv operator for images ``(C, H, W)``; the same arguments give the same operator.

        Its noise model knows sigma, but is not seeded: take measurements with :meth:`measure`.

        Raises:
            ValueError: the blur kernel is larger than the image.
        """
        channels, height, width = (int(n) for n in image_size)
        noise = GaussianNoise(sigma=torch.tensor(self.sigma, dtype=dtype, device=device))
        if self.kind == "denoising":
            return Denoising(noise, device=device)
        if self.kind == "deblurring":
            if self.blur_size > min(height, width):
                raise ValueError(
                    f"Expected blur_size <= the image size. Got {self.blur_size} for a {height}x{width} image."
                )
            # The kernel is built in the dtype asked for: the transfer function inherits its precision, and moving the
            # finished operator with .to(float64) would drop its phase.
            kernel = gaussian_kernel(self.blur_size, self.blur_std, dtype).to(device)
            return BlurFFT((channels, height, width), kernel, device=device, noise_model=noise)
        mask = self.mask(height, width).to(device=device, dtype=dtype).expand(channels, height, width).contiguous()
        return Inpainting((channels, height, width), mask, device=device, noise_model=noise)

    def mask(self, height: int, width: int) -> Tensor:
        """Pixels that inpainting keeps, bool ``(H, W)``: exactly the rounded fraction, by seed and size alone."""
        kept = max(1, round(self.kept_fraction * height * width))
        order = torch.randperm(height * width, generator=keyed_generator("mask", self.seed, height, width))
        mask = torch.zeros(height * width, dtype=torch.bool)
        mask[order[:kept]] = True
        return mask.view(height, width)

    def noise_level(self, index: int) -> float:
        """Standard deviation of the noise of image ``index``, by (seed, index) alone."""
        if self.sigma_range is None:
            return self.sigma
        low, high = self.sigma_range
        generator = keyed_generator("noise level", self.seed, int(index))
        return low + (high - low) * float(torch.rand((), dtype=torch.float64, generator=generator))

    def noise(self, shape: Sequence[int], index: int) -> Tensor:
        """Noise of image ``index``: ``shape`` of one measurement, float64, CPU, by (seed, index, shape) alone."""
        shape = tuple(int(n) for n in shape)
        return self.noise_level(index) * torch.randn(
            shape, dtype=torch.float64, generator=keyed_generator("noise", self.seed, int(index), shape)
        )

    def measure(self, x: Tensor, index: int | Sequence[int] | Tensor, physics: LinearPhysics | None = None) -> Tensor:
        """A x plus noise, neither clipped nor quantized; the missing pixels of inpainting stay 0.

        Noise is drawn in float64 on the CPU and then cast: an image gets the same noise in any batch, dtype or device.

        Args:
            x: one image ``(C, H, W)`` with one index, or a batch ``(B, C, H, W)`` with B of them.
            index: what identifies the images, e.g. their positions in the data set.
            physics: what :meth:`physics` returned for this size, dtype and device, to save building it again.

        Returns:
            measurements of the shape, dtype and device of x.

        Raises:
            ValueError: x is neither, or the numbers of images and indices differ.
        """
        indices = torch.as_tensor(index).reshape(-1).tolist()
        batch = x.unsqueeze(0) if x.dim() == 3 else x
        if batch.dim() != 4 or len(indices) != batch.shape[0]:
            raise ValueError(
                f"Expected x as (C, H, W) with one index or (B, C, H, W) with B of them. "
                f"Got x {tuple(x.shape)} and {len(indices)} indices."
            )
        if physics is None:
            physics = self.physics(batch.shape[1:], x.dtype, x.device)
        noise = torch.stack([self.noise(batch.shape[1:], i) for i in indices]).to(x)
        with torch.no_grad():
            clean = physics.A(batch)
            y = clean + (noise * physics.mask if self.kind == "inpainting" else noise)
        return y.squeeze(0) if x.dim() == 3 else y
