"""Data layer: photographs, folders, patches, degradations, pairs, splits."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import socket
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from bilevel_imaging.data import (
    COLOR_PHOTOGRAPHS,
    PHOTOGRAPH_SPLIT,
    Degradation,
    ImageFolder,
    ImagePairs,
    RandomPatches,
    Split,
    center_crop,
    extract_patches,
    gaussian_kernel,
    list_images,
    load_folder,
    luminance,
    photographs,
    read_image,
    split_names,
)
from bilevel_imaging.data.degradations import PADDINGS
from bilevel_imaging.errors import DataError

KINDS = ("denoising", "deblurring", "inpainting", "super_resolution", "tomography", "mri")
SIZES = {
    "astronaut": (512, 512),
    "brick": (512, 512),
    "camera": (512, 512),
    "chelsea": (300, 451),
    "coffee": (400, 600),
    "coins": (303, 384),
    "grass": (512, 512),
    "gravel": (512, 512),
    "moon": (512, 512),
    "motorcycle": (500, 741),
    "rocket": (427, 640),
}


def pixels(*shape: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def write_png16(path: Path, array: np.ndarray) -> None:
    """A 16-bit PNG of 1 to 4 channels, which Pillow cannot write in color."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = array.shape
    rows = b"".join(b"\0" + array[i].astype(">u2").tobytes() for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    path.write_bytes(signature + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def error_of(call: object, *arguments: object, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------- photographs


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_photographs_without_network(no_network: None) -> None:
    images = photographs()
    assert {name: tuple(image.shape[1:]) for name, image in images.items()} == SIZES
    assert list(images) == sorted(images)
    for image in images.values():
        assert image.shape[0] == 1 and image.dtype == torch.float64 and image.is_contiguous()
        assert 0 <= image.min() < image.max() <= 1
    # Nothing looks like another image under a new name.
    assert len({(tuple(i.shape), round(i.mean().item(), 6)) for i in images.values()}) == len(images)


def test_photographs_in_color_match_their_luma(no_network: None) -> None:
    colored = photographs(color=True, part="validation") | photographs(color=True, part="test")
    assert set(colored) == {"chelsea", "rocket"}
    gray = photographs(part="validation")
    assert torch.equal(luminance(colored["chelsea"]), gray["chelsea"])
    assert colored["chelsea"].shape == (3, 300, 451)


def test_photographs_agree_with_scikit_image(no_network: None) -> None:
    from skimage import data

    assert torch.equal(photographs(part="test")["camera"][0], torch.from_numpy(data.camera() / 255.0))


def test_photograph_split_is_a_partition_with_color_in_every_part() -> None:
    parts = (PHOTOGRAPH_SPLIT.train, PHOTOGRAPH_SPLIT.validation, PHOTOGRAPH_SPLIT.test)
    assert sorted(name for part in parts for name in part) == sorted(SIZES)
    assert all(set(part) & set(COLOR_PHOTOGRAPHS) for part in parts)


def test_photograph_table_in_the_readme_is_true() -> None:
    readme = Path(__file__).parents[1] / "data" / "README.md"
    rows = re.findall(r"^\| (\w+) \| (\d+) x (\d+) \| (yes)? *\| (\w+) \|", readme.read_text("utf-8"), re.MULTILINE)
    assert {name: (int(height), int(width)) for name, height, width, _, _ in rows} == SIZES
    assert {name for name, _, _, color, _ in rows if color} == set(COLOR_PHOTOGRAPHS)
    assert all(name in getattr(PHOTOGRAPH_SPLIT, part) for name, _, _, _, part in rows)


def test_photographs_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="validation"):
        photographs(part="training")  # type: ignore[arg-type]
    module = sys.modules["bilevel_imaging.data.photographs"]  # the attribute of this name is the function
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    assert "pip install scikit-image" in error_of(photographs)
    (tmp_path / "skimage").mkdir()
    (tmp_path / "skimage" / "__init__.py").touch()
    location = tmp_path / "skimage" / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "skimage", location, submodule_search_locations=[str(location.parent)]
    )
    monkeypatch.setattr(module, "find_spec", lambda _: spec)
    assert "astronaut.png" in error_of(photographs)


# ---------------------------------------------------------------------------------------------- reading


def test_luminance_is_bt601() -> None:
    primaries = torch.eye(3, dtype=torch.float64).view(3, 1, 3)
    expected = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    assert torch.allclose(luminance(primaries)[0, 0], expected, rtol=0, atol=1e-15)
    gray = torch.rand(1, 9, 9, dtype=torch.float64)
    assert torch.equal(luminance(gray.expand(3, 9, 9)), gray)  # so white is exactly 1


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "TIFF", "PNG"])
def test_eight_bits_gray_and_color(tmp_path: Path, extension: str) -> None:
    gray, rgb = pixels(5, 7), pixels(5, 7, 3)
    for array in (gray, rgb):
        path = save(tmp_path / f"a.{extension}", array)
        expected = torch.from_numpy(array / 255.0)
        got = read_image(path, color=True)
        assert got.shape == (3, 5, 7) and got.dtype == torch.float64
        assert torch.equal(got, expected.permute(2, 0, 1) if array is rgb else expected.expand(3, 5, 7))
        assert torch.equal(read_image(path), luminance(got) if array is rgb else expected[None])


def test_jpeg(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 3, (32, 1))
    image = read_image(save(tmp_path / "a.JPG", ramp, quality=95))
    assert image.shape == (1, 32, 64)
    assert (image[0] - torch.from_numpy(ramp / 255.0)).abs().max() < 0.02


def test_jpeg_orientation_and_cmyk(tmp_path: Path) -> None:
    turned = Image.fromarray(pixels(8, 16))
    exif = turned.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (1, 16, 8)
    Image.fromarray(pixels(8, 16, 3)).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert read_image(tmp_path / "cmyk.jpg", color=True).shape == (3, 8, 16)


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_alpha_is_dropped_not_blended(tmp_path: Path, extension: str) -> None:
    rgba = pixels(6, 4, 4)
    rgba[..., 3] = 0
    rgb = torch.from_numpy(rgba[..., :3] / 255.0).permute(2, 0, 1)
    assert torch.equal(read_image(save(tmp_path / f"a.{extension}", rgba), color=True), rgb)
    gray_alpha = Image.merge("LA", [Image.fromarray(pixels(6, 4)), Image.new("L", (4, 6), 0)])
    gray_alpha.save(tmp_path / "la.png")
    assert torch.equal(read_image(tmp_path / "la.png")[0], torch.from_numpy(pixels(6, 4) / 255.0))


@pytest.mark.parametrize("extension", ["png", "tif", "bmp"])
def test_palette_and_bilevel(tmp_path: Path, extension: str) -> None:
    indices = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), mode=None).convert("P")
    indices.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255] + [0] * 759)
    indices.putdata([0, 1, 2, 1])
    indices.save(tmp_path / f"p.{extension}")
    got = read_image(tmp_path / f"p.{extension}", color=True)
    assert got[:, 0, 0].tolist() == [1, 0, 0] and got[:, 1, 0].tolist() == [0, 0, 1]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / f"one.{extension}")
    assert read_image(tmp_path / f"one.{extension}").flatten().tolist() == [1, 0]


def test_palette_with_transparency(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putdata([0, 1])
    picture.save(tmp_path / "p.png", transparency=0)
    assert (read_image(tmp_path / "p.png", color=True)[:, 0, 0] * 255).round().tolist() == [10, 20, 30]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bit_png_keeps_all_bits(tmp_path: Path, channels: int) -> None:
    array = pixels(5, 3, channels, dtype=np.uint16)
    write_png16(tmp_path / "a.png", array)
    colors = array[..., :3] if channels >= 3 else array[..., :1]
    expected = torch.from_numpy(colors / 65535.0).permute(2, 0, 1).expand(3, -1, -1)
    assert torch.equal(read_image(tmp_path / "a.png", color=True), expected)


def test_sixteen_bit_gray_with_alpha_is_refused(tmp_path: Path) -> None:
    write_png16(tmp_path / "a.png", pixels(5, 3, 2, dtype=np.uint16))
    message = error_of(read_image, tmp_path / "a.png")
    assert "a.png" in message and "without alpha" in message


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_sixteen_bit_and_float_tiff(tmp_path: Path, byteorder: str) -> None:
    path = tmp_path / "a.tif"
    rgb = pixels(5, 3, 3, dtype=np.uint16)
    expected = torch.from_numpy(rgb / 65535.0).permute(2, 0, 1)
    tifffile.imwrite(path, rgb, photometric="rgb", byteorder=byteorder)
    assert torch.equal(read_image(path, color=True), expected)
    tifffile.imwrite(path, np.moveaxis(rgb, -1, 0), photometric="rgb", planarconfig="separate", byteorder=byteorder)
    assert torch.equal(read_image(path, color=True), expected)
    tifffile.imwrite(path, rgb[..., 0], byteorder=byteorder)
    assert torch.equal(read_image(path), expected[:1])
    tifffile.imwrite(path, rgb[..., 0], photometric="miniswhite", byteorder=byteorder)
    assert torch.allclose(read_image(path), 1 - expected[:1], rtol=0, atol=1e-15)
    tifffile.imwrite(path, expected[0].numpy().astype(np.float32), byteorder=byteorder)
    assert torch.equal(read_image(path), expected[:1].float().double())


def test_compressed_tiff(tmp_path: Path) -> None:
    deep = pixels(8, 8, dtype=np.uint16)
    assert torch.equal(
        read_image(save(tmp_path / "a.tif", deep, compression="tiff_lzw"))[0], torch.from_numpy(deep / 65535.0)
    )
    shallow = pixels(8, 8)
    assert torch.equal(
        read_image(save(tmp_path / "b.tif", shallow, compression="tiff_lzw"))[0], torch.from_numpy(shallow / 255.0)
    )


def test_unusable_values_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.tif"
    for value in (np.nan, np.inf, -np.inf):
        array = np.full((4, 4), 0.5, np.float32)
        array[1, 2] = value
        tifffile.imwrite(path, array)
        message = error_of(read_image, path)
        assert str(path) in message and "NaN or infinite" in message and "1 values" in message
    tifffile.imwrite(path, np.full((4, 4), 200, np.float32))
    assert "[0, 1]" in error_of(read_image, path) and "200" in error_of(read_image, path)
    tifffile.imwrite(path, np.full((4, 4), -5, np.int16))
    assert "int16" in error_of(read_image, path)
    tifffile.imwrite(path, np.zeros((4, 5, 4), np.uint16), photometric="separated")
    assert "Convert it to RGB" in error_of(read_image, path)
    tifffile.imwrite(path, np.zeros((3, 4, 5), np.uint16), photometric="minisblack")
    assert "3 pages" in error_of(read_image, path)


@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "bmp"])
def test_broken_files_are_named(tmp_path: Path, extension: str) -> None:
    path = save(tmp_path / f"good.{extension}", pixels(40, 40, 3))
    whole = path.read_bytes()
    for number, content in enumerate((b"", b"no image at all", whole[: len(whole) // 2], whole[:30])):
        broken = tmp_path / "broken" / f"{number}.{extension}"
        broken.parent.mkdir(exist_ok=True)
        broken.write_bytes(content)
        message = error_of(read_image, broken)
        assert str(broken) in message and "Replace the file or remove it" in message
    assert f"0.{extension}" in error_of(load_folder, tmp_path / "broken")


def test_broken_sixteen_bit_png(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_png16(path, pixels(40, 40, 3, dtype=np.uint16))
    path.write_bytes(path.read_bytes()[:200])
    assert str(path) in error_of(read_image, path)


def test_missing_file_and_too_small(tmp_path: Path) -> None:
    assert "none.png" in error_of(read_image, tmp_path / "none.png")
    path = save(tmp_path / "small.png", pixels(20, 30))
    assert read_image(path, min_size=20).shape == (1, 20, 30)
    assert read_image(path, min_size=(20, 30)).shape == (1, 20, 30)
    message = error_of(read_image, path, min_size=(16, 32))
    assert "small.png" in message and "20x30" in message and "16x32" in message


# ---------------------------------------------------------------------------------------------- folders


def test_folder_is_searched_in_order(tmp_path: Path) -> None:
    names = ["B.PNG", "a.jpeg", "sub/deep er/été 画.png", "sub/c.Tif", "z.bmp"]
    for seed, name in enumerate(names):
        save(tmp_path / name, pixels(4, 5, seed=seed))
    for other in ("notes.txt", ".hidden.png", "._B.png", ".cache/x.png", "a.gif"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    folder = ImageFolder(str(tmp_path))
    assert folder.names == list_images(tmp_path) == sorted(names)
    assert len(folder) == 5 and [name for name, _ in folder] == folder.names
    loaded = load_folder(tmp_path)
    assert [name for name, _ in loaded] == folder.names
    for i, (name, image) in enumerate(loaded):
        assert folder[i][0] == name and torch.equal(folder[i][1], image)
    assert torch.equal(folder[-1][1], loaded[-1][1])
    with pytest.raises(IndexError):
        folder[5]
    assert load_folder(tmp_path, color=True)[0][1].shape == (3, 4, 5)


def test_folder_is_lazy(tmp_path: Path) -> None:
    save(tmp_path / "a.png", pixels(4, 4))
    (tmp_path / "b.png").write_bytes(b"broken")
    folder = ImageFolder(tmp_path)
    assert folder[0][1].shape == (1, 4, 4)
    assert "b.png" in error_of(lambda: folder[1])
    assert "a.png" in error_of(lambda: ImageFolder(tmp_path, min_size=5)[0])


def test_folder_links(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "a.png", pixels(4, 4))
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "loop").symlink_to(root, target_is_directory=True)
    assert list_images(root) == ["linked/a.png"]


def test_folder_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such folder" in error_of(load_folder, tmp_path / "none")
    (tmp_path / "a.txt").write_text("x")
    assert "is a file" in error_of(load_folder, tmp_path / "a.txt")
    message = error_of(ImageFolder, tmp_path)
    assert str(tmp_path) in message and "no images" in message and ".tiff" in message
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(tmp_path) in error_of(load_folder, "~/none")


def test_unreadable_subfolder_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png", pixels(4, 4))
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def guarded(path: str) -> object:  # by hand, as permissions do not bind root
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    message = error_of(list_images, tmp_path)
    assert "locked" in message and "permissions" in message


# ---------------------------------------------------------------------------------------------- patches


def positions(patches: list[tuple[str, Tensor]]) -> list[tuple[int, int]]:
    return [tuple(int(n) for n in re.search(r"\[(\d+):\d+,(\d+):\d+\]$", name).groups()) for name, _ in patches]


def test_patches_are_crops_of_images_of_several_sizes() -> None:
    images = {"a": torch.rand(1, 30, 20), "b": torch.rand(3, 12, 40)}
    patches = extract_patches(images, 8, 5, seed=3)
    assert len(patches) == 10
    for (name, patch), (top, left) in zip(patches, positions(patches), strict=True):
        assert torch.equal(patch, images[name[0]][:, top : top + 8, left : left + 8])
        assert patch.untyped_storage().nbytes() == patch.numel() * patch.element_size()  # does not hold the image


def test_patches_are_reproducible_and_independent_of_other_images() -> None:
    a, b = torch.rand(1, 30, 20), torch.rand(1, 25, 25)
    alone = extract_patches([("a", a)], 8, 6, seed=1)
    both = extract_patches([("b", b), ("a", a)], 8, 6, seed=1)
    assert [name for name, _ in alone] == [name for name, _ in both[6:]]
    assert [name for name, _ in alone] != [name for name, _ in extract_patches({"a": a}, 8, 6, seed=2)]


@pytest.mark.parametrize("shape", [(9, 9), (8, 20), (20, 8), (11, 13), (8, 8), (50, 9)])
def test_no_patch_comes_twice_up_to_all_positions(shape: tuple[int, int]) -> None:
    image = torch.rand(1, *shape)
    total = (shape[0] - 7) * (shape[1] - 7)
    for count in range(1, total + 1):
        drawn = positions(extract_patches({"a": image}, 8, count, seed=count))
        assert len(drawn) == len(set(drawn)) == count
    assert "a: " in error_of(extract_patches, {"a": image}, 8, total + 1)


def test_patches_cover_the_image_evenly() -> None:
    for seed in range(5):
        drawn = positions(extract_patches({"a": torch.zeros(1, 107, 207)}, 8, 50, seed=seed))
        quadrants = [
            sum((top >= 50) == down and (left >= 100) == right for top, left in drawn)
            for down in (0, 1)
            for right in (0, 1)
        ]
        assert max(quadrants) - min(quadrants) <= 6


def test_patch_errors_and_center_crop(tmp_path: Path) -> None:
    image = torch.arange(30.0).view(1, 5, 6)
    assert "a: " in error_of(extract_patches, {"a": image}, 6, 1)
    with pytest.raises(ValueError, match="per_image"):
        extract_patches({"a": image}, 2, 0)
    assert center_crop(image, 3).flatten().tolist() == [7, 8, 9, 13, 14, 15, 19, 20, 21]
    assert center_crop(image, (5, 2)).shape == (1, 5, 2)
    message = error_of(center_crop, image, (6, 2), "b.png")
    assert "b.png" in message and "5x6" in message and "6x2" in message
    save(tmp_path / "x.png", pixels(9, 9))
    assert extract_patches(ImageFolder(tmp_path), 4, 2)[0][0].startswith("x.png[")


# ---------------------------------------------------------------------------------------------- degradations


def test_degradation_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="denoising, deblurring, inpainting"):
        Degradation("deblur")
    for options in ({"sigma": -1.0}, {"sigma": float("nan")}, {"blur_size": 4}, {"blur_std": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Degradation(**options)
    for options in ({"factor": 1}, {"views": 0}, {"acceleration": 0.9}, {"padding": "zeros"}, {"center_fraction": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Degradation(**options)
    with pytest.raises(ValueError, match="square images"):
        Degradation("tomography").physics((1, 8, 9))
    with pytest.raises(ValueError, match="factor <= the image size"):
        Degradation("super_resolution", factor=4).physics((1, 12, 20))
    with pytest.raises(ValueError, match=r"images \(2, H, W\) for mri"):
        Degradation("mri").physics((1, 24, 24))
    with pytest.raises(ValueError, match="gray images"):
        Degradation("mri").image(torch.zeros(3, 24, 24))
    with pytest.raises(ValueError, match="acceleration of at most 4 for 24 columns"):
        Degradation("mri", acceleration=5, center_fraction=0.25).physics((2, 24, 24))
    for fraction in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="kept_fraction"):
            Degradation("inpainting", kept_fraction=fraction)
    with pytest.raises(ValueError, match="blur_size"):
        Degradation("deblurring", blur_size=9).physics((1, 8, 20))
    with pytest.raises(ValueError, match="indices"):
        Degradation().measure(torch.zeros(2, 1, 4, 4), [0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_operators_are_linear_with_exact_adjoint_in_their_dtype(kind: str, dtype: torch.dtype, channels: int) -> None:
    assert_exact_adjoint(Degradation(kind, blur_size=5, views=7), channels, dtype)


def assert_exact_adjoint(degradation: Degradation, channels: int, dtype: torch.dtype) -> None:
    square = degradation.kind == "tomography"
    shape = (2 if degradation.kind == "mri" else channels, 14 if square else 11, 14)
    physics = degradation.physics(shape, dtype)
    u = torch.rand(2, *shape, dtype=dtype)
    v = torch.rand_like(physics.A(u))
    assert physics.A(u).dtype == physics.A_adjoint(v).dtype == dtype
    gap = (physics.A(u) * v).sum() - (u * physics.A_adjoint(v)).sum()
    assert abs(gap) <= 20 * torch.finfo(dtype).eps * u.norm() * v.norm()


@pytest.mark.parametrize("padding", PADDINGS)
def test_blurs_see_what_the_padding_says(padding: str) -> None:
    degradation = Degradation("deblurring", blur_size=5, blur_std=0.8, padding=padding)
    assert_exact_adjoint(degradation, 1, torch.float64)
    x = torch.rand(2, 1, 12, 15, dtype=torch.float64)
    y = degradation.physics((1, 12, 15)).A(x)
    # scipy's names of the same extensions; the inside sees none of them
    modes = {"circular": "wrap", "reflect": "mirror", "replicate": "nearest", "constant": "constant", "valid": "wrap"}
    kernel = gaussian_kernel(5, 0.8)[0, 0].numpy()
    expected = np.stack([ndimage.convolve(image, kernel, mode=modes[padding]) for image in x[:, 0].numpy()])
    expected = expected[:, 2:-2, 2:-2] if padding == "valid" else expected
    assert y.shape[2:] == expected.shape[1:] and np.abs(y[:, 0].numpy() - expected).max() < 1e-14


def test_super_resolution_keeps_pixels_of_a_blurred_image() -> None:
    x = torch.rand(1, 2, 14, 21, dtype=torch.float64)
    y = Degradation("super_resolution", factor=3).physics((2, 14, 21)).A(x)
    kernel = gaussian_kernel(11, 1.5)[0, 0].numpy()
    blurred = np.stack([ndimage.convolve(channel, kernel, mode="wrap") for channel in x[0].numpy()])
    assert y.shape == (1, 2, 5, 7) and np.abs(y[0].numpy() - blurred[:, ::3, ::3]).max() < 1e-14


def test_mri_measures_columns_of_the_unitary_transform() -> None:
    degradation = Degradation("mri", acceleration=4, center_fraction=0.1, sigma=0.0, seed=3)
    gray = torch.rand(1, 20, 40, dtype=torch.float64)
    x = degradation.image(gray)
    assert torch.equal(x[:1], gray) and not x[1].any() and degradation.image(x) is x
    lines = degradation.lines(40)
    assert lines.sum() == 10 and lines[18:22].all() and set(lines.tolist()) == {0.0, 1.0}
    assert not torch.equal(lines, Degradation("mri", seed=4, center_fraction=0.1).lines(40))
    y = degradation.measure(x, 0)
    spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(gray[0].numpy()), norm="ortho")) * lines.numpy()
    assert np.abs(y[0].numpy() + 1j * y[1].numpy() - spectrum).max() < 1e-13
    counts = sum(Degradation("mri", seed=seed, center_fraction=0.1).lines(40) for seed in range(300))
    assert counts[18:22].eq(300).all() and counts[12:18].sum() > 3 * counts[:6].sum() > 0


def test_noise_is_relative_to_the_sinogram_or_the_magnitude() -> None:
    x = 0.3 * torch.rand(1, 48, 48, dtype=torch.float64)
    ct = Degradation("tomography", sigma=0.05, views=20)
    clean = ct.physics(x.shape).A(x[None])[0]
    residual = ct.measure(x, 0) - clean
    assert abs(residual.std() / (0.05 * clean.max()) - 1) < 0.06
    mri = Degradation("mri", sigma=0.05, acceleration=2)
    image = mri.image(x)
    residual = mri.measure(image, 0) - mri.physics(image.shape).A(image[None])[0]
    measured = mri.lines(48).bool()
    assert not residual[..., ~measured].any()
    for part in residual[..., measured]:
        assert abs(part.std() / (0.05 * x.max()) - 1) < 0.08
    batch = torch.stack([x, 2 * x])
    assert torch.allclose(ct.measure(batch, [0, 0])[1], 2 * ct.measure(x, 0))


def test_blur_is_convolution_with_the_kernel_in_double_precision() -> None:
    kernel = gaussian_kernel(5, 1.2)
    assert kernel.dtype == torch.float64 and abs(kernel.sum() - 1) < 1e-15
    impulse = torch.zeros(1, 1, 16, 15, dtype=torch.float64)
    impulse[..., 8, 7] = 1
    blurred = Degradation("deblurring", blur_size=5, blur_std=1.2).physics((1, 16, 15)).A(impulse)
    assert (blurred[..., 6:11, 5:10] - kernel).abs().max() < 1e-16
    assert abs(blurred.sum() - 1) < 1e-14


def test_mask_is_fixed_exact_and_shared_by_channels() -> None:
    degradation = Degradation("inpainting", kept_fraction=0.3, seed=5)
    mask = degradation.physics((3, 10, 20), torch.float32).mask
    assert mask.shape == (1, 3, 10, 20) and mask.dtype == torch.float32 and mask[0, 0].sum() == 60
    assert torch.equal(mask[0, 0], mask[0, 2])
    assert torch.equal(mask[0, 0].bool(), degradation.mask(10, 20))
    assert not torch.equal(degradation.mask(10, 20), Degradation("inpainting", kept_fraction=0.3, seed=6).mask(10, 20))


@pytest.mark.parametrize("kind", KINDS)
def test_noise_depends_on_seed_index_and_shape_alone(kind: str) -> None:
    degradation = Degradation(kind, sigma=0.2, seed=7)
    x = degradation.image(torch.rand(4, 1, 12, 12, dtype=torch.float64))
    y = degradation.measure(x, [3, 1, 4, 9])
    torch.manual_seed(99)
    # Fourier transforms and sums of a sparse matrix may be in another order for a batch
    rounding = 0.0 if kind in ("denoising", "inpainting") else 1e-14
    assert (degradation.measure(x[2], 4) - y[2]).abs().max() <= rounding
    assert (degradation.measure(x[[1, 0]], torch.tensor([1, 3])) - y[[1, 0]]).abs().max() <= rounding
    assert (degradation.measure(x.float(), [3, 1, 4, 9]).double() - y).abs().max() < 1e-6
    assert not torch.equal(degradation.noise((1, 12, 12), 3), degradation.noise((1, 12, 12), 4))
    assert not torch.equal(degradation.noise((1, 12, 12), 3), Degradation(kind, sigma=0.2).noise((1, 12, 12), 3))


def test_measuring_leaves_everything_else_alone() -> None:
    x = torch.rand(1, 8, 8, dtype=torch.float64, requires_grad=True)
    before, state = x.detach().clone(), torch.get_rng_state()
    y = Degradation("denoising", sigma=3.0).measure(x, 0)
    assert not y.requires_grad and x.requires_grad and torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert y.min() < 0 and y.max() > 1  # neither clipped ...
    assert not torch.equal(y * 255, (y * 255).round())  # ... nor quantized


def test_noise_level_and_missing_pixels() -> None:
    x = torch.rand(1, 100, 100, dtype=torch.float64)
    residual = Degradation(sigma=0.1).measure(x, 0) - x
    assert abs(residual.std() - 0.1) < 0.004 and abs(residual.mean()) < 0.005
    assert torch.equal(Degradation(sigma=0.0).measure(x, 0), x)
    inpainting = Degradation("inpainting", sigma=0.1, kept_fraction=0.5)
    assert torch.equal(inpainting.measure(x, 0)[0] != 0, inpainting.mask(100, 100))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
def test_measurements_on_cuda_are_those_of_the_cpu(kind: str) -> None:
    x = torch.rand(2, 1, 12, 12, dtype=torch.float64)
    x = Degradation(kind).image(x)
    on_cpu = Degradation(kind).measure(x, [0, 1])
    assert (Degradation(kind).measure(x.cuda(), [0, 1]).cpu() - on_cpu).abs().max() < 1e-13


# ---------------------------------------------------------------------------------------------- pairs


def make_pairs(kind: str = "deblurring", dtype: torch.dtype = torch.float64) -> ImagePairs:
    generator = torch.Generator().manual_seed(0)
    other = (1, 14, 14) if kind == "tomography" else (1, 10, 14)
    shapes = [(1, 12, 12), other, (1, 12, 12), (1, 12, 12), other]
    images = {f"i{k}": torch.rand(shape, dtype=torch.float64, generator=generator) for k, shape in enumerate(shapes)}
    return ImagePairs.build(images, Degradation(kind, seed=1), dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_hold_what_the_degradation_measures(kind: str) -> None:
    pairs = make_pairs(kind)
    assert len(pairs) == 5 and pairs.names == [f"i{k}" for k in range(5)] and pairs.indices == [0, 1, 2, 3, 4]
    for k in range(5):
        assert torch.equal(pairs.y[k], Degradation(kind, seed=1).measure(pairs.x[k], k))
    single = make_pairs(kind, torch.float32)
    assert all(torch.equal(a.float(), b) for a, b in zip(pairs.y, single.y, strict=True))
    assert next(single.batches()).y.dtype == torch.float32


def test_batches_group_shapes_in_a_fixed_order() -> None:
    pairs = make_pairs()
    assert pairs.order() == [[0, 2, 3], [1, 4]]
    assert pairs.order(2) == [[0, 2], [3], [1, 4]]
    for batch, positions_ in zip(pairs.batches(2), pairs.order(2), strict=True):
        assert batch.indices.dtype == torch.int64 and batch.indices.tolist() == positions_
        assert torch.equal(batch.x, torch.stack([pairs.x[i] for i in positions_]))
        assert torch.equal(batch.y, torch.stack([pairs.y[i] for i in positions_]))
        assert batch.physics.A(batch.x).shape == batch.y.shape
    with pytest.raises(ValueError, match="batch_size"):
        pairs.order(0)
    with pytest.raises(ValueError, match="one shape"):
        pairs.batch([0, 1])


def test_operators_are_built_once_per_shape() -> None:
    built = []
    x = [torch.rand(1, 4, 4), torch.rand(1, 4, 4), torch.rand(1, 6, 4)]

    def make(shape: tuple[int, ...]) -> object:
        built.append(shape)
        return Degradation().physics(shape, torch.float32)

    pairs = ImagePairs(["a", "b", "c"], x, [t.clone() for t in x], make)
    for _ in range(2):
        operators = [batch.physics for batch in pairs.batches(1)]
    operators += [batch.physics for batch in pairs.subset([1]).batches()]
    assert built == [(1, 4, 4), (1, 6, 4)]
    assert operators[0] is operators[1] is operators[3]


def test_subset_keeps_indices_and_data() -> None:
    pairs = make_pairs()
    part = pairs.subset(torch.tensor([4, 2, 1]))
    assert part.names == ["i4", "i2", "i1"] and part.indices == [4, 2, 1] and len(pairs) == 5
    assert part.y[0] is pairs.y[4]
    assert [b.indices.tolist() for b in part.batches()] == [[4, 1], [2]]
    assert part.subset([1]).indices == [2]
    for wrong in ([], [0, 0], [5], [-1], [0.5]):
        with pytest.raises(ValueError, match="[Pp]osition"):
            pairs.subset(wrong)


def test_shuffled_order_is_complete_and_resumes_from_the_generator_state() -> None:
    pairs = make_pairs()
    generator = torch.Generator().manual_seed(4)
    passes = []
    for _ in range(6):
        state = generator.get_state()
        passes.append(pairs.order(2, generator))
        assert sorted(i for batch in passes[-1] for i in batch) == [0, 1, 2, 3, 4]
        assert all(len({pairs.x[i].shape for i in batch}) == 1 for batch in passes[-1])
    assert len({str(p) for p in passes}) > 1
    again = torch.Generator()
    again.set_state(state)
    iterator = pairs.batches(2, again)
    assert torch.equal(again.get_state(), generator.get_state())  # drawn at the call, not batch by batch
    assert [b.indices.tolist() for b in iterator] == passes[-1]


def test_pairs_survive_pickling() -> None:
    pairs = make_pairs("inpainting")
    copy = pickle.loads(pickle.dumps(pairs))
    assert torch.equal(next(copy.batches()).y, next(pairs.batches()).y)


def test_pairs_refuse_bad_data() -> None:
    good, bad = torch.rand(1, 4, 4), torch.rand(1, 4, 4)
    bad[0, 0, 0] = float("nan")
    assert "empty" in error_of(ImagePairs.build, {}, Degradation())
    assert "b: " in error_of(ImagePairs.build, {"a": good, "b": bad}, Degradation())
    assert "a: " in error_of(ImagePairs.build, [("a", good), ("a", good)], Degradation())
    assert "(C, H, W)" in error_of(ImagePairs.build, {"a": good[None]}, Degradation())
    make = Degradation().physics
    assert "as many" in error_of(ImagePairs, ["a"], [good], [], make)
    assert "b: " in error_of(ImagePairs, ["a", "b"], [good, good.double()], [good, good], make)
    assert "float" in error_of(ImagePairs, ["a"], [good.byte()], [good], make)


# ---------------------------------------------------------------------------------------------- noise levels


def test_noise_levels_are_uniform_and_belong_to_their_images() -> None:
    degradation = Degradation(sigma=0.5, sigma_range=(0.1, 0.3), seed=2)
    levels = torch.tensor([degradation.noise_level(i) for i in range(2000)], dtype=torch.float64)
    assert levels.min() >= 0.1 and levels.max() <= 0.3
    assert abs(levels.mean() - 0.2) < 0.005 and abs(levels.std() - 0.2 / 12**0.5) < 0.003
    x = torch.zeros(1, 100, 100, dtype=torch.float64)
    for index in range(3):
        assert abs(degradation.measure(x, index).std() / levels[index] - 1) < 0.03
    assert Degradation(sigma=0.5).noise_level(7) == 0.5
    for wrong in ((0.3, 0.1), (-0.1, 0.2), (0.0, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="sigma_range"):
            Degradation(sigma_range=wrong)


def test_batches_know_their_noise_levels() -> None:
    degradation = Degradation(sigma_range=(0.1, 0.3))
    pairs = ImagePairs.build({f"i{k}": torch.rand(1, 8, 8) for k in range(5)}, degradation, torch.float32)
    expected = torch.tensor([degradation.noise_level(k) for k in range(5)])
    batch = pairs.subset([4, 1, 3]).batch([0, 2])
    assert batch.noise_level.dtype == torch.float32 and torch.equal(batch.noise_level, expected[[4, 3]])
    assert torch.equal(next(make_pairs().batches()).noise_level, torch.full((3,), 0.1, dtype=torch.float64))
    unknown = ImagePairs(pairs.names, pairs.x, pairs.y, pairs.make_physics)
    assert unknown.batch([0]).noise_level is None and unknown.subset([1]).batch([0]).noise_level is None
    assert "noise levels" in error_of(
        ImagePairs, pairs.names, pairs.x, pairs.y, pairs.make_physics, noise_levels=[0.1, 0.2]
    )
    for whole in (next(pairs.batches()), next(unknown.batches())):
        parts = whole.split(2)
        assert [len(p.x) for p in parts] == [2, 2, 1] and all(p.physics is whole.physics for p in parts)
        assert torch.cat([p.indices for p in parts]).tolist() == [0, 1, 2, 3, 4]
        for name in ("x", "y"):
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
        assert [p.noise_level is None for p in parts] == [whole.noise_level is None] * 3


# ---------------------------------------------------------------------------------------------- random patches


PATCHED = (("a", (30, 20)), ("b", (12, 40)), ("c", (9, 9)))


def random_patches(kind: str = "denoising", seed: int = 0, **options: object) -> RandomPatches:
    generator = torch.Generator().manual_seed(0)
    images = [(name, torch.rand(1, *shape, generator=generator)) for name, shape in PATCHED]
    degradation = Degradation(kind, sigma_range=(0.05, 0.15), blur_size=5, seed=seed)
    return RandomPatches(images, degradation, 9, 6, seed=seed, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_random_patches_are_a_function_of_seed_and_step(kind: str) -> None:
    source, other = random_patches(kind), random_patches(kind)
    expected = {step: source.batch(step) for step in (0, 1, 7)}
    torch.rand(5)
    for step in (7, 3, 0, 1):  # in any order, whatever was asked for before
        batch = other.batch(step)
        if step in expected:
            for name in ("indices", "x", "y", "noise_level"):
                assert torch.equal(getattr(batch, name), getattr(expected[step], name)), name
    assert not torch.equal(expected[0].x, expected[1].x)
    assert not torch.equal(expected[0].x, random_patches(kind, seed=1).batch(0).x)
    assert expected[7].indices.tolist() == list(range(42, 48))
    single = random_patches(kind, dtype=torch.float32).batch(7)
    assert single.x.dtype == single.y.dtype == single.noise_level.dtype == torch.float32
    assert torch.equal(single.y, expected[7].y.float()) and torch.equal(single.x.double(), expected[7].x)


@pytest.mark.parametrize("kind", KINDS)
def test_random_patches_are_measured_by_the_degradation(kind: str) -> None:
    source = random_patches(kind)
    batch = source.batch(4)
    assert torch.equal(batch.y, source.degradation.measure(batch.x, batch.indices))
    assert batch.noise_level.tolist() == [source.degradation.noise_level(i) for i in batch.indices.tolist()]
    assert batch.physics.A(batch.x).shape == batch.y.shape


def test_random_patches_are_turned_and_flipped_crops_of_all_images_and_places() -> None:
    source = random_patches()
    crops: dict[bytes, tuple[str, int, int, int]] = {}
    for name, image in zip(source.names, source.x, strict=True):
        for top in range(image.shape[1] - 8):
            for left in range(image.shape[2] - 8):
                crop = image[:, top : top + 9, left : left + 9]
                for k in range(8):
                    turned = crop.rot90(k % 4, (1, 2)).flip(-1) if k >= 4 else crop.rot90(k, (1, 2))
                    crops[turned.contiguous().numpy().tobytes()] = (name, top, left, k)
    found = [crops[x.float().contiguous().numpy().tobytes()] for step in range(200) for x in source.batch(step).x]
    counts = {name: sum(f[0] == name for f in found) for name in source.names}
    assert all(abs(count - 400) < 80 for count in counts.values()), counts  # 5 standard deviations of 16
    assert all(abs(sum(f[3] == k for f in found) - 150) < 60 for k in range(8))
    assert len({f[1:3] for f in found if f[0] == "a"}) > 180  # of 264 places in 400 draws, 206 on average
    assert len({f[1:3] for f in found if f[0] == "b"}) > 110  # of 128 places, 122 on average


def test_random_patches_hold_images_once_and_refuse_bad_ones() -> None:
    source = random_patches()
    assert all(x.dtype == torch.float32 for x in source.x)
    good = torch.rand(1, 12, 12)
    assert "b: the image is too small" in error_of(RandomPatches, {"a": good, "b": good[:, :8]}, Degradation(), 9, 2)
    assert "b: expected 1 channels" in error_of(
        RandomPatches, {"a": good, "b": good.expand(3, 12, 12)}, Degradation(), 9, 2
    )
    assert "empty" in error_of(RandomPatches, {}, Degradation(), 9, 2)
    for size, count in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="size >= 1 and count >= 1"):
            RandomPatches({"a": good}, Degradation(), size, count)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_file_names_that_are_not_text_are_named(tmp_path: Path) -> None:
    Image.new("L", (20, 20)).save(tmp_path / "good.png")
    os.rename(os.fsencode(tmp_path / "good.png"), os.fsencode(tmp_path) + b"/bad\xff.png")
    assert "'bad\\xff.png' is not UTF-8" in error_of(list_images, tmp_path)


# ---------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("total", [3, 4, 10, 11, 57])
@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.1), (0.98, 0.01, 0.01), (0.34, 0.33, 0.33)])
def test_split_is_a_partition_close_to_the_fractions(total: int, fractions: tuple[float, float, float]) -> None:
    names = [f"{i}.png" for i in range(total)]
    split = split_names(names, fractions, seed=2)
    parts = (split.train, split.validation, split.test)
    assert sorted(name for part in parts for name in part) == sorted(names)
    for part, fraction in zip(parts, fractions, strict=True):
        assert part and abs(len(part) - fraction * total) < 2 and list(part) == sorted(part)
    assert split == split_names(reversed(names), fractions, seed=2)


def test_split_seeds_zeros_and_errors() -> None:
    names = [f"{i}.png" for i in range(30)]
    assert split_names(names, seed=0) != split_names(names, seed=1)
    assert split_names(names[:1], (1.0, 0.0, 0.0)) == Split(("0.png",), (), ())
    assert len(split_names(names, (0.5, 0.5, 0.0)).validation) == 15
    assert "at least 3 images" in error_of(split_names, names[:2])
    assert "0.png" in error_of(split_names, ["0.png", "a", "b", "0.png"])
    assert "x" in error_of(Split, ("x",), (), ("x",))
    for fractions in ((0.5, 0.2, 0.2), (1.2, -0.1, -0.1), (0.5, 0.5)):
        with pytest.raises(ValueError, match="sum to 1"):
            split_names(names, fractions)  # type: ignore[arg-type]
