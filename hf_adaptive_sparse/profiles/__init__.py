"""Value objects that describe a compression: sparsity, KV bits, and how to calibrate.

Frozen dataclasses, validated when made, with a versioned JSON form. No module here imports
torch; Python imports the package around them first, and that does.
"""

from hf_adaptive_sparse.profiles.calibration import MIN_EXPERT_TOKENS, CalibrationConfig
from hf_adaptive_sparse.profiles.checks import check_count, check_keys, check_ratio
from hf_adaptive_sparse.profiles.compression import CompressionProfile
from hf_adaptive_sparse.profiles.kv_cache import Bits, KVCacheConfig
from hf_adaptive_sparse.profiles.sparsity import SparsityProfile
from hf_adaptive_sparse.profiles.versions import (
    FORMAT_VERSION,
    LOSSLESS_BITS_VERSION,
    QUANT_METHOD,
    WEIGHT_BITS_VERSION,
    check_format_version,
    weight_bits_version,
)
from hf_adaptive_sparse.profiles.widths import (
    KV_BITS,
    KV_KEY_MODES,
    LOSSLESS_BITS,
    SEARCHED_WEIGHT_BITS,
    WEIGHT_BITS,
    check_weight_bits,
)

__all__ = [
    "FORMAT_VERSION",
    "KV_BITS",
    "KV_KEY_MODES",
    "LOSSLESS_BITS",
    "LOSSLESS_BITS_VERSION",
    "MIN_EXPERT_TOKENS",
    "QUANT_METHOD",
    "SEARCHED_WEIGHT_BITS",
    "WEIGHT_BITS",
    "WEIGHT_BITS_VERSION",
    "Bits",
    "CalibrationConfig",
    "CompressionProfile",
    "KVCacheConfig",
    "SparsityProfile",
    "check_count",
    "check_format_version",
    "check_keys",
    "check_ratio",
    "check_weight_bits",
    "weight_bits_version",
]
