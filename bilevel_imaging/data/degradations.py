"""Clean images to measurements, reproducibly: y = A x + noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from deepinv.physics import MRI, Blur, BlurFFT, Denoising, Downsampling, GaussianNoise, Inpainting, LinearPhysics
from torch import Tensor

from bilevel_imaging.data.mri import cartesian_mask, magnitude
from bilevel_imaging.data.splits import keyed_generator
from bilevel_imaging.data.tomography import parallel_beam

__all__ = ["KINDS", "PADDINGS", "Degradation", "gaussian_kernel"]

KINDS = ("denoising", "deblurring", "inpainting", "super_resolution", "tomography", "mri")
PADDINGS = ("circular", "valid", "reflect", "replicate", "constant")


def gaussian_kernel(size: int, std: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gaussian blur kernel ``(1, 1, size, size)`` on the CPU, sum 1; ``std`` in pixels, ``size`` odd."""
    offsets = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-offsets.square() / (2 * std**2))
    kernel = torch.outer(line, line)
    return (kernel / kernel.sum()).to(dtype)[None, None]


@dataclass(frozen=True)
class Degradation:
    """A forward operator and a noise level.

    - denoising: A is the identity.
    - deblurring: Gaussian blur.
    - inpainting: missing pixels are 0.
    - super_resolution: every ``factor``-th pixel, in rows and columns, after a Gaussian blur (deepinv's
      ``Downsampling``, circular) of standard deviation factor / 2 pixels, cut off at three times that.
    - tomography: parallel-beam projections of square images, scaled to norm 1; see
      :func:`bilevel_imaging.data.tomography.parallel_beam`.
    - mri: single-coil, unitary Fourier transform with some columns of k-space measured; see
      :func:`bilevel_imaging.data.mri.cartesian_mask`. Images have two channels, real and imaginary part.

    Attributes:
        kind: of these.
        sigma: standard deviation of the Gaussian noise. In units of the image range [0, 1]; in tomography, of the
            largest absolute value in the noiseless sinogram of the image; in mri, of the largest magnitude of the
            image, for the real and the imaginary part of every measured entry each.
        blur_size: width of the blur kernel of deblurring, pixels, odd.
        blur_std: standard deviation of that kernel, pixels.
        kept_fraction: part of the pixels that inpainting keeps; 0.7 loses 30 %. All channels of a pixel go together.
        seed: of noise and mask.
        sigma_range: (low, high): every image has a noise level of its own, uniform between them, instead of ``sigma``.
        padding: what deblurring sees outside of the image: "circular", "reflect", "replicate", "constant" (zeros) or
            "valid" (nothing: y is smaller than x by the kernel).
        factor: of super_resolution, >= 2.
        views: directions of tomography, equispaced in [0, 180) degrees.
        acceleration: of mri: 1 / part of the columns that are measured, >= 1.
        center_fraction: of mri: part of the columns around the zero frequency that is measured for certain.

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
    padding: str = "circular"
    factor: int = 2
    views: int = 60
    acceleration: float = 4.0
    center_fraction: float = 0.08

    def __post_init__(self) -> None:
        for name, value, allowed in (("kind", self.kind, KINDS), ("padding", self.padding, PADDINGS)):
            if value not in allowed:
                raise ValueError(f"Expected {name} as one of {', '.join(allowed)}. Got {value!r}.")
        if not 0 <= self.sigma < math.inf:
            raise ValueError(f"Expected sigma >= 0 and finite. Got {self.sigma}.")
        if self.sigma_range is not None and not 0 <= self.sigma_range[0] <= self.sigma_range[1] < math.inf:
            raise ValueError(f"Expected sigma_range with 0 <= low <= high, finite. Got {self.sigma_range}.")
        if self.blur_size < 1 or self.blur_size % 2 == 0:
            raise ValueError(f"Expected blur_size odd and >= 1, so that the kernel has a center. Got {self.blur_size}.")
        if not 0 < self.blur_std < math.inf:
            raise ValueError(f"Expected blur_std > 0 and finite. Got {self.blur_std}.")
        if self.factor < 2 or self.views < 1 or not 1 <= self.acceleration < math.inf:
            raise ValueError(
                f"Expected factor >= 2, views >= 1 and a finite acceleration >= 1. Got {self.factor}, {self.views} and "
                f"{self.acceleration}."
            )
        for name in ("kept_fraction", "center_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"Expected {name} in (0, 1]. Got {getattr(self, name)}.")

    def image(self, x: Tensor) -> Tensor:
        """What is reconstructed of an image ``(C, H, W)`` or a batch of them.

        That is x itself; in mri, where x has one channel, that is the real part and the imaginary part is zero.

        Raises:
            ValueError: a color image in mri.
        """
        if self.kind != "mri" or x.shape[-3] == 2:
            return x
        if x.shape[-3] != 1:
            raise ValueError(f"Expected gray images (1, H, W) for mri. Got {x.shape[-3]} channels.")
        return torch.cat([x, torch.zeros_like(x)], -3)

    def physics(
        self,
        image_size: Sequence[int],
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
    ) -> LinearPhysics:
        """The deepinv operator for images ``(C, H, W)``; the same arguments give the same operator.

        Its noise model, where it has one, knows sigma but is not seeded: take measurements with :meth:`measure`.

        Raises:
            ValueError: the kernel is larger than the image, or the operator does not take images of this shape.
        """
        shape = tuple(int(n) for n in image_size)
        noise = GaussianNoise(sigma=torch.tensor(self.sigma, dtype=dtype, device=device))
        if self.kind == "deblurring":
            # The kernel is built in the dtype asked for: the transfer function inherits its precision, and moving the
            # finished operator with .to(float64) would drop its phase.
            kernel = _fitting_kernel("blur_size", self.blur_size, self.blur_std, shape, dtype).to(device)
            if self.padding == "circular":
                return BlurFFT(shape, kernel, device=device, noise_model=noise)
            return Blur(kernel, padding=self.padding, device=device, noise_model=noise)
        if self.kind == "inpainting":
            mask = self.mask(*shape[1:]).to(device=device, dtype=dtype).expand(shape).contiguous()
            return Inpainting(shape, mask, device=device, noise_model=noise)
        if self.kind == "super_resolution":
            size, std = 2 * math.ceil(1.5 * self.factor) + 1, self.factor / 2
            kernel = _fitting_kernel("a kernel of factor", size, std, shape, dtype).to(device)
            return Downsampling(shape, kernel, self.factor, device=device, noise_model=noise)
        if self.kind == "tomography":
            if shape[-1] != shape[-2]:
                raise ValueError(f"Expected square images for tomography. Got {shape[-2]}x{shape[-1]}: crop them.")
            return parallel_beam(shape[-1], self.views, dtype, device)[0]
        if self.kind == "mri":
            if shape[0] != 2:
                raise ValueError(f"Expected images (2, H, W) for mri, as from image(). Got {shape[0]} channels.")
            lines = self.lines(shape[-1]).to(dtype).expand(1, 1, *shape[1:]).clone()
            return MRI(mask=lines, img_size=shape, device=device, noise_model=noise)
        return Denoising(noise, device=device)

    def mask(self, height: int, width: int) -> Tensor:
        """Pixels that inpainting keeps, bool ``(H, W)``: exactly the rounded fraction, by seed and size alone."""
        kept = max(1, round(self.kept_fraction * height * width))
        order = torch.randperm(height * width, generator=keyed_generator("mask", self.seed, height, width))
        mask = torch.zeros(height * width, dtype=torch.bool)
        mask[order[:kept]] = True
        return mask.view(height, width)

    def lines(self, columns: int) -> Tensor:
        """Columns of k-space that mri measures, ``(columns,)`` of 0 and 1, by seed and number alone."""
        generator = keyed_generator("lines", self.seed, columns)
        return cartesian_mask(columns, self.acceleration, self.center_fraction, generator)

    def noise_level(self, index: int) -> float:
        """Standard deviation of the noise of image ``index`` in the units of sigma, by (seed, index) alone."""
        if self.sigma_range is None:
            return self.sigma
        low, high = self.sigma_range
        generator = keyed_generator("noise level", self.seed, int(index))
        return low + (high - low) * float(torch.rand((), dtype=torch.float64, generator=generator))

    def noise(self, shape: Sequence[int], index: int) -> Tensor:
        """Noise of image ``index`` in the units of sigma: ``shape`` of one measurement, float64, CPU.

        By (seed, index, shape) alone.
        """
        shape = tuple(int(n) for n in shape)
        return self.noise_level(index) * torch.randn(
            shape, dtype=torch.float64, generator=keyed_generator("noise", self.seed, int(index), shape)
        )

    def measure(self, x: Tensor, index: int | Sequence[int] | Tensor, physics: LinearPhysics | None = None) -> Tensor:
        """A x plus noise, neither clipped nor quantized; what inpainting and mri do not measure stays 0.

        Noise is drawn in float64 on the CPU and then cast: an image gets the same noise in any batch, dtype or device.

        Args:
            x: one image ``(C, H, W)`` with one index, or a batch ``(B, C, H, W)`` with B of them; see :meth:`image`.
            index: what identifies the images, e.g. their positions in the data set.
            physics: what :meth:`physics` returned for this size, dtype and device, to save building it again.

        Returns:
            measurements of the dtype and device of x, with its batch dimension if it has one.

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
        with torch.no_grad():
            clean = physics.A(batch)
            noise = torch.stack([self.noise(clean.shape[1:], i) for i in indices]).to(x)
            if self.kind in ("tomography", "mri"):
                noise *= (clean if self.kind == "tomography" else magnitude(batch)).abs().amax((1, 2, 3), keepdim=True)
            if self.kind in ("inpainting", "mri"):
                noise *= physics.mask
            y = clean + noise
        return y.squeeze(0) if x.dim() == 3 else y


def _fitting_kernel(what: str, size: int, std: float, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if size > min(shape[-2:]):
        raise ValueError(f"Expected {what} <= the image size. Got {size} for a {shape[-2]}x{shape[-1]} image.")
    return gaussian_kernel(size, std, dtype)
