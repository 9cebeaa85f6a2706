"""Known GPUs with their nominal speed and memory, to rate runs by and to plan them for."""

import re
from dataclasses import dataclass

import torch

from configurator import DType, UserError
from plaingpt import runtime
from plaingpt.runtime import Runtime

# Dense bf16 matrix products in TFLOP/s, memory in GB, and the speed of the link to the other GPUs
# of a machine in GB/s, one way, from the vendors' data sheets. The link is NVLink or Infinity
# Fabric where it connects all eight GPUs, else PCIe.
KNOWN = {
    "A100": (312, 80, 300),
    "A100 40GB": (312, 40, 300),
    "A10": (125, 24, 32),
    "A10G": (70, 24, 32),
    "A30": (165, 24, 32),
    "A40": (150, 48, 32),
    "A6000": (155, 48, 32),
    "B200": (2250, 180, 900),
    "B300": (2250, 270, 900),
    "GB200": (2500, 186, 900),
    "H100 PCIe": (756, 80, 64),
    "H100 NVL": (835, 94, 64),
    "H100": (989, 80, 450),
    "GH200": (989, 96, 450),
    "H200 NVL": (835, 141, 64),
    "H200": (989, 141, 450),
    "H20": (148, 96, 450),
    "L40S": (362, 48, 32),
    "L40": (181, 48, 32),
    "L4": (121, 24, 32),
    "MI300X": (1307, 192, 448),
    "MI325X": (1307, 256, 448),
    "RTX 3090": (71, 24, 32),
    "RTX 6000 Ada": (364, 48, 32),
    "RTX 4090": (165, 24, 32),
    "RTX 5090": (210, 32, 64),
    "T4": (65, 16, 16),
    "V100": (125, 16, 150),
}
MACHINE = 8  # GPUs in each machine, if a run has more
NETWORK = 50  # GB/s of each GPU to other machines: 400 Gbit/s
FP16_ONLY = ("T4", "V100")  # no bf16; their speed is that of fp16
USABLE = 0.93  # of the nominal memory: the driver and error correction take the rest


@dataclass(frozen=True)
class Device:
    name: str
    kind: str  # cpu, cuda or mps
    memory_gib: float | None = None  # None: unknown
    peak_flops: float | None = None  # per second, in bf16 or fp16; None: unknown
    link: float | None = None  # bytes per second to the other processes; None: unknown


def device_of(device: torch.device) -> Device:
    """The device of this machine that a process runs on."""
    peak = None
    if device.type == "cuda":
        found = torch.cuda.get_device_name(device)
        # "H100 PCIe" and "H200 NVL" stand before "H100" and "H200"
        names = [name for name in KNOWN if re.search(rf"\b{name}\b", found)]
        peak = KNOWN[names[0]][0] * 1e12 if names else None
    return Device(str(device), device.type, runtime.device_memory_gib(device), peak)


def squeezed(name: str) -> str:
    return name.lower().replace(" ", "")


def planned_devices(text: str, dtype: DType) -> tuple[Runtime, Device]:
    """The processes of a run on, say, "8xH100" or "H100", and the device of each, without touching
    any.

    Raises a UserError that lists the known devices.
    """
    words = re.fullmatch(r"(?:([1-9]\d{0,5})\s*[x×*]\s*)?(.*)", text.strip(), re.DOTALL)
    names = {squeezed(known): known for known in KNOWN}
    name = names.get(squeezed(words[2])) if words else None
    if not words or not name:
        raise UserError(
            f"plan_for={text!r} is not a known device, such as 8xH100; known are {', '.join(KNOWN)}"
        )
    if dtype == "float32":
        raise UserError("plan_for knows the speed of 16-bit products only: use --dtype=auto")
    tflops, gigabytes, link = KNOWN[name]
    count = int(words[1] or 1)
    if count > MACHINE:  # a ring crosses between machines once, over all their adapters
        link = min(link, MACHINE * NETWORK)
    best = torch.float16 if name in FP16_ONLY else torch.bfloat16
    rt = Runtime(
        torch.device("cuda"),
        best if dtype == "auto" else getattr(torch, dtype),
        world_size=count,
    )
    return rt, Device(name, "cuda", USABLE * gigabytes, tflops * 1e12, link * 1e9)
