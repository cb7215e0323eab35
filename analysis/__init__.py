# SPDX-License-Identifier: Apache-2.0
"""
See what attention learned: the paper's analyses for any KArAt-ViT or softmax ViT checkpoint.

`python -m analysis WHAT --model DIR_OR_REPO` makes a figure (PNG and SVG) and saves the numbers behind it. One module
or package makes each, and can be called from a notebook just as well:

    compute(...)    a model and images in, a dataclass of arrays out
    draw(data, ...) that dataclass and matplotlib axes in, the axes out
    add_arguments(parser), run(args)    the command

What they share: `models` (models and the runs they are from), `images`, `recording` (attention maps and scores of
every model), `style` (sizes, colours), `output` (files), `options` (flags).
"""
