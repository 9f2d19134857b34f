import numpy as np
import pytest
from PIL import Image

from dat.detection.data import Category
from dat.detection.draw import MIN_EDGE, draw_boxes, side_by_side

CLASSES = (Category(3, "blue"), Category(11, "a rather long name for a class"))


@pytest.mark.parametrize("size", [(16, 16), (640, 480), (301, 700), (2000, 300)])
def test_boxes_are_drawn_at_a_readable_size(size):
    image = Image.new("RGB", size)
    bbox = [size[0] * 0.25, size[1] * 0.25, size[0] * 0.5, size[1] * 0.5]
    picture = draw_boxes(image, [{"category_id": 11, "bbox": bbox, "score": 0.5}], CLASSES)
    scale = picture.width // size[0]
    assert picture.size == (size[0] * scale, size[1] * scale)
    assert max(picture.size) >= MIN_EDGE
    column = np.asarray(picture)[:, round(bbox[0] * scale) + 1].sum(-1)
    middle = slice(round(size[1] * scale * 0.3), round(size[1] * scale * 0.7))
    assert (column[middle] > 0).all()


def test_a_label_stays_inside_the_picture():
    box = {"category_id": 11, "bbox": [635, 0, 5, 5], "score": 1.0}
    plain = np.asarray(Image.new("RGB", (640, 480)))
    picture = np.asarray(draw_boxes(Image.fromarray(plain), [box], CLASSES))
    # black letters on the class's colour
    assert (picture[:20, 400:].sum(-1) > 0).mean() > 0.5


def test_a_long_name_leaves_room_for_the_score():
    def right_edge(name, score):
        box = {"category_id": 3, "bbox": [0, 100, 600, 100], "score": score}
        return np.asarray(draw_boxes(Image.new("RGB", (640, 480)), [box], [Category(3, name)]))[85:99, 500:]

    name = "a very long name for a class, " * 6
    assert not np.array_equal(right_edge(name, 0.11), right_edge(name, 0.88))
    assert not right_edge("cat", 0.11).any()


def test_two_pictures_in_one():
    assert side_by_side(Image.new("RGB", (100, 80)), Image.new("RGB", (100, 80))).size == (206, 80)
    assert side_by_side(Image.new("RGB", (200, 80)), Image.new("RGB", (200, 80))).size == (200, 166)
