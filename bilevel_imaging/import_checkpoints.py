"""Published (weakly) convex ridge regularizers as regularizers of this package.

Three layouts of parameters are read, told apart by their names:

- ``crr``: Goujon, Neumayer, Bohra, Ducotterd & Unser (2023), https://github.com/axgoujon/convex_ridge_regularizers.
  One nondecreasing linear spline per filter, R(x) = lambda / mu sum_k psi_k(mu (w_k * x)). The lambda and mu stored are
  those of training with a few gradient steps; for minimizers the authors tune both.
- ``conditional``: Goujon, Neumayer & Unser (2024), https://github.com/axgoujon/weakly_convex_ridge_regularizer. One
  spline for all filters, stretched by a function of the noise level for every filter.
- ``huber``: Hertrich et al. (2025), https://github.com/johertrich/LearnedRegularizers. Huber functions with a scale for
  every filter, if trained so with a common weight and scale.

The last two are convex or weakly convex by a constant of the model that is not among the parameters.

What changes on the way. psi_k' is a linear spline there and a C^1 quadratic one here, and psi_k is even here: both are
fitted and measured (``Fit``). Chains of convolutions are replaced by the filters that they amount to. There, the
features of every layer are continued by zeros; here, the image is continued. Responses differ near the border: with
zeros around the image at pixels nearer than the layers after the first reach, the sum of their (s - 1) / 2, and with
symmetric continuation wherever a filter reaches beyond the border. All the same the symmetric one comes closer to the
published reconstructions: zeros around an image look like an edge to whole filters.
"""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bilevel_imaging.cli import guarded, make_parser
from bilevel_imaging.errors import CheckpointError
from bilevel_imaging.export import save_regularizer
from bilevel_imaging.regularizers import ConvexRidge
from bilevel_imaging.regularizers.filter_chain import compose
from bilevel_imaging.regularizers.spline_profile import SplineProfile
from bilevel_imaging.regularizers.spline_profile import knots as spline_knots

# a name that only this layout has, and where its convolutions are
LAYOUTS = {
    "crr": ("activation.coefficients_vect", "conv_layer.conv_layers"),
    "conditional": ("activation_cvx.coefficients", "conv_layer.conv_layers"),
    "huber": ("beta", "filters"),
}
KINDS = ("crr", "wcrr")
# of all published models; used where no configuration says otherwise
KNOTS_RANGE, NOISE_RANGE = 0.1, (0.0, 30.0)
# potentials flatter than this, relative to the steepest, are left out with their filters
NEGLIGIBLE = 1e-6
# largest rms of the even part of psi', relative to the range of psi'
ASYMMETRY = 0.2
# the curvatures are stored as logarithms
SMALLEST_CURVATURE = 1e-6
_WRAPPERS = ("module.", "regularizer.")


@dataclass(frozen=True)
class Slopes:
    """psi_k', linear between knots and constant beyond them.

    Attributes:
        at: knots, ``(K, N)``, increasing.
        values: ``(K, N)``.
    """

    at: np.ndarray
    values: np.ndarray

    def __call__(self, t: np.ndarray) -> np.ndarray:
        """psi_k'(t_k), ``(K, T)`` for responses t ``(K, T)``."""
        return np.stack([np.interp(*row) for row in zip(t, self.at, self.values, strict=True)])

    @property
    def range(self) -> np.ndarray:
        """psi_k'(infinity) - psi_k'(-infinity), ``(K,)``."""
        return self.values[:, -1] - self.values[:, 0]

    @property
    def limit(self) -> np.ndarray:
        """Limit of the even part of psi_k' at infinity, ``(K, 1)``."""
        return (self.values[:, :1] + self.values[:, -1:]) / 2

    @property
    def reach(self) -> np.ndarray:
        """Least r with psi_k' constant on either side of [-r, r], ``(K,)``."""
        steps = np.diff(self.values, axis=1) != 0
        ends = np.maximum(np.abs(self.at[:, :-1]), np.abs(self.at[:, 1:]))
        return np.where(steps, ends, 0.0).max(1)

    def odd(self, t: np.ndarray) -> np.ndarray:
        """The odd part at t ``(K, T)``."""
        return (self(t) - self(-t)) / 2

    def asymmetry(self) -> np.ndarray:
        """rms of the even part over the knots, but for its limit at infinity, relative to the range, ``(K,)``.

        The limit is a linear term of psi_k, whose sum over the pixels of a filter of mean 0 vanishes off the border.
        """
        t = np.abs(self.at).max(1, keepdims=True) * np.linspace(0, 1, 1001)
        even = (self(t) + self(-t)) / 2 - self.limit
        return np.sqrt(np.square(even).mean(1)) / self.range


@dataclass(frozen=True)
class Fit:
    """How well even C^1 potentials represent those of a checkpoint.

    Deviations are those of psi_k', but for a constant (see ``Slopes.asymmetry``), relative to its range, on equispaced
    responses up to 1.25 times where it becomes constant.

    Attributes:
        curvatures: psi_k'' at the knots, ``(K, n)``.
        reach: last knot.
        largest: deviation of the worst filter at the worst response.
        rms: over all filters and responses.
        largest_odd: from the odd part of psi_k' alone: what is due to the spline.
        rms_odd: likewise.
        asymmetry: of the worst filter, see ``Slopes.asymmetry``.
    """

    curvatures: np.ndarray
    reach: float
    largest: float
    rms: float
    largest_odd: float
    rms_odd: float
    asymmetry: float


def import_regularizer(
    path: str | Path,
    *,
    kind: str | None = None,
    sigma: float | None = None,
    filters_only: bool = False,
    knots: int = 96,
    weight: float | None = None,
    scale: float | None = None,
    boundary: str = "symmetric",
    asymmetry: float = ASYMMETRY,
) -> tuple[ConvexRidge, dict[str, Any]]:
    """Read a published checkpoint.

    Args:
        path: a file of ``torch.save`` or safetensors. Settings are taken from the file, else from a ``config.json`` in
            its folder or the one above.
        kind: "crr" (convex) or "wcrr" (weakly convex), where neither the file nor its settings say it.
        sigma: noise level, in units of 1/255, at which a noise-conditional regularizer is taken.
        filters_only: take the filters, with potentials as ``ConvexRidge`` starts from: to learn from there. The only
            way for weakly convex ones.
        knots: of the splines.
        weight: instead of that of the checkpoint; R = weight / scale sum psi(scale w * x).
        scale: likewise.
        boundary: continuation of images, "symmetric" or "zero"; neither is that of a chain, see above.
        asymmetry: what is tolerated, see ``Slopes.asymmetry``.

    Returns:
        the regularizer, with one layer of filters, and what is known of its source, as plain values: the keys of
        ``Fit`` except curvatures, "layout", "file", "noise_level", ....

    Raises:
        CheckpointError: missing, not a checkpoint, of no known layout, not finite, weakly convex or asymmetric.
        ValueError: an argument that is missing or out of range.
    """
    path = Path(path).expanduser()
    tensors, config = read_checkpoint(path)
    layout = _layout(tensors, path)
    kernels = _kernels(tensors, layout, path)
    about: dict[str, Any] = {"layout": layout, "file": path.name, "filters_of_source": len(kernels)}
    if filters_only:
        keep = np.flatnonzero(kernels.flatten(1).norm(dim=1).numpy() > 0)
        regularizer = _regularizer(kernels[keep], boundary, weight=weight, scale=scale)
        return regularizer, {**about, "filters": len(keep), "filters_only": True, "noise_level": None}
    try:
        slopes, found = _READERS[layout](tensors, config, kernels, kind, sigma)
    except (KeyError, RuntimeError, CheckpointError) as error:
        raise CheckpointError(f"{path}: parameters of layout {layout} that do not fit together: {error}") from error
    if len(slopes.values) != len(kernels):
        raise CheckpointError(
            f"{path}: expected a potential for each of {len(kernels)} filters. Got {len(slopes.values)}."
        )
    size = kernels.flatten(1).norm(dim=1, keepdim=True).numpy()
    importance = slopes.range * size[:, 0]
    keep = np.flatnonzero((importance > NEGLIGIBLE * importance.max()) | (np.diff(slopes.values).min(1) < 0))
    # psi_k(norm_k t) for filters of norm 1
    slopes = Slopes((slopes.at / size.clip(np.finfo(float).tiny))[keep], (slopes.values * size)[keep])
    _refuse(slopes, asymmetry, path)
    fit = fit_potentials(slopes, knots)
    weight = found["weight_of_source"] if weight is None else weight
    scale = found["scale_of_source"] if scale is None else scale
    regularizer = _regularizer(kernels[keep], boundary, weight=weight, scale=scale, knots=knots, reach=fit.reach)
    with torch.no_grad():
        regularizer.log_curvatures.copy_(torch.from_numpy(fit.curvatures).log())
    measured = {k: v for k, v in vars(fit).items() if k != "curvatures"}
    return regularizer, {**about, "filters": len(keep), "weight": weight, "scale": scale, **found, **measured}


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The parameters of a checkpoint by name, float64, and its settings (empty if there are none).

    Raises:
        CheckpointError: missing, not a checkpoint, with code instead of tensors, or not finite.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file.")
    content = _load(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    tensors = {} if not isinstance(state, Mapping) else {k: t for k, t in state.items() if isinstance(t, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: not a checkpoint: expected named tensors, or these as its state_dict.")
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path}: {name} holds numbers that are NaN or infinite.")
    for wrapper in _WRAPPERS:
        tensors = {str(name).removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    config = content.get("config") or _config_beside(path)
    return {name: tensor.double() for name, tensor in tensors.items()}, config


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged or not a safetensors file ({error}).") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what the bytes of another file look like to the loader is not known beforehand
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            raise CheckpointError(
                f"{path}: holds Python objects, which could run code, and is not read. Save the state_dict() of the "
                "model, which holds tensors alone."
            ) from error
        raise CheckpointError(f"{path}: not a checkpoint of torch.save, or damaged.") from error


def _config_beside(path: Path) -> dict[str, Any]:
    for folder in (path.absolute().parent, path.absolute().parent.parent):
        file = folder / "config.json"
        if file.is_file():
            try:
                content = json.loads(file.read_text())
            except ValueError as error:
                raise CheckpointError(f"{file}: not JSON ({error}).") from error
            return content if isinstance(content, dict) else {}
    return {}


def _layout(tensors: dict[str, Tensor], path: Path) -> str:
    for layout, (marker, layers) in LAYOUTS.items():
        if marker in tensors and any(name.startswith(f"{layers}.0.") for name in tensors):
            return layout
    found = ", ".join(sorted(tensors)[:8]) + (", ..." if len(tensors) > 8 else "")
    raise CheckpointError(
        f"{path}: unknown layout. Expected one of {', '.join(LAYOUTS)}. Got parameters named {found}."
    )


def _kernels(tensors: dict[str, Tensor], layout: str, path: Path) -> Tensor:
    """The filters that the chain of convolutions amounts to, ``(K, C, s, s)`` float64."""
    layers: list[Tensor] = []
    prefix = LAYOUTS[layout][1]
    while True:
        stored = f"{prefix}.{len(layers)}"
        if (layer := tensors.get(f"{stored}.parametrizations.weight.original")) is not None:
            if layer.dim() == 4:
                layer = layer - layer.mean((1, 2, 3), keepdim=True)
        elif (layer := tensors.get(f"{stored}.weight")) is None:
            break
        fits = layer.dim() == 4 and layer.shape[2] == layer.shape[3] and layer.shape[2] % 2 == 1
        if not fits or (layers and layers[-1].shape[0] != layer.shape[1]):
            raise CheckpointError(
                f"{path}: expected convolutions (out, in, s, s) of odd size s that follow each other. Got "
                f"{tuple(layer.shape)} for {stored}."
            )
        layers.append(layer)
    if not layers:
        raise CheckpointError(f"{path}: found no convolution weights under {prefix}.0.")
    kernels = compose(layers)
    means = kernels.mean((2, 3)).abs().amax() * kernels.shape[-1]
    if float(means) > 1e-5 * float(kernels.flatten(1).norm(dim=1).max()):
        raise CheckpointError(
            f"{path}: filters with channels of mean other than 0, which ConvexRidge cannot represent."
        )
    return kernels


def _regularizer(kernels: Tensor, boundary: str, **arguments: Any) -> ConvexRidge:
    given = {name: value for name, value in arguments.items() if value is not None}
    count, channels, size = kernels.shape[:3]
    regularizer = ConvexRidge((count,), size, channels, start="random", boundary=boundary, **given)
    with torch.no_grad():
        regularizer.filter_layers[0].copy_(kernels)
        regularizer.filter_layers[0].copy_(regularizer.kernels())
    return regularizer


def _read_crr(
    tensors: dict[str, Tensor], config: dict[str, Any], kernels: Tensor, kind: str | None, sigma: float | None
) -> tuple[Slopes, dict[str, Any]]:
    if kind == "wcrr":
        raise ValueError("kind wcrr: a checkpoint of layout crr is convex. Leave it out.")
    values = tensors["activation.coefficients_vect"].view(len(kernels), -1)
    count = values.shape[1]
    if count < 3 or count % 2 == 0:
        raise CheckpointError(f"Expected an odd number of spline knots >= 3. Got {count}.")
    steps = functional.pad(values.diff(dim=1).clamp(min=0)[:, 1:-1], (1, 1))
    values = functional.pad(steps.cumsum(1), (1, 0))
    values = values - values[:, count // 2, None]
    reach = float(config.get("activation_params", {}).get("knots_range", KNOTS_RANGE))
    at = np.tile(np.linspace(-reach, reach, count), (len(values), 1))
    trained = config.get("sigma")
    return Slopes(at, values.numpy()), {
        "weight_of_source": max(float(tensors["lmbd"]), 1e-4),
        "scale_of_source": max(float(tensors["mu"]), 0.01),
        "noise_level": None if trained is None else float(trained) / 255,
    }


def _read_conditional(
    tensors: dict[str, Tensor], config: dict[str, Any], kernels: Tensor, kind: str | None, sigma: float | None
) -> tuple[Slopes, dict[str, Any]]:
    rho = _weak_convexity(kind, config.get("rho_wcvx"))
    low, high = config.get("noise_range", NOISE_RANGE)
    if sigma is None or not low <= sigma <= high or sigma <= 0:
        raise ValueError(
            f"Expected --sigma in ({low:g}, {high:g}], in units of 1/255: this regularizer depends on the noise level. "
            f"Got {sigma}."
        )
    logarithms = tensors["spline_scaling.coefficients"].numpy()
    nodes = np.linspace(low, high, logarithms.shape[1])
    stretch = np.exp([np.interp(sigma, nodes, row) for row in logarithms])[:, None] / (sigma + 1e-5)
    spline = config.get("spline_activation", {})
    ends = float(spline.get("x_min", -KNOTS_RANGE)), float(spline.get("x_max", KNOTS_RANGE))
    rise = float(tensors["mu_"].exp()) * _odd_spline(tensors["activation_cvx.coefficients"], ends)
    if rho:
        rise = rise - rho * _odd_spline(tensors["activation_ccv.coefficients"], ends)
    # filters of operator norm 1 under potentials of argument stretch t
    inner = stretch / float(_operator_norm(kernels))
    outer = 1 / stretch / float(_operator_norm(kernels))
    found = {"weight_of_source": 1.0, "scale_of_source": 1.0, "sigma": float(sigma), "noise_level": sigma / 255}
    return Slopes(np.linspace(*ends, rise.shape[-1]) / inner, rise.numpy() * outer), found


def _read_huber(
    tensors: dict[str, Tensor], config: dict[str, Any], kernels: Tensor, kind: str | None, sigma: float | None
) -> tuple[Slopes, dict[str, Any]]:
    rho = _weak_convexity(kind, None)
    norm, beta = float(_operator_norm(kernels)), float(tensors["beta"])
    stretch = tensors["scaling"].flatten().exp().numpy()[:, None] / norm
    outer = np.exp(-tensors["scaling"].flatten().numpy())[:, None] / norm
    at = np.array([-1.0, -np.exp(-beta), 0.0, np.exp(-beta), 1.0])
    values = np.clip(np.exp(beta) * at, -1, 1) - rho * np.clip(at, -1, 1)
    scale = float(tensors.get("scale", torch.zeros(())).exp())
    weight = float(tensors.get("alpha", torch.zeros(())).exp()) / scale
    return Slopes(at / stretch, values * outer), {
        "weight_of_source": weight,
        "scale_of_source": scale,
        "noise_level": None,
    }


_READERS = {"crr": _read_crr, "conditional": _read_conditional, "huber": _read_huber}


def _weak_convexity(kind: str | None, known: float | None) -> float:
    if kind not in (None, *KINDS):
        raise ValueError(f"Unknown kind {kind!r}. Choose from {list(KINDS)}.")
    if known is None and kind is None:
        raise ValueError(
            "Expected --kind crr (convex) or wcrr (weakly convex), which the parameters do not tell. Got neither; the "
            "name of the checkpoint usually says it."
        )
    if known is not None and kind is not None and (known > 0) != (kind == "wcrr"):
        raise ValueError(f"--kind {kind}: the settings of the checkpoint say rho_wcvx = {known:g}. Leave it out.")
    return float(kind == "wcrr") if known is None else float(known)


def _odd_spline(coefficients: Tensor, ends: tuple[float, float]) -> Tensor:
    """Values of an odd linear spline of slopes in [0, 1], 0 at both ends, ``(1, N)``."""
    step = (ends[1] - ends[0]) / (coefficients.shape[1] - 1)
    slopes = (coefficients.diff(dim=1) / step).clamp(0, 1)[:, 1:-1]
    values = functional.pad(step * slopes.cumsum(1), (2, 0))
    values = torch.cat([values, values[:, -1:]], 1)
    return (values - values.flip(1)) / 2


def _operator_norm(kernels: Tensor, points: int = 256) -> Tensor:
    """Norm of the convolution by all filters, from its transfer functions on a grid of frequencies."""
    power = torch.fft.rfft2(kernels, s=(points, points)).abs().square().sum((0, 1))
    return power.amax().sqrt()


def _refuse(slopes: Slopes, tolerance: float, path: Path) -> None:
    """What is not convex, or not even enough."""
    if not len(slopes.at):
        raise CheckpointError(f"{path}: every potential is constant, so there is nothing to import.")
    drops = np.maximum.accumulate(slopes.values, axis=1) - slopes.values
    drop = float((drops.max(1) / np.ptp(slopes.values, axis=1)).max())
    if drop > NEGLIGIBLE:
        raise CheckpointError(
            f"{path}: weakly convex: psi' decreases by up to {drop:.2g} of its range, which no convex regularizer can "
            "represent. Import the filters alone with --filters-only and learn convex potentials for them."
        )
    worst = float(slopes.asymmetry().max())
    if worst > tolerance:
        raise CheckpointError(
            f"{path}: psi' is far from odd (its even part has an rms of {worst:.2g} of its range, tolerated is "
            f"{tolerance:.2g}), and the potentials of ConvexRidge are even. Raise --asymmetry to import the odd part."
        )


def fit_potentials(slopes: Slopes, knots: int) -> Fit:
    """Even potentials with psi'' >= 0 linear between knots, nearest to the odd parts of psi_k' in least squares.

    Args:
        slopes: of K filters.
        knots: number of intervals.

    Raises:
        ValueError: fewer than 2 knots.
    """
    from scipy.optimize import nnls

    if knots < 2:
        raise ValueError(f"Expected knots >= 2. Got {knots}.")
    count, reach = len(slopes.at), float(slopes.reach.max())
    last = torch.tensor(reach, dtype=torch.float64)
    columns = SplineProfile(torch.eye(knots, dtype=torch.float64), last, last, (), False)
    samples = spline_knots(8 * knots, last)
    basis = columns.slope(samples[:, None].expand(-1, knots)).numpy()
    wanted = slopes.odd(np.tile(samples.numpy(), (count, 1)))
    # unit columns: those of the first knots are much smaller than the others
    norms = np.linalg.norm(basis, axis=0)
    curvatures = np.stack([nnls(basis / norms, row)[0] / norms for row in wanted])
    curvatures = curvatures.clip(SMALLEST_CURVATURE * curvatures.max(1, keepdims=True))
    fitted = SplineProfile(torch.from_numpy(curvatures), last, last, (), False)
    t = 1.25 * slopes.reach[:, None] * np.linspace(-1, 1, 1001)
    found = fitted.slope(torch.from_numpy(t).T).numpy().T
    whole = (found - slopes(t) + slopes.limit) / slopes.range[:, None]
    odd = (found - slopes.odd(t)) / slopes.range[:, None]
    return Fit(
        curvatures,
        reach,
        largest=float(np.abs(whole).max()),
        rms=float(np.sqrt(np.square(whole).mean())),
        largest_odd=float(np.abs(odd).max()),
        rms_odd=float(np.sqrt(np.square(odd).mean())),
        asymmetry=float(slopes.asymmetry().max()),
    )


def convert_main(argv: Sequence[str] | None = None) -> int:
    """Convert a checkpoint; returns the exit code."""
    return guarded(_convert, argv, stopped="Stopped; nothing was written.")


def _convert(argv: Sequence[str] | None) -> int:
    parser = make_parser(
        "convert.py",
        "Import a published convex ridge regularizer: CRR-NN or noise-conditional CRR-NN of Goujon et al., or one of "
        "LearnedRegularizers; of a weakly convex one the filters alone.",
    )
    parser.add_argument("checkpoint", type=str, help="file of torch.save (.pth, .pt) or .safetensors")
    parser.add_argument("output", type=str, help="file to write, .safetensors; read it with load_regularizer")
    add = parser.add_argument
    add("--kind", type=str | None, default=None, help="crr or wcrr, where the checkpoint does not say it")
    add("--sigma", type=float | None, default=None, help="noise level of a noise-conditional regularizer, e.g. 25")
    add("--noise", type=float | None, default=None, help="standard deviation to note in the output, images in [0, 1]")
    add("--filters_only", "--filters-only", action="store_true", help="only the filters, to learn potentials for them")
    add("--knots", type=int, default=96, help="of the splines")
    add("--weight", type=float | None, default=None, help="instead of that of the checkpoint (lambda)")
    add("--scale", type=float | None, default=None, help="instead of that of the checkpoint (mu)")
    add("--boundary", type=str, default="symmetric", help="continuation of images: symmetric or zero")
    add("--asymmetry", type=float, default=ASYMMETRY, help="largest even part of psi', rms relative to its range")
    arguments = vars(parser.parse_args(list(sys.argv[1:] if argv is None else argv)))
    output, noise = Path(arguments.pop("output")).expanduser(), arguments.pop("noise")
    if output.suffix != ".safetensors":
        raise ValueError(f"{output}: expected a file name that ends in .safetensors.")
    if noise is not None and not 0 <= noise < float("inf"):
        raise ValueError(f"--noise: expected a number >= 0. Got {noise}.")
    regularizer, about = import_regularizer(arguments.pop("checkpoint"), **arguments)
    trained_noise = about.pop("noise_level")
    noise = trained_noise if noise is None else noise
    save_regularizer(output, regularizer, noise_level=noise, extra={"imported": about})
    print(f"{output}: {_summary(regularizer, about)}")
    return 0


def _summary(regularizer: ConvexRidge, about: dict[str, Any]) -> str:
    size = regularizer.filter_layers[0].shape[-1]
    text = f"{about['filters']} of {about['filters_of_source']} filters {size} x {size} (layout {about['layout']})"
    if "filters_only" in about:
        return f"{text}, potentials at the default start."
    weight, scale = about["weight"], about["scale"]
    text += f", weight {weight:.4g}, scale {scale:.4g}"
    if about["layout"] == "crr" and (weight, scale) == (about["weight_of_source"], about["scale_of_source"]):
        text += " (trained for a few gradient steps: tune both for minimizers, see --weight and --scale)"
    return (
        f"{text}. psi' deviates by at most {about['largest']:.2%} of its range, {about['rms']:.2%} rms "
        f"({about['largest_odd']:.2%} and {about['rms_odd']:.2%} from its odd part)."
    )
