"""A contact sheet: pictures in rows and columns, each with a caption, under a title and a line of facts."""

from dataclasses import dataclass

PAPER, INK, GRAY, RULE = "#ffffff", "#1c1c1e", "#6e6e73", "#d8d8dc"
LARGEST = 256  # pixels of a picture's longer side on the sheet; larger ones are reduced
TITLE, TEXT, SMALL = 20, 14, 12  # sizes of letters, in pixels
MARGIN, GAP = 20, 12
TITLE_LINES = 4
NARROWEST = 440  # pixels, so that a title has room over a single column


@dataclass
class Cell:
    """A PIL image and the words below it."""

    image: object
    caption: str


def draw_sheet(title: str, facts: str, heads: list[str], rows: dict[str, list[Cell]]):
    """A PIL image (RGB): the title and the facts, wrapped; column heads; a row of cells for each label."""
    from PIL import Image, ImageDraw, ImageFont  # PIL only where there is a picture

    fonts = {size: ImageFont.load_default(size) for size in (TITLE, TEXT, SMALL)}
    pictures = {label: [_reduced(cell.image) for cell in cells] for label, cells in rows.items()}
    every = [picture for row in pictures.values() for picture in row]
    captions = [cell.caption for cells in rows.values() for cell in cells]
    widest = max(fonts[SMALL].getlength(text) for text in captions)
    cell_width = max(widest, *(picture.width for picture in every)) + GAP
    label_width = max(fonts[TEXT].getlength(label) for label in rows) + 2 * GAP
    width = max(NARROWEST, int(2 * MARGIN + label_width + cell_width * len(heads) - GAP))
    picture_height = max(picture.height for picture in every)
    row_height = picture_height + SMALL + 2 * GAP
    lines = [(line, TITLE, INK) for line in wrap(title, fonts[TITLE], width - 2 * MARGIN, TITLE_LINES)]
    lines += [(line, TEXT, GRAY) for line in wrap(facts, fonts[TEXT], width - 2 * MARGIN)]
    heads_y = MARGIN + sum(_line_height(size) for _, size, _ in lines) + GAP
    rows_y = heads_y + TEXT + GAP
    middles = [int(MARGIN + label_width + cell_width * k + (cell_width - GAP) / 2) for k in range(len(heads))]

    sheet = Image.new("RGB", (width, rows_y + row_height * len(rows) + MARGIN - GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    y = MARGIN
    for line, size, color in lines:
        pen.text((MARGIN, y), line, color, fonts[size])
        y += _line_height(size)
    for x, head in zip(middles, heads, strict=True):
        pen.text((x, heads_y), head, INK, fonts[TEXT], anchor="ma")  # anchor: x in the middle, y at the top
    for y, (label, cells) in zip(range(rows_y, sheet.height, row_height), rows.items(), strict=False):
        pen.line((MARGIN, y - GAP // 2, width - MARGIN, y - GAP // 2), RULE)
        pen.text((MARGIN, y + picture_height // 2), label, INK, fonts[TEXT], anchor="lm")
        for x, picture, cell in zip(middles, pictures[label], cells, strict=True):
            sheet.paste(picture, (x - picture.width // 2, y))
            pen.text((x, y + picture.height + 4), cell.caption, GRAY, fonts[SMALL], anchor="ma")
    return sheet


def _line_height(size):
    return round(1.45 * size)


def wrap(text: str, font, width: int, most: int | None = None) -> list[str]:
    """text in lines that are at most `width` pixels wide; broken at spaces, else within a word.

    If there are more than `most` lines, the last of these ends in an ellipsis.
    """
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    lines = [line for line in lines if line]
    return lines if most is None or len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1][:-1]}…"]


def _reduced(image):
    """image as RGB, no side longer than LARGEST."""
    image = image.convert("RGB")
    image.thumbnail((LARGEST, LARGEST))
    return image
