"""Draws loss.csv as loss.svg: `python -m cortex.bundled.recipe.plot`."""

import csv
import math
from pathlib import Path

import click

_WIDTH, _HEIGHT, _MARGIN = 640, 320, 44
_GRID = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def draw(points: list[tuple[float, float]]) -> str:
    """Return an SVG of (million tokens, loss) points; the loss axis is logarithmic."""
    most = max(x for x, _ in points)
    low, high = math.log(min(y for _, y in points) * 0.9), math.log(max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = _MARGIN + x / most * (_WIDTH - 2 * _MARGIN)
        down = _MARGIN + (high - math.log(y)) / (high - low) * (_HEIGHT - 2 * _MARGIN)
        return across, down

    lines = []
    for mark in _GRID:
        if low < math.log(mark) < high:
            _, y = place(0, mark)
            lines.append(
                f'<path d="M{_MARGIN} {y:.1f}H{_WIDTH - _MARGIN}" stroke="#ddd"/>'
                f'<text x="{_MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{mark}</text>'
            )
    for million in range(0, int(most) + 1, 2):
        x, _ = place(million, 1.0)
        lines.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{million} M</text>'
        )
    curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    lines.append(f'<polyline points="{curve}" fill="none" stroke="#2060c0" stroke-width="1.5"/>')
    lines.append(
        f'<text x="{_WIDTH / 2}" y="20" text-anchor="middle">'
        "loss on the model's own tokens, by tokens seen</text>"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        + "\n".join(lines)
        + "</svg>\n"
    )


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path(__file__).parent)
def main(folder: Path) -> None:
    """Read loss.csv in the folder and write loss.svg beside it."""
    with (folder / "loss.csv").open(newline="") as file:
        points = [(int(row["tokens"]) / 1e6, float(row["loss"])) for row in csv.DictReader(file)]
    (folder / "loss.svg").write_text(draw(points))


if __name__ == "__main__":
    main()
