"""The student's deep layers after Winograd, against torch's convolution of the same image in the same precision.

    python -m benchmarks.bench_winograd_conv

On a CPU with AVX-512, where the op has its kernel. The limit counts the multiply-adds that are left, 4 an input and
output channel and pixel, at the rate of a plain matrix product.
"""

from __future__ import annotations

from functools import partial

from .timing import Case, main, multiply_adds_per_second

SHAPES = ((64, 64, 240, 180), (128, 32, 240, 180), (128, 128, 120, 90), (512, 128, 60, 45), (256, 256, 60, 45))


def cases(arguments) -> list[Case]:
    import torch
    from torch.nn import functional as F

    from kdmos import ops

    def theirs(x, weight, bias):
        with torch.inference_mode():
            return F.leaky_relu_(F.conv2d(F.pad(x, (1, 1, 0, 0), mode="circular"), weight, bias, padding=(1, 0)), 0.01)

    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for inputs, outputs, rings, sectors in SHAPES:
            x, weight = torch.randn(1, inputs, rings, sectors), torch.randn(outputs, inputs, 3, 3) / inputs
            plain = [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight)]
            bias = torch.randn(outputs)
            if not ops.can_winograd(plain[:1], outputs):
                continue
            products = 4 * inputs * outputs * rings * sectors
            found.append(
                Case(
                    f"{str(dtype).removeprefix('torch.')}, {inputs} to {outputs} channels, {rings} x {sectors}",
                    partial(theirs, *plain, bias.to(dtype)),
                    partial(ops.winograd_conv, plain[:1], ops.winograd_weight(weight, dtype), bias, 0.01),
                    scans="drawn",
                    limit_ms=1e3 * products / multiply_adds_per_second(dtype, "cpu"),
                )
            )
    return found


if __name__ == "__main__":
    main("winograd_conv", cases, __doc__)
