"""Pictures in the page: those of a run's folder, and those drawn for the page."""
import base64
import io
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from runs.plots import plt

LARGEST = 8 * 2**20   # bytes of a picture, so that browsers can load the page


def png(path: Path) -> bytes:
    """The bytes of a PNG file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no PNG, or too large for the page.
    """
    if not path.is_file() or path.stat().st_size > LARGEST:
        raise ValueError(f"no plain file of at most {LARGEST:,} bytes")
    picture = path.read_bytes()
    try:
        with Image.open(io.BytesIO(picture), formats=["PNG"]) as image:
            image.verify()
    except Exception as error:   # Pillow raises many kinds: for damage, and for far too many pixels
        raise ValueError("no PNG, or a damaged one") from error
    return picture


def image(picture: bytes, text: str) -> Markup:
    """A PNG as HTML; ``text`` stands for it where it is not shown."""
    return Markup("<img alt='{}' src='data:image/png;base64,{}'>").format(
        text, base64.b64encode(picture).decode())


def figure_image(figure: plt.Figure, text: str) -> Markup:
    """A figure as HTML; the figure is closed."""
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=110)
    plt.close(figure)
    return image(held.getvalue(), text)
