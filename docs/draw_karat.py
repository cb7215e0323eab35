# SPDX-License-Identifier: Apache-2.0
"""
Draw `karat.svg`, the README's picture of the operator: `python docs/draw_karat.py`.

The scores, curves and weights in it are made up, but the activated rows are computed from them.
"""

import math
import random
from pathlib import Path


WIDTH, HEIGHT = 1040, 470
TOKENS, RANK = 8, 3
HIGHLIGHTED = 3
INK, PALE, SCORE, LEARNED, FIXED = "#1f2933", "#7b8794", "#e8890c", "#0b7a75", "#52606d"

_random = random.Random(7)
SCORES = [[_random.gauss(0, 1.1) for _ in range(TOKENS)] for _ in range(TOKENS)]
COEFFICIENTS = [
    [[(_random.gauss(0, 1) / m**1.2, _random.gauss(0, 1) / m**1.2) for m in (1, 2, 3)] for _ in range(TOKENS)]
    for _ in range(RANK)
]
PROJECTOR = [[_random.gauss(0, 1) for _ in range(RANK)] for _ in range(TOKENS)]


def phi(p: int, q: int, x: float) -> float:
    harmonics = enumerate(COEFFICIENTS[p][q], start=1)
    return sum(a * math.cos(m * x) + b * math.sin(m * x) for m, (a, b) in harmonics)


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(x) for x in row]
    return [e / sum(exponentials) for e in exponentials]


def karat(row: list[float]) -> tuple[list[float], list[float]]:
    hidden = [sum(phi(p, q, x) for q, x in enumerate(row)) for p in range(RANK)]
    return hidden, [sum(w * h for w, h in zip(weights, hidden)) for weights in PROJECTOR]


def text(x, y, content, size=14, color=INK, anchor="middle", weight="normal", style="normal") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}" font-weight="{weight}" '
        f'font-style="{style}">{content}</text>'
    )


def subscript(content) -> str:
    # The empty span moves the baseline back.
    return f'<tspan dy="4" font-size="10">{content}</tspan><tspan dy="-4">&#8203;</tspan>'


def heading(x, y, title, remark, color) -> str:
    rest = f'<tspan font-size="14" font-weight="normal" dx="14">{remark}</tspan>'
    return text(x, y, title + rest, 17, color, "start", "bold")


def box(x, y, width, height, fill="white", stroke=PALE, stroke_width=1.0, radius=0) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="{stroke_width:g}"/>'
    )


def arrow(*points) -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'


def shade(value: float, largest: float, rgb: tuple[int, int, int]) -> str:
    """Grey for negative values, the colour for positive ones, white for zero."""
    strength = min(1.0, abs(value) / largest)
    target = rgb if value >= 0 else (82, 96, 109)
    return "#" + "".join(f"{round(255 + (c - 255) * 0.85 * strength):02x}" for c in target)


def cells(x, y, width, height, values, rgb, largest) -> list[str]:
    return [box(x + i * width, y, width, height, shade(v, largest, rgb)) for i, v in enumerate(values)]


def bars(x, y, width, height, values, color, largest) -> list[str]:
    """A row of values as bars about a zero line at `y`; `height` is that of the largest."""
    parts = [f'<line x1="{x:g}" y1="{y:g}" x2="{x + width * len(values):g}" y2="{y:g}" stroke="{PALE}"/>']
    for i, value in enumerate(values):
        size = height * value / largest
        parts.append(box(x + (i + 0.18) * width, y - max(size, 0), width * 0.64, abs(size), color, "none"))
    return parts


def curve(x, y, width, height, function, largest, color) -> str:
    points = []
    for step in range(33):
        at = -math.pi + 2 * math.pi * step / 32
        level = max(-1.0, min(1.0, function(at) / largest))
        points.append(f"{x + 3 + (width - 6) * step / 32:.1f},{y + height / 2 - level * (height / 2 - 3):.1f}")
    return f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" stroke-width="1.6"/>'


def picture() -> str:
    orange, teal = (232, 137, 12), (11, 122, 117)
    row = SCORES[HIGHLIGHTED]
    hidden, activated = karat(row)
    parts = [box(0, 0, WIDTH, HEIGHT, "white", "none")]

    # Scores
    x, y, side = 40, 170, 19
    for index, values in enumerate(SCORES):
        parts += cells(x, y + index * side, side, side, values, orange, 2.6)
    row_y = y + HIGHLIGHTED * side
    right = x + TOKENS * side
    parts.append(box(x, row_y, TOKENS * side, side, "none", SCORE, 3))
    parts += [
        text(x + TOKENS * side / 2, y - 34, "scores of one head", 15, weight="bold"),
        text(x + TOKENS * side / 2, y - 13, "S = QK&#7488;/&#8730;d", 15),
        text(x + TOKENS * side / 2, y + TOKENS * side + 22, "N &#215; N, as in any ViT", 13, FIXED),
        text(x + TOKENS * side / 2, y + TOKENS * side + 40, "a row s for each query", 13, SCORE, weight="bold"),
    ]

    # Both branches start from the row.
    wide, left = 38, 290
    parts.append(arrow((right + 4, row_y + side / 2), (230, row_y + side / 2), (230, 95), (left - 8, 95)))
    parts.append(arrow((230, row_y + side / 2), (230, 259), (left - 8, 259)))

    # Softmax
    parts.append(heading(left, 40, "Softmax attention", "one fixed function, nothing to learn", FIXED))
    parts += cells(left, 84, wide, 22, row, orange, 2.6)
    parts.append(text(left + TOKENS * wide / 2, 128, "exp(s) / &#931; exp(s)", 14, FIXED))
    out = 790
    parts.append(arrow((left + TOKENS * wide + 8, 95), (out - 14, 95)))
    probabilities = softmax(row)
    parts += bars(out, 112, 19, 44, probabilities, FIXED, max(probabilities))
    parts.append(text(out + TOKENS * 19 / 2, 134, "positive, sums to 1", 13, FIXED))

    # KArAt
    top = 190
    parts.append(f'<line x1="{left}" y1="{top - 36}" x2="{WIDTH - 30}" y2="{top - 36}" stroke="#cbd2d9"/>')
    parts.append(
        heading(left, top, "Kolmogorov&#8211;Arnold attention", "every edge learns a function of its own", LEARNED)
    )
    parts += cells(left, 248, wide, 22, row, orange, 2.6)
    parts.append(text(left + TOKENS * wide / 2, 236, "s, one score for each of the N keys", 13, SCORE))
    grid_y, tall = 286, 34
    for p in range(RANK):
        for q in range(TOKENS):
            cell_x, cell_y = left + q * wide, grid_y + p * tall
            parts.append(box(cell_x, cell_y, wide, tall, "#f2faf9"))
            parts.append(curve(cell_x, cell_y, wide, tall, lambda at, p=p, q=q: phi(p, q, at), 2.6, LEARNED))
    parts += [
        f'<path d="M{left + (q + 0.5) * wide:g} 271 v11" stroke="{PALE}" stroke-width="1.2"/>' for q in range(TOKENS)
    ]
    middle = left + TOKENS * wide / 2
    foot = grid_y + RANK * tall
    parts.append(text(middle, foot + 24, f"&#934;: r &#215; N functions &#966;{subscript('pq')}", 15))
    formula = f"a{subscript('m')} cos(mx) + b{subscript('m')} sin(mx)"
    parts.append(text(middle, foot + 47, f"Fourier: &#966;(x) = &#931; {formula}", 14, LEARNED))
    parts.append(text(middle, foot + 67, "or splines, wavelets, rational functions", 13, LEARNED))

    # Sums over the keys
    hidden_x = left + TOKENS * wide + 52
    for p, value in enumerate(hidden):
        centre = grid_y + (p + 0.5) * tall
        parts.append(arrow((left + TOKENS * wide + 6, centre), (hidden_x - 7, centre)))
        parts += cells(hidden_x, centre - 13, 26, 26, [value], teal, max(map(abs, hidden)))
    parts.append(text(left + TOKENS * wide + 26, grid_y + 0.5 * tall - 6, "&#931;", 15))
    parts.append(text(hidden_x + 13, foot + 24, "&#934;(s)", 15))
    parts.append(text(hidden_x + 13, foot + 44, "r numbers", 13, FIXED))

    # Projector
    matrix_x = hidden_x + 62
    parts.append(arrow((hidden_x + 32, grid_y + RANK * tall / 2), (matrix_x - 7, grid_y + RANK * tall / 2)))
    for n, weights in enumerate(PROJECTOR):
        parts += cells(matrix_x, grid_y + n * RANK * tall / TOKENS, 13, RANK * tall / TOKENS, weights, teal, 2.4)
    parts.append(text(matrix_x + 20, foot + 24, "&#215; W", 15))
    parts.append(text(matrix_x + 20, foot + 44, "N &#215; r", 13, FIXED))
    parts.append(arrow((matrix_x + 46, grid_y + RANK * tall / 2), (out - 8, grid_y + RANK * tall / 2)))
    parts += bars(out, grid_y + RANK * tall / 2, 19, 44, activated, LEARNED, max(map(abs, activated)))
    parts.append(text(out + TOKENS * 19 / 2, foot + 24, "W &#934;(s)", 15))
    parts.append(text(out + TOKENS * 19 / 2, foot + 44, "may be negative,", 13, FIXED))
    parts.append(text(out + TOKENS * 19 / 2, foot + 60, "need not sum to 1", 13, FIXED))

    # The values
    for level in (95, grid_y + RANK * tall / 2):
        parts.append(arrow((out + TOKENS * 19 + 8, level), (972, level)))
        parts.append(box(974, level - 16, 46, 32, "white", INK, 1.5, 6))
        parts.append(text(997, level + 5, "&#215; V", 15))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">',
            "<!-- SPDX-License-Identifier: Apache-2.0. Made by draw_karat.py. -->",
            "<title>Softmax attention and Kolmogorov-Arnold attention</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>',
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("karat.svg").write_text(picture(), encoding="utf-8")
