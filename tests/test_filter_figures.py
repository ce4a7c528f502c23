"""Pictures of filters and potentials, and of reconstructions with a zoom."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bilevel_imaging import TotalVariation
from bilevel_imaging.training.comparison import comparison_figure, detail
from bilevel_imaging.training.evaluation import image_metrics
from bilevel_imaging.training.figures import rendered
from bilevel_imaging.training.filter_figures import (
    bend_radius,
    filters_figure,
    potentials_figure,
    read_ridges,
    regularizer_pictures,
)


class Ridge(nn.Module):
    """psi_k(t) = weight_k sqrt(t^2 + smoothing^2), so that psi_k' = weight_k t / sqrt(t^2 + smoothing^2)."""

    def __init__(self, filters: Tensor, weights: Tensor, smoothing: float = 0.01):
        super().__init__()
        self.kernels, self.weights, self.smoothing = filters, nn.Parameter(weights), smoothing

    def filters(self) -> Tensor:
        return self.kernels

    def potentials(self, t: Tensor) -> tuple[Tensor, Tensor]:
        root = (t**2 + self.smoothing**2).sqrt()
        return self.weights[:, None] * root, self.weights[:, None] * t / root


def ridge(count: int = 5, channels: int = 1, size: int = 5, smoothing: float = 0.01) -> Ridge:
    generator = torch.Generator().manual_seed(0)
    filters = torch.randn(count, channels, size, size, generator=generator, dtype=torch.float64)
    filters = filters / filters.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return Ridge(filters, torch.linspace(0.1, 1, count, dtype=torch.float64), smoothing)


def test_the_most_important_comes_first():
    made = ridge()
    ridges = read_ridges(made)
    torch.testing.assert_close(ridges.filters, made.kernels.flip(0))
    # filters of norm 1 and |psi'| <= weight: the largest force is the weight
    torch.testing.assert_close(ridges.importance, made.weights.detach().flip(0), rtol=1e-4, atol=0)
    assert ridges.relative_importance[0] == 1
    # a smaller weight, but a larger filter
    made.kernels[0] *= 100
    torch.testing.assert_close(read_ridges(made).filters[0], made.kernels[0])


def test_potentials_are_sampled_where_they_bend():
    for smoothing in (0.001, 0.05):
        made = ridge(smoothing=smoothing)
        ridges = read_ridges(made)
        radius = float(ridges.responses[-1])
        # t / sqrt(t^2 + s^2) has done 95 % of its way at 3.04 s
        assert radius == pytest.approx(1.5 * 3.04 * smoothing, rel=0.1)
        assert float(ridges.responses[0]) == -radius and len(ridges.responses) % 2 == 1
        middle = len(ridges.responses) // 2
        assert not ridges.potentials[:, middle].any() and not ridges.slopes[:, middle].any()
        numeric = torch.gradient(ridges.potentials, spacing=(ridges.responses,), dim=1)[0]
        torch.testing.assert_close(numeric[:, 1:-1], ridges.slopes[:, 1:-1], rtol=0, atol=2e-3)


def test_range_of_straight_and_constant_activations():
    t = torch.linspace(-2, 2, 401, dtype=torch.float64)
    assert bend_radius(t, t[None]) == 2
    assert bend_radius(t, torch.ones(3, 401, dtype=torch.float64)) == 2
    # a strong filter that bends within 0.1 decides, a weak one that never stops does not
    pair = torch.stack([t.clamp(-0.1, 0.1) * 10, 1e-3 * t])
    assert bend_radius(t, pair) == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (5, 1), (7, 3)])
def test_figures(count, channels):
    made = ridge(count, channels)
    figure = filters_figure(made)
    left, right = figure.axes
    assert len(left.get_images()) == len(right.get_images()) == count
    shapes = {image.get_array().shape for image in left.get_images()}
    assert shapes == {(5, 5) if channels == 1 else (5, 5, 3)}
    first = torch.as_tensor(left.get_images()[0].get_array())
    assert float((first - 0.5).abs().max()) == pytest.approx(0.5) and 0 <= float(first.min()) <= float(first.max()) <= 1
    titles = [float(text.get_text()) for text in left.texts]
    assert titles == sorted(titles, reverse=True) and titles[0] == pytest.approx(1 if count > 1 else 0.1, rel=0.01)
    activation, potential, _ = potentials_figure(made).axes
    curves = [line for line in activation.get_lines() if len(line.get_xdata()) > 2]
    assert len(curves) == count and activation.get_title() == "activation" and potential.get_title() == "potential"
    assert len({line.get_color() for line in curves}) == count


def test_spectrum_of_a_mean_filter_is_low_pass_and_of_a_difference_is_not():
    filters = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    filters[0] = 1 / 9
    filters[1, 0, 1, 1:] = torch.tensor([-1.0, 1.0])
    made = Ridge(filters, torch.ones(2, dtype=torch.float64))
    difference, mean = (image.get_array() for image in filters_figure(made).axes[1].get_images())
    assert mean[32, 32] == pytest.approx(1) and mean[0, 0] < 0.02
    assert difference[32, 32] == pytest.approx(0, abs=1e-12) and difference[32, 0] == pytest.approx(1)


def test_pictures_for_tensorboard():
    pictures = regularizer_pictures(ridge(9))
    assert list(pictures) == ["filters/filters", "filters/potentials"]
    for picture in pictures.values():
        assert picture.shape[0] == 3 and picture.dtype == torch.float32 and min(picture.shape[1:]) > 200
        assert 0 <= float(picture.min()) < 0.5 and float(picture.max()) == 1 and float(picture.std()) > 0.01
    assert regularizer_pictures(TotalVariation()) == {}


def test_a_regularizer_without_any_force_can_be_drawn():
    made = Ridge(torch.zeros(2, 1, 3, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    assert all(bool(torch.isfinite(picture).all()) for picture in regularizer_pictures(made).values())


def test_what_cannot_be_drawn_says_so():
    with pytest.raises(ValueError, match=r"Expected a regularizer with filters\(\).*Got TotalVariation"):
        filters_figure(TotalVariation())
    with pytest.raises(ValueError, match=r"C = 1 or 3. Got \(2, 2, 3, 3\)"):
        potentials_figure(Ridge(torch.ones(2, 2, 3, 3), torch.ones(2)))
    with pytest.raises(ValueError, match=r"for 3 filters. Got \(2, "):
        potentials_figure(Ridge(torch.ones(3, 1, 3, 3), torch.ones(2)))


# --- reconstructions side by side


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    truth = torch.full((1, 40, 60), 0.5, dtype=torch.float64)
    truth[:, 5:15, 45:55] = torch.rand(1, 10, 10, generator=generator, dtype=torch.float64)
    noisy = truth + 0.1 * torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    return {"gt": [truth], "measurement": [noisy], "grid_search": [0.5 * (truth + noisy)], "learned": [truth]}


def test_the_zoom_shows_the_structure_in_every_column_and_does_not_hide_it(pictures):
    top, left, size = detail(pictures["gt"][0])
    assert 0 <= top - 5 + size and top < 15 and left + size > 45 and left < 55
    figure = comparison_figure(pictures, ["square"])
    figure.draw_without_rendering()
    whole = figure.axes[:4]
    for axis, (method, images) in zip(whole, pictures.items(), strict=True):
        (inset,) = axis.child_axes
        shown = torch.as_tensor(inset.get_images()[0].get_array())
        expected = images[0][0, top : top + size, left : left + size].clamp(0, 1)
        torch.testing.assert_close(shown, expected.float(), msg=method)
        corner = axis.transData.inverted().transform(inset.get_window_extent().get_points())
        assert corner[:, 0].max() < left or corner[:, 1].min() > top + size  # left of the detail or below it


def test_titles_hold_psnr_and_ssim(pictures):
    titles = [axis.get_title() for axis in comparison_figure(pictures, ["square"]).axes[:4]]
    assert titles[0].startswith("square") and titles[3].startswith("learned")
    for title, method in zip(titles[1:3], ("measurement", "grid_search"), strict=True):
        scores = image_metrics(pictures[method][0][None], pictures["gt"][0][None])
        assert f"{scores['psnr'][0]:.2f} dB" in title and f"SSIM {scores['ssim'][0]:.3f}" in title


def test_measurements_of_another_shape_have_no_scores(pictures):
    pictures["measurement"] = [torch.rand(1, 7, 9, dtype=torch.float64)]
    figure = comparison_figure(pictures, ["square"])
    assert figure.axes[1].get_title() == "measurement"
    assert float(rendered(figure).std()) > 0
