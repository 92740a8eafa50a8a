"""Frozen encoders, the engine that runs them, and networks to train."""

from dpmix.models.encoders import Encoder as Encoder
from dpmix.models.encoders import encoder as encoder
from dpmix.models.wide_resnet import wide_resnet as wide_resnet
