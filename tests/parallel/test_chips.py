"""Peak rates by device name."""

import pytest

from diladiff_jax.parallel import peak_flops


@pytest.mark.parametrize(
    ("device_kind", "flops"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("cpu", None),
    ],
)
def test_the_longest_matching_prefix_of_a_device_name_counts(device_kind, flops):
    assert peak_flops(device_kind) == flops
