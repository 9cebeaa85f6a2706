"""Which GPUs are known, by the names that drivers and users give them."""

import pytest
import torch

from plaingpt import runtime
from plaingpt.training import devices


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA A10", 125),
        ("NVIDIA A30", 165),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA H20", 148),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA A40", 150),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 2080 Ti", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    monkeypatch.setattr(runtime, "device_memory_gib", lambda device: 79.1)
    found = devices.device_of(torch.device("cuda"))
    assert found == devices.Device("cuda", "cuda", 79.1, tflops and tflops * 1e12)


def test_other_devices_have_no_peak():
    for kind in ("cpu", "mps"):
        assert devices.device_of(torch.device(kind)).peak_flops is None


@pytest.mark.parametrize(
    "text, count, name, dtype",
    [
        ("8xH100", 8, "H100", torch.bfloat16),
        ("h100", 1, "H100", torch.bfloat16),
        ("2 × RTX 4090", 2, "RTX 4090", torch.bfloat16),
        ("16*a100 40gb", 16, "A100 40GB", torch.bfloat16),
        ("4xT4", 4, "T4", torch.float16),
    ],
)
def test_devices_to_plan_for(text, count, name, dtype):
    rt, device = devices.planned_devices(text, "auto")
    assert (rt.world_size, rt.dtype, device.name, device.kind) == (count, dtype, name, "cuda")
    assert device.memory_gib < devices.KNOWN[name][1]


@pytest.mark.parametrize(
    "text, gigabytes",
    [
        ("H100", 450),
        ("8xH100", 450),
        ("9xH100", 400),  # eight adapters of 50 GB/s
        ("512xH100", 400),
        ("512xA100", 300),
        ("2xRTX 4090", 32),
        ("16xRTX 4090", 32),
    ],
)
def test_the_link_between_machines_may_be_slower_than_within(text, gigabytes):
    _, device = devices.planned_devices(text, "auto")
    assert device.link == gigabytes * 1e9


@pytest.mark.parametrize(
    "text", ["8xH1000", "0xH100", "00xH100", "", "8x", "cpu", "-1xH100", "8xH100\n8"]
)
def test_unknown_devices_are_refused_with_those_that_are_known(text):
    with pytest.raises(ValueError, match="such as 8xH100; known are A100, .*, H200, .*V100$"):
        devices.planned_devices(text, "auto")


def test_the_speed_of_float32_is_not_known():
    with pytest.raises(ValueError, match="16-bit products only"):
        devices.planned_devices("8xH100", "float32")
