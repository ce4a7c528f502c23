"""Input-convex convolutional networks as regularizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, logsigmoid, softplus

from bilevel_imaging.checks import not_negative, whole, whole_numbers
from bilevel_imaging.derivatives import Constants, Linearization
from bilevel_imaging.regularizers.base import Regularizer, positive_parameter
from bilevel_imaging.regularizers.input_convex_bounds import NetworkBounds
from bilevel_imaging.regularizers.input_convex_linearization import InputConvexLinearization
from bilevel_imaging.tensors import squared_norm


class InputConvex(Regularizer):
    """R(x) = sum over pixels of <w, z_L> + strong/2 ||x||^2 with z_1 = sigma(W_0 * x + b_0) and, layer by layer,
    z_{l+1} = sigma(U_l * z_l + W_l * x + b_l): convex in x, since all U_l > 0 and w > 0.

    sigma(t) = log(1 + exp(beta t)) / beta, a smooth ReLU; convolutions with zeros outside of the image; all channels of
    the image enter every feature. Amos, Xu & Kolter (2017). U_l and w are the softplus of the stored
    ``hidden_kernels`` and ``output``: positive whatever an optimizer does, with no projection.

    Args:
        channels: of the images.
        features: number of features of each layer.
        kernel_size: odd.
        beta: positive: the curvature of sigma; its kink at 0 is rounded over about 1 / beta.
        strong: strong convexity, >= 0; not learned.
        weight: positive: the sum of w at the start.
        seed: of the kernels at the start. W_l: random filters of norm 1 and, if larger than one pixel, mean 0.

    Raises:
        ValueError: sizes that are not positive integers, an even kernel size, beta or weight not positive, strong < 0.

    Constants: derived from the kernels, layer by layer. They are far from sharp for many layers; certificates are
    honest but call for accurate solves. The mixed derivative grows with x: its slope is known on balls around a point.
    """

    known_parameters = ("output", "input_kernels", "hidden_kernels", "biases")

    def __init__(
        self,
        channels: int = 1,
        features: Sequence[int] = (32, 32),
        kernel_size: int = 5,
        beta: float = 10.0,
        strong: float = 0.0,
        weight: float = 0.1,
        *,
        seed: int = 0,
    ):
        super().__init__()
        channels, features = whole("channels", channels, 1), whole_numbers("features", features)
        if whole("kernel_size", kernel_size, 1) % 2 == 0:
            raise ValueError(f"Expected an odd kernel_size. Got {kernel_size}.")
        for value, name in ((beta, "beta"), (weight, "weight")):
            positive_parameter(value, name, False)  # refuses what is not a positive number
        self.channels, self.features, self.kernel_size = channels, features, kernel_size
        self.beta, self.strong = float(beta), not_negative("strong", strong)
        generator = torch.Generator().manual_seed(seed)
        previous = (0, *self.features[:-1])
        self.input_kernels = nn.ParameterList([self._random_filters(n, generator) for n in self.features])
        self.hidden_kernels = nn.ParameterList(
            [self._random_positive(n, m, generator) for n, m in zip(self.features, previous, strict=True) if m]
        )
        self.biases = nn.ParameterList([torch.zeros(n, dtype=torch.float64) for n in self.features])
        last = self.features[-1]
        self.output = nn.Parameter(inverse_softplus(torch.full((last,), weight / last, dtype=torch.float64)))

    def _random_filters(self, features: int, generator: torch.Generator) -> Tensor:
        size = (features, self.channels, self.kernel_size, self.kernel_size)
        kernel = torch.randn(size, dtype=torch.float64, generator=generator)
        if self.kernel_size > 1:
            kernel = kernel - kernel.mean((-2, -1), keepdim=True)
        return kernel / kernel.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)

    def _random_positive(self, features: int, previous: int, generator: torch.Generator) -> Tensor:
        """Sums of about 1 over what enters a feature, as stored."""
        size = (features, previous, self.kernel_size, self.kernel_size)
        kernel = 0.5 + torch.rand(size, dtype=torch.float64, generator=generator)
        return inverse_softplus(kernel / (previous * self.kernel_size**2))

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this regularizer (parameters are stored separately)."""
        return {
            "channels": self.channels,
            "features": list(self.features),
            "kernel_size": self.kernel_size,
            "beta": self.beta,
            "strong": self.strong,
        }

    def check_shape(self, shape: torch.Size) -> None:
        if len(shape) != 4 or shape[1] != self.channels:
            raise ValueError(f"Expected images (B, {self.channels}, H, W). Got shape {tuple(shape)}; see channels.")

    def weights_like(self, x: Tensor) -> Weights:
        """The kernels of the network in the dtype of x ``(B, C, H, W)``.

        Raises:
            ValueError: if C is not the number of channels.
        """
        self.check_shape(x.shape)
        return Weights(
            [kernel.to(x.dtype) for kernel in self.input_kernels],
            [softplus(kernel.double()).to(x.dtype) for kernel in self.hidden_kernels],
            [bias.to(x.dtype) for bias in self.biases],
            softplus(self.output.double()).to(x.dtype),
            self.beta,
            self.kernel_size // 2,
        )

    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weights = self.weights_like(x)
        features = weights.forward(x)[1][-1]
        value = torch.einsum("bfhw,f->b", features, weights.output)
        return value + 0.5 * self.strong * squared_norm(x) if self.strong else value

    def grad(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weights = self.weights_like(x)
        sums, _ = weights.forward(x)
        slope = weights.image_of(weights.backward(sums)[0])
        return slope + self.strong * x if self.strong else slope

    def linearize(self, x: Tensor) -> Linearization:
        with torch.no_grad():
            return InputConvexLinearization(self, x.detach())

    def constants(self, shape: torch.Size | tuple[int, ...]) -> Constants:
        bounds = self.bounds()
        device = self.output.device
        values = (self.strong, self.strong + bounds.smoothness, bounds.hessian_lipschitz)
        return Constants(
            *(torch.full((shape[0],), value, dtype=torch.float64, device=device) for value in values),
            reason="the mixed derivative of an input-convex network grows with x: it is bounded on balls only",
        )

    def bounds(self) -> NetworkBounds:
        """What holds for all images at the present kernels."""
        with torch.no_grad():
            weights = self.weights_like(self.output.new_zeros((1, self.channels, 1, 1), dtype=torch.float64))
            return NetworkBounds.of(weights)

    def gradient_scale(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x.detach().double()
            size = self.weights_like(x).gradient_terms(x) + self.strong * x.abs()
            return size.flatten(1).norm(dim=1)


def inverse_softplus(value: Tensor) -> Tensor:
    """What log(1 + exp(.)) makes ``value`` of."""
    return value + torch.log(-torch.expm1(-value))


@dataclass(frozen=True)
class Weights:
    """The numbers of a network, and the passes through it.

    Attributes:
        image: W_l, ``(F_l, C, k, k)``.
        hidden: U_l > 0 for l >= 1, ``(F_l, F_{l-1}, k, k)``.
        bias: b_l, ``(F_l,)``.
        output: w > 0, ``(F_L,)``.
        beta: of the activation.
        padding: (k - 1) / 2.
    """

    image: list[Tensor]
    hidden: list[Tensor]
    bias: list[Tensor]
    output: Tensor
    beta: float
    padding: int

    def detach(self) -> Weights:
        """The same numbers without a graph (a parameter in the dtype asked for is used as it is)."""
        image, hidden, bias = ([k.detach() for k in kernels] for kernels in (self.image, self.hidden, self.bias))
        return replace(self, image=image, hidden=hidden, bias=bias, output=self.output.detach())

    def convolve(self, kernel: Tensor, x: Tensor) -> Tensor:
        """kernel * x, with zeros outside of the image."""
        return conv2d(x, kernel, padding=self.padding)

    def adjoint(self, kernel: Tensor, m: Tensor) -> Tensor:
        """The adjoint of ``convolve``."""
        return conv_transpose2d(m, kernel, padding=self.padding)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(p_0, p_1, ...), what enters the activations, and (z_1, z_2, ...), what leaves them."""
        sums: list[Tensor] = []
        features: list[Tensor] = []
        for layer, (kernel, bias) in enumerate(zip(self.image, self.bias, strict=True)):
            p = conv2d(x, kernel, bias, padding=self.padding)
            if layer:
                p = p + self.convolve(self.hidden[layer - 1], features[-1])
            sums.append(p)
            features.append(-logsigmoid(-self.beta * p) / self.beta)
        return sums, features

    def backward(self, sums: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Derivatives of R in the sums p_l, and in the features z_{l+1}."""
        of_features = [self.output.reshape(1, -1, 1, 1).expand_as(sums[-1])]
        of_sums: list[Tensor] = []
        for layer in reversed(range(len(sums))):
            of_sums.append(torch.sigmoid(self.beta * sums[layer]) * of_features[-1])
            if layer:
                of_features.append(self.adjoint(self.hidden[layer - 1], of_sums[-1]))
        return of_sums[::-1], of_features[::-1]

    def image_of(self, of_sums: list[Tensor]) -> Tensor:
        """sum_l W_l^T m_l."""
        total = self.adjoint(self.image[0], of_sums[0])
        for kernel, m in zip(self.image[1:], of_sums[1:], strict=True):
            total = total + self.adjoint(kernel, m)
        return total

    def gradient_terms(self, x: Tensor) -> Tensor:
        """Per pixel, the size of all that is added up in the gradient of the network, whose rounding is relative to it.

        To first order: with every sum comes the size of its terms and what that does to all that follows.
        """
        sums, features = self.forward(x)
        of_sums, of_features = self.backward(sums)
        size, sizes = torch.zeros_like(x), []
        for layer, p in enumerate(sums):
            terms = conv2d(x.abs(), self.image[layer].abs(), self.bias[layer].abs(), padding=self.padding)
            if layer:
                terms = terms + self.convolve(self.hidden[layer - 1], features[layer - 1] + size)
            size = torch.sigmoid(self.beta * p) * terms
            sizes.append(terms)
        total, later = torch.zeros_like(x), torch.zeros_like(of_features[-1])
        for layer in reversed(range(len(sums))):
            s = torch.sigmoid(self.beta * sums[layer])
            m = of_sums[layer] + self.beta * s * (1 - s) * of_features[layer] * sizes[layer] + s * later
            total = total + self.adjoint(self.image[layer].abs(), m)
            if layer:
                later = self.adjoint(self.hidden[layer - 1], m)
        return total
