"""Data sets, folders of images, decoding, copies; public synthetic images."""

from dpmix.images.data import ImageSet as ImageSet
from dpmix.images.data import Splits as Splits
from dpmix.images.data import load as load
from dpmix.images.data import public_images as public_images
