"""Lists of "path label": what is read, and what is refused with its file and line."""

import pytest

from mentorch.engine.data.lists import check_duplicates, read_image_list
from mentorch.engine.data.synsets import read_synsets


def test_spaces_carriage_returns_empty_lines_and_a_byte_order_mark(put):
    text = "\ufeffa/b c.jpg 3\r\n\r\n  d.jpg\t0  \n./e//f/./g.jpg 2\nünï.jpg 1"
    entries = read_image_list(put("list.txt", text), 4)
    assert entries.paths.to_pylist() == ["a/b c.jpg", "d.jpg", "e/f/g.jpg", "ünï.jpg"]
    assert entries.labels.tolist() == [3, 0, 2, 1]
    assert entries.lines.tolist() == [1, 3, 4, 5]


@pytest.mark.parametrize(
    "line",
    ["a.jpg", "a.jpg -1", "a.jpg x", "a.jpg 1.0", "5", "a.jpg 99999999999999999999", "a.jpg ٣"],
)
def test_an_unreadable_line_is_named(put, line):
    file = put("list.txt", f"ok.jpg 0\n\n{line}\n")
    with pytest.raises(ValueError, match=r"list\.txt, line 3: .* is not 'path label'"):
        read_image_list(file, 4)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.jpg", "a/../../x.jpg", "a/..", "a\0b.jpg"])
def test_a_path_out_of_the_root_is_named(put, path):
    file = put("list.txt", f"ok.jpg 0\n{path} 1\n")
    with pytest.raises(ValueError, match=r"list\.txt, line 2: the path .* leaves the data set's"):
        read_image_list(file, 4)


def test_dots_within_names_are_fine(put):
    assert len(read_image_list(put("list.txt", "a..b/..c/d...jpg 0\n"), 1)) == 1


def test_a_label_out_of_range_is_named(put):
    file = put("list.txt", "a.jpg 3\nb.jpg 4\n")
    with pytest.raises(ValueError, match=r"line 2: label 4 is out of range, there are 4 classes"):
        read_image_list(file, 4)


def test_text_that_is_not_utf8_is_named(put):
    file = put("list.txt", b"a.jpg 0\nb\xff.jpg 1\n")
    with pytest.raises(ValueError, match=r"list\.txt, line 2 is not UTF-8"):
        read_image_list(file, 4)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_list_is_refused(put, text):
    with pytest.raises(ValueError, match="is empty"):
        read_image_list(put("list.txt", text), 4)


def test_a_path_listed_twice_is_named_with_both_places(put):
    one = read_image_list(put("one.txt", "a.jpg 0\nb.jpg 0\n"), 4)
    two = read_image_list(put("two.txt", "c.jpg 0\n\n./b.jpg 0\n"), 4)
    check_duplicates([one])
    with pytest.raises(ValueError, match=r"two\.txt, line 3: 'b\.jpg' .*one\.txt, line 2"):
        check_duplicates([one, two])


def test_synsets(put):
    file = put("synsets.txt", "n01440764 tench, Tinca\nn01443537\n\n")
    assert read_synsets(file) == (("n01440764", "n01443537"), ("tench, Tinca", "n01443537"))


@pytest.mark.parametrize(
    ("text", "error"),
    [("", "is empty"), ("a x\n\nb y\n", "line 2: the line is"), ("a x\na y\n", "line 2: a stands")],
)
def test_bad_synsets(put, text, error):
    with pytest.raises(ValueError, match=error):
        read_synsets(put("synsets.txt", text))
