"""Image files of all kinds that data sets have: odd ones that can be read, and broken ones that cannot."""

import io

import numpy as np
from PIL import Image


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def odd_files(rng, size):
    """{kind: (extension, content, whether it can be read)} of random images of `size` pixels square."""

    def noise(*shape, kind=np.uint8):
        return rng.integers(0, np.iinfo(kind).max, shape, dtype=kind)

    rgb = Image.fromarray(noise(size, size, 3))
    frames = [Image.fromarray(noise(size, size, 3)) for _ in range(3)]
    animated = {"save_all": True, "append_images": frames}
    jpeg, png = encode(rgb, "JPEG"), encode(rgb, "PNG")
    palette = rgb.quantize(16)
    return {
        "truncated_jpeg": (".jpg", jpeg[: len(jpeg) * 2 // 3], False),
        "truncated_png": (".png", png[: len(png) // 2], False),
        "empty": (".jpg", b"", False),
        "text": (".png", b"this is no image\n", False),
        "page": (".jpeg", b"<html><body>404 not found</body></html>", False),
        "text_by_name": (".txt", b"notes of the photographer", False),
        "png_as_jpg": (".jpg", png, True),
        "jpeg_as_png": (".png", jpeg, True),
        "jpeg_as_dat": (".dat", jpeg, True),
        "no_extension": ("", png, True),
        "capitals": (".JPG", jpeg, True),
        "grey_16": (".png", encode(Image.fromarray(noise(size, size, kind=np.uint16)), "PNG"), True),
        "grey_16_tiff": (".tif", encode(Image.fromarray(noise(size, size, kind=np.uint16)), "TIFF"), True),
        "cmyk": (".jpg", encode(Image.fromarray(noise(size, size, 4), "CMYK"), "JPEG"), True),
        "palette": (".png", encode(palette, "PNG", transparency=0), True),
        "one_bit": (".png", encode(rgb.convert("1"), "PNG"), True),
        "grey_alpha": (".png", encode(Image.fromarray(noise(size, size, 2), "LA"), "PNG"), True),
        "animated_gif": (".gif", encode(palette, "GIF", **animated), True),
        "animated_png": (".png", encode(rgb, "PNG", **animated), True),
        "animated_webp": (".webp", encode(rgb, "WEBP", **animated), True),
    }


def write_odd_images(folder, plain, odd, size=8, classes=("a", "b"), seed=0):
    """Writes `plain` PNGs and `odd` files of all kinds by turns; returns the names of those that cannot be read."""
    rng, unreadable = np.random.default_rng(seed), set()
    for name in classes:
        (folder / name).mkdir(parents=True)
    for i in range(plain):
        path = folder / classes[i % len(classes)] / f"plain_{i}.png"
        Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(path)
    for i in range(odd):
        files = odd_files(rng, size)
        kind = list(files)[i % len(files)]
        extension, content, readable = files[kind]
        name = f"{classes[i % 3 % len(classes)]}/{kind}_{i}{extension}"
        (folder / name).write_bytes(content)
        if not readable:
            unreadable.add(name)
    return unreadable
