"""Files of one JSON object a line: whatever texts hold, and lines that are none."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.json_lines import read_json_lines

OBJECTS = st.lists(st.dictionaries(st.text(), st.text(), max_size=3), max_size=4)


@given(OBJECTS, st.booleans())
def test_what_is_written_is_read(tmp_path_factory, objects, is_ascii):
    """Texts may hold U+2028 and others that end lines elsewhere."""
    file = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    lines = "".join(json.dumps(each, ensure_ascii=is_ascii) + "\n\n" for each in objects)
    file.write_bytes(lines.encode())
    found = read_json_lines(file)
    assert [line.value for line in found] == objects
    assert [line.number for line in found] == [1 + 2 * k for k in range(len(objects))]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}\n[1]\n", "line 2 is no JSON object, but a list"), ("{}\n\n{\n", "line 3 is no JSON")],
)
def test_a_line_that_is_no_object_is_named(tmp_path, content, message):
    file = tmp_path / "lines.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"lines\.jsonl {message}"):
        read_json_lines(file)
