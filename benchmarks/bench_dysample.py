"""The four upsamplings of the decoder, forward and backward: `dysample`, channels last, against `grid_sample`.

python -m benchmarks.bench_dysample
"""

from __future__ import annotations

from functools import partial

from .timing import Case, main, num_sets

SHAPES = ((256, 30, 22), (128, 60, 45), (64, 120, 90), (32, 240, 180))  # below each level of the published grid


def cases(arguments) -> list[Case]:
    import torch

    from kdmos import ops

    from . import baseline

    def pieces(shapes, seed):
        """Work of both sides on the same numbers, each in its own layout."""
        both = []
        for layout in (torch.contiguous_format, torch.channels_last):
            generator = torch.Generator().manual_seed(seed)
            images = []
            for channels, height, width in shapes:
                x = torch.randn(1, channels, height, width, generator=generator)
                offset = 0.25 * torch.randn(1, 32, height, width, generator=generator)
                gradient = torch.randn(1, channels, 2 * height, 2 * width, generator=generator)
                tensors = [t.to(arguments.device).contiguous(memory_format=layout) for t in (x, offset, gradient)]
                images.append((tensors[0].requires_grad_(), tensors[1].requires_grad_(), tensors[2]))
            both.append(images)
        return both

    def run(function, images):
        for x, offset, gradient in images:
            x.grad = offset.grad = None
            function(x, offset).backward(gradient)

    found = []
    for shapes in (SHAPES, *((shape,) for shape in SHAPES)):
        values = sum(c * h * w for c, h, w in shapes)
        places = sum(32 * h * w for _, h, w in shapes)
        # forward: x and offsets in, four values out; backward: those and the gradient in, two gradients out
        moved = 4 * ((values + places + 4 * values) + (values + places + 4 * values) + (values + places))
        sides = list(zip(*(pieces(shapes, seed) for seed in range(num_sets(arguments.device, moved)))))
        name = "all four" if len(shapes) > 1 else " x ".join(map(str, shapes[0]))
        found.append(
            Case(
                f"forward and backward, {name}",
                [partial(run, baseline.dysample, images) for images in sides[0]],
                [partial(run, ops.dysample, images) for images in sides[1]],
                scans="drawn",
                limit_bytes=moved,
            )
        )
    return found


if __name__ == "__main__":
    main("dysample", cases, __doc__)
