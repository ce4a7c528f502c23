"""Images to learn from: bundled photographs, folders, patches, reproducible measurements, splits by image."""

from bilevel_imaging.data.degradations import Degradation, gaussian_kernel
from bilevel_imaging.data.folders import ImageFolder, list_images, load_folder
from bilevel_imaging.data.mnist import corrupt_labels, load_mnist
from bilevel_imaging.data.mri import cartesian_mask, magnitude
from bilevel_imaging.data.pairs import Batch, ImagePairs
from bilevel_imaging.data.patches import center_crop, extract_patches
from bilevel_imaging.data.photographs import COLOR_PHOTOGRAPHS, PHOTOGRAPH_SPLIT, photographs
from bilevel_imaging.data.random_patches import RandomPatches
from bilevel_imaging.data.reading import EXTENSIONS, luminance, read_image
from bilevel_imaging.data.splits import Split, keyed_generator, split_names

__all__ = [
    "COLOR_PHOTOGRAPHS",
    "EXTENSIONS",
    "PHOTOGRAPH_SPLIT",
    "Batch",
    "Degradation",
    "ImageFolder",
    "ImagePairs",
    "RandomPatches",
    "Split",
    "center_crop",
    "corrupt_labels",
    "extract_patches",
    "gaussian_kernel",
    "keyed_generator",
    "list_images",
    "load_folder",
    "load_mnist",
    "luminance",
    "cartesian_mask",
    "magnitude",
    "photographs",
    "read_image",
    "split_names",
]
