"""How bytes mean numbers: codecs, the random generator of stochastic rounding, parameter storage. See README.md beside this file."""

from .codecs import CODECS, FORMATS, GROUP_SIZES, ROUNDINGS, Codec, check_group_size, check_rounding, codec_name, get_codec, num_groups

__all__ = [
    "CODECS",
    "FORMATS",
    "GROUP_SIZES",
    "ROUNDINGS",
    "Codec",
    "check_group_size",
    "check_rounding",
    "codec_name",
    "get_codec",
    "num_groups",
]
