"""A bank of small filters applied to images, its adjoint, and true bounds of its norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from bilevel_imaging import native
from bilevel_imaging.regularizers.filter_chain import transfer_power

BOUNDARIES = ("symmetric", "zero")
# images and rows of a field ``(B P, H, W, K)``
Part = tuple[slice, slice]
# responses evaluated together: pieces of memory of this size are used again and again, larger ones are given back to
# the system and cleared every time, which takes longer than the arithmetic
RESPONSES = {"cpu": 2**20, "cuda": 2**27}
# the adjoint computes tiles of this many pixels squared as the channels of one strided convolution
TILE = 4


class FilterBank:
    """W x = (w_k * x)_k for frozen filters w_k (correlations), with responses in the layout ``(B, P H, W, K)``.

    Filters of C channels see an image of P C channels as P planes, one below the other in the responses: filters of one
    channel act on every channel of a color or complex image, and P = 1 when the filters see all channels.

    Beyond its border an image is continued by reflection about the edge of the last pixel ("symmetric", the extension
    of the discrete cosine transform) or by zeros.

    Args:
        kernels: ``(K, C, s, s)``, s odd; the dtype and device of what W is applied to.
        boundary: "symmetric" or "zero".
        planes: P.
    """

    def __init__(self, kernels: Tensor, boundary: str, planes: int = 1):
        self.kernels, self.boundary, self.planes = kernels, boundary, planes
        self.size, self.margin = kernels.shape[-1], kernels.shape[-1] // 2

    @property
    def extension(self) -> float:
        """Norm of the continuation beyond the border: a corner pixel appears four times."""
        return 2.0 if self.boundary == "symmetric" else 1.0

    def apply(self, x: Tensor) -> Tensor:
        """W x, ``(B, P C, H, W)`` to ``(B, P H, W, K)``."""
        responses = self._apply(extend(self._split(x), self.margin, self.boundary))
        return responses.reshape(x.shape[0], -1, *responses.shape[2:])

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.kernels.shape[1], *x.shape[-2:])

    def _apply(self, extended: Tensor) -> Tensor:
        if torch.is_grad_enabled() or extended.device.type != "cpu":
            return functional.conv2d(extended, self.kernels).permute(0, 2, 3, 1)
        if extended.dtype == torch.float64 and self._compiled is not None:
            return self._compiled.apply(extended.squeeze(1))
        if extended.dtype == torch.float32:  # the layout of the filters chooses the fast kernel
            return functional.conv2d(extended, self._channels_last).permute(0, 2, 3, 1)
        size = (extended.shape[-2] - 2 * self.margin, extended.shape[-1] - 2 * self.margin)
        out = extended.new_empty((extended.shape[0], *size, self.kernels.shape[0]))
        for image, responses in zip(extended, out, strict=True):
            patches = functional.unfold(image[None], self.size)[0]
            responses.view(-1, responses.shape[-1]).copy_((self._matrix @ patches).t())
        return out

    def adjoint(self, z: Tensor) -> Tensor:
        """W^T z, ``(B, P H, W, K)`` to ``(B, P C, H, W)``."""
        planes = z.reshape(-1, z.shape[1] // self.planes, *z.shape[2:]).permute(0, 3, 1, 2)
        images = fold_back(self._adjoint(planes), self.margin, self.boundary)
        return images.reshape(z.shape[0], -1, *images.shape[-2:])

    def _adjoint(self, z: Tensor) -> Tensor:
        if torch.is_grad_enabled() or z.device.type != "cpu":
            return functional.conv_transpose2d(z, self.kernels)
        if self._compiled is not None:
            return self._compiled.adjoint(z.permute(0, 2, 3, 1)).unsqueeze(1)
        if z.dtype == torch.float32:
            return self._tiled_adjoint(z)
        height, width = z.shape[-2] + 2 * self.margin, z.shape[-1] + 2 * self.margin
        out = z.new_empty((z.shape[0], self.kernels.shape[1], height, width))
        for responses, image in zip(z, out, strict=True):
            patches = self._matrix.t() @ responses.flatten(1)
            image.copy_(functional.fold(patches[None], (height, width), self.size)[0])
        return out

    @cached_property
    def _compiled(self) -> native.Bank | None:
        """The same in compiled code, for filters of one channel; it needs no responses in memory."""
        usable = self.kernels.shape[1] == 1 and native.serves(self.kernels)
        return native.Bank(self.kernels[:, 0]) if usable else None

    def weights(self, field: Tensor) -> Tensor:
        """c ``(B P, H, W, K)`` in the form that :meth:`product` works with."""
        return field if self._compiled is None else self._compiled.planes(field)

    def product(self, x: Tensor, weights: Tensor) -> Tensor:
        """W^T diag(c) W x, without gradients; see :meth:`weights`."""
        if self._compiled is None:
            return self.through(x, lambda z, part: z.mul_(weights[part]))
        extended = extend(self._split(x), self.margin, self.boundary)
        images = self._compiled.product(extended.squeeze(1), weights).unsqueeze(1)
        return fold_back(images, self.margin, self.boundary).reshape(x.shape)

    @cached_property
    def absolute(self) -> FilterBank:
        """The same with the absolute values of the filters."""
        return FilterBank(self.kernels.abs(), self.boundary, self.planes)

    @cached_property
    def _matrix(self) -> Tensor:
        return self.kernels.flatten(1)

    @cached_property
    def _channels_last(self) -> Tensor:
        return self.kernels.to(memory_format=torch.channels_last)

    @cached_property
    def _tiles(self) -> Tensor:
        """The flipped filters at every place of a tile, ``(C TILE^2, K, s + TILE - 1, s + TILE - 1)``.

        A convolution with one output channel leaves most of a vector unit idle. As many channels as a tile has pixels
        fill it, which is several times faster although each sees zeros around its filter.
        """
        count, channels, size = self.kernels.shape[:3]
        tiles = self.kernels.new_zeros((channels, TILE, TILE, count, size + TILE - 1, size + TILE - 1))
        flipped = self.kernels.flip(2, 3).transpose(0, 1)
        for row in range(TILE):
            for column in range(TILE):
                tiles[:, row, column, :, row : row + size, column : column + size] = flipped
        return tiles.flatten(0, 2).to(memory_format=torch.channels_last)

    def _tiled_adjoint(self, z: Tensor) -> Tensor:
        height, width = z.shape[-2] + 2 * self.margin, z.shape[-1] + 2 * self.margin
        shifts = _tile_shift(height), _tile_shift(width)
        padding = (self.size - 1 + shifts[0], self.size - 1 + shifts[1])
        tiles = functional.conv2d(z, self._tiles, padding=padding, stride=TILE)
        whole = functional.pixel_shuffle(tiles, TILE)
        return whole[..., shifts[0] : shifts[0] + height, shifts[1] : shifts[1] + width]

    def responses(self, x: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """W x by parts, without gradients: place ``[images, rows]`` in a field ``(B P, H, W, K)``, and numbers."""
        extended = extend(self._split(x), self.margin, self.boundary)
        for images, rows in parts((len(extended), *x.shape[-2:], len(self.kernels)), x.device):
            yield (images, rows), self._apply(extended[images, :, rows.start : rows.stop + 2 * self.margin])

    def through(self, x: Tensor, function: Callable[[Tensor, Part], Tensor]) -> Tensor:
        """W^T f(W x) for an elementwise f, without gradients: all responses of a large image are never stored together.

        Args:
            x: ``(B, P C, H, W)``.
            function: responses of a part, its own to change, and their place (see ``responses``), to numbers of the
                same shape.
        """
        height, width = (n + 2 * self.margin for n in x.shape[-2:])
        out = x.new_zeros((len(x) * self.planes, self.kernels.shape[1], height, width))
        for part, z in self.responses(x):
            images, rows = part
            values = function(z, part).permute(0, 3, 1, 2)
            out[images, :, rows.start : rows.stop + 2 * self.margin] += self._adjoint(values)
        return fold_back(out, self.margin, self.boundary).reshape(x.shape)

    def correlation(self, z: Tensor, x: Tensor) -> Tensor:
        """sum_i z_k(i) x(i + a) for all shifts a of a filter and all images, ``(K, C, s, s)``: <z, W x> by filters."""
        extended = extend(self._split(x), self.margin, self.boundary)
        z = z.reshape(len(extended), -1, *z.shape[2:])
        total = torch.zeros_like(self.kernels)
        for image, responses in zip(extended, z, strict=True):
            patches = functional.unfold(image[None], self.size)[0]
            total += (patches @ responses.reshape(-1, responses.shape[-1])).t().reshape(self.kernels.shape)
        return total

    def row_norms(self) -> Tensor:
        """sup over pixels of the norm of a row of W_k, ``(K,)``: |(W_k e)_i| <= row_norm_k ||e||."""
        return self.extension * self.kernels.flatten(1).norm(dim=1)

    @cached_property
    def power(self) -> Tensor:
        """sum_c |w_kc^|^2, ``(K, n)`` float64; see ``transfer_power``."""
        return transfer_power(self.kernels).sum(1)

    def squared_norm(self, weights: Tensor) -> Tensor:
        """Upper bound of lambda_max(sum_k weights_k W_k^T W_k) for weights >= 0, ``(..., K)`` to ``(...)`` float64."""
        return self.extension**2 * (weights.double() @ self.power).amax(-1) * (1 + 1e-10)

    @cached_property
    def _autocorrelation(self) -> Tensor:
        """Of every filter and channel, lags of all four signs added up, ``(K, C, s, s)`` for lags 0 ... s - 1."""
        kernels, size = self.kernels.flatten(0, 1).unsqueeze(0), self.size
        count = kernels.shape[1]
        lags = functional.conv2d(kernels, kernels.transpose(0, 1), padding=size - 1, groups=count)[0]
        lags = lags + lags.flip(-1)
        lags = (lags + lags.flip(-2))[:, size - 1 :, size - 1 :].clone()
        lags[:, 0] /= 2  # a lag 0 has one sign
        lags[:, :, 0] /= 2
        return lags.reshape(self.kernels.shape)

    def cosine_spectrum(self, weights: Tensor, height: int, width: int) -> Tensor:
        """Response of sum_k weights_k W_k^T W_k at the frequencies of the cosine basis, ``(B, K)`` to
        ``(B, C, height, width)``; averaged over the reflections of a filter, exact for symmetric ones."""
        lags = (weights[:, :, None, None, None] * self._autocorrelation).sum(1)
        steps = torch.arange(self.size, dtype=torch.float64)
        rows, columns = (
            torch.cos(math.pi / n * torch.arange(n, dtype=torch.float64).unsqueeze(1) * steps).to(lags)
            for n in (height, width)
        )
        # image by image: the bits of a sample do not depend on its batch
        return torch.stack([rows @ lag @ columns.T for lag in lags]).clamp_(min=0)

    def mean_spectrum(self, weights: Tensor, shape: torch.Size) -> Tensor:
        """The same of W^T diag(weights) W for images of that shape, every weight replaced by its mean over the image,
        ``(B, P H, W, K)`` to ``(B, P C, H, W)``."""
        mean = weights.reshape(shape[0] * self.planes, -1, weights.shape[-1]).mean(1)
        return self.cosine_spectrum(mean, *shape[-2:]).reshape(shape)

    def diagonal(self, weights: Tensor) -> Tensor:
        """Diagonal of W^T diag(weights) W, ``(B, P H, W, K)`` to ``(B, P C, H, W)``; exact but for the border."""
        return FilterBank(self.kernels.square(), self.boundary, self.planes).adjoint(weights)

    @property
    def patch_factor(self) -> float:
        """||c * e|| <= patch_factor ||c|| ||e|| for filters c of this size: ||c||_1 <= sqrt(C) s ||c||."""
        return self.extension * math.sqrt(self.kernels.shape[1]) * self.size

    def patch_deviations(self, x: Tensor) -> Tensor:
        """Norm of the patch around every pixel minus its mean by channels, ``(B, P C, H, W)`` to ``(B, P H, W)``."""
        extended = extend(self._split(x), self.margin, self.boundary)
        area = self.size**2
        mean = functional.avg_pool2d(extended, self.size, stride=1)
        # around the mean of the image the squares cancel least
        center = extended.mean((-2, -1), keepdim=True)
        square = functional.avg_pool2d((extended - center).square(), self.size, stride=1)
        norms = (area * (square - (mean - center).square()).clamp(min=0)).sum(1).sqrt()
        return norms.reshape(x.shape[0], -1, norms.shape[-1])


def parts(shape: tuple[int, int, int, int], device: torch.device) -> Iterator[Part]:
    """A field ``(B P, H, W, K)`` cut into several images, or into the rows of one."""
    count, height, width, filters = shape
    limit = RESPONSES.get(device.type, RESPONSES["cuda"])
    images, rows = max(1, limit // (height * width * filters)), height
    if images == 1 and height * width * filters > limit:
        rows = max(1, limit // (width * filters))
    for image in range(0, count, images):
        for row in range(0, height, rows):
            yield slice(image, min(image + images, count)), slice(row, min(row + rows, height))


def _tile_shift(length: int) -> int:
    """Least padding r in front such that whole tiles cover r + length pixels, with r more behind."""
    return next(r for r in range(TILE) if (length + 2 * r) % TILE <= r)


def extend(x: Tensor, margin: int, boundary: str) -> Tensor:
    """x continued by ``margin`` pixels on every side, ``(..., H, W)`` to ``(..., H + 2 margin, W + 2 margin)``.

    Raises:
        ValueError: if a symmetric margin is wider than the image.
    """
    if margin == 0:
        return x
    if boundary == "zero":
        return functional.pad(x, (margin,) * 4)
    check_margin(margin, boundary, x.shape)
    x = torch.cat([x[..., :margin].flip(-1), x, x[..., -margin:].flip(-1)], -1)
    return torch.cat([x[..., :margin, :].flip(-2), x, x[..., -margin:, :].flip(-2)], -2)


def check_margin(margin: int, boundary: str, shape: torch.Size) -> None:
    """Refuse images ``(..., H, W)`` that are too small to be continued.

    Raises:
        ValueError: a symmetric margin wider than the image.
    """
    if boundary != "zero" and margin > min(shape[-2:]):
        raise ValueError(
            f"Expected images of at least {margin} x {margin} pixels for filters of size {2 * margin + 1}. Got "
            f"{shape[-2]} x {shape[-1]}; choose smaller filters or boundary='zero'."
        )


def fold_back(x: Tensor, margin: int, boundary: str) -> Tensor:
    """The adjoint of :func:`extend`."""
    if margin == 0:
        return x
    inside = x[..., margin:-margin]
    if boundary == "zero":
        return inside[..., margin:-margin, :].contiguous()
    pad = functional.pad
    rest = inside.shape[-1] - margin
    inside = inside + pad(x[..., :margin].flip(-1), (0, rest)) + pad(x[..., -margin:].flip(-1), (rest, 0))
    out = inside[..., margin:-margin, :]
    rest = out.shape[-2] - margin
    top, bottom = inside[..., :margin, :].flip(-2), inside[..., -margin:, :].flip(-2)
    return out + pad(top, (0, 0, 0, rest)) + pad(bottom, (0, 0, rest, 0))
